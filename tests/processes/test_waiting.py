"""Hosts that wait for each other say for what, and those that nobody comes to end: real processes."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from support.paths import ROOT

SECONDS = 120  # that any of these processes may live
# That a host waits for the others, which start late on a busy machine; and for those who never come.
JOIN_SECONDS, SHORT_SECONDS = 60, 6

# argv: seconds to wait for the others, to sleep before it joins, and before it agrees with the other host.
PROGRAM = """
import sys, time
from igpt_jax.parallel import hosts, joining
joining._JOIN_SECONDS, joining._TOLD_SECONDS = int(sys.argv[1]), 2
hosts._TOLD_SECONDS, hosts._NOTED_SECONDS = 1, 0.2
time.sleep(float(sys.argv[2]))
joining.join(100, trains=False)
print("joined", flush=True)
hosts.wait_for_all("both are there")
time.sleep(float(sys.argv[3]))
print("any", hosts.on_any(hosts.is_main(), "a word of both"), flush=True)
"""


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@pytest.fixture
def begin():
  """Begins a host: its number, the coordinator's port, and the program's arguments."""
  begun = []

  def begin(number, port, *sleeps, join_seconds=JOIN_SECONDS):
    environment = {
      "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
      "JAX_PROCESS_ID": str(number),
    }  # fmt: skip
    process = subprocess.Popen(
      [sys.executable, "-c", PROGRAM, *map(str, (join_seconds, *sleeps))], cwd=ROOT, text=True,
      env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    begun.append(process)
    return process

  yield begin
  for process in begun:
    process.kill()
    process.communicate()


def test_a_wait_is_told_with_the_host_that_is_missing(begin):
  port = free_port()
  hosts = [begin(0, port, 0, 0), begin(1, port, 0, 4)]
  said = [host.communicate(timeout=SECONDS) for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], said
  told = re.findall(
    r"hosts: host (\d) has waited (\d) s, since [\d:]{8}, for a word of both; (.*)", said[0][1]
  )
  assert told[:2] == [("0", "1", "not there: host 1"), ("0", "2", "not there: host 1")]
  assert "has waited" not in said[1][1]
  assert all("any True" in out for out, _ in said)


def test_a_host_that_comes_early_waits_and_says_for_whom(begin):
  port = free_port()
  early = begin(1, port, 0, 0)
  for line in early.stderr:
    if "has waited" in line:
      break
  assert re.search(
    rf"host 1 has waited 2 s, since [\d:]{{8}}, for the first host at 127.0.0.1:{port}, where nothing "
    rf"answers \(Connection refused\): .*; it waits {JOIN_SECONDS - 2} s more",
    line,
  )
  late = begin(0, port, 0, 0)
  for host in (early, late):
    out, errors = host.communicate(timeout=SECONDS)
    assert host.returncode == 0 and "any True" in out, errors


@pytest.mark.parametrize("number, what", [(1, "where nothing answers"), (0, "not all have come")])
def test_a_host_that_nobody_comes_to_ends_within_the_bound(begin, number, what):
  """A stale address, or a first host without the others: one line, and a status that is tried again."""
  began = time.monotonic()
  alone = begin(number, free_port(), 0, 0, join_seconds=SHORT_SECONDS)
  out, errors = alone.communicate(timeout=SECONDS)
  assert alone.returncode == 1, errors
  assert time.monotonic() - began < SECONDS and "joined" not in out
  last = [line for line in errors.splitlines() if line.startswith("igpt_jax: ")][-1]
  assert f"host {number} has waited {SHORT_SECONDS} s" in last and what in last
  assert "ends with status 1; fix: start the same command on all hosts" in last
  assert "Check failure" not in errors and "Traceback" not in errors
