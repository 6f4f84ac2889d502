"""Killed at any instant, a run goes on to the numbers of one that never was: bit for bit.

`IGPT_JAX_FAULTS=long` kills 200 times one process and 30 times two; else 4 and 1. Each life is a process of the
command, forked from one that has imported all of it: what is killed is its work, not the imports.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import time

import pytest

from igpt_jax import checkpoint
from support.faults import LONG, SECONDS, SEED, args_of, lives, result


class Killed:
  """Runs until they end by themselves, `kills` kills later; each must come to `expected`."""

  def __init__(self, folder, expected, seconds, begin):
    self.folder, self.expected, self.seconds, self.begin = folder, expected, seconds, begin
    self.random = random.Random(SEED)
    self.kills = self.runs = self.resumed = 0

  def run(self, kills):
    while self.kills < kills:
      workdir = self.folder / f"run{self.runs}"
      self.until_ended(workdir, kills)
      records, sums = result(workdir)
      assert records == self.expected[0], workdir
      # One that was to be deleted stays where the run had no more to save after the last kill.
      assert sums.items() >= self.expected[1].items() and 24 in sums, workdir
      self.runs += 1

  def instant(self):
    """The first run, which `seconds` are of, compiled; the others take about half as long."""
    return self.random.uniform(0, self.seconds / 2)

  def until_ended(self, workdir, kills):
    out = workdir.with_suffix(".log")
    newest = -1
    while True:
      life = self.begin(workdir, out)
      if self.kills < kills and life.killed(self.instant(), self.random):
        self.kills += 1
        print(f"kill {self.kills} of {kills}, run {self.runs}", flush=True)
      elif life.ended():
        break
      reached = checkpoint.latest_step(str(workdir))
      assert reached is None or reached >= newest, (reached, newest)
      newest = -1 if reached is None else reached
    said = out.read_text()
    self.resumed += said.count("resuming at step")
    assert "NOT SAVED" not in said, said
    # What a kill found half deleted may be set aside; what a run could go on from never is.
    for asides, step in re.findall(
      r"((?:checkpoint \d+ is set aside.*\n)+)resuming at step (\d+)", said
    ):
      assert all(int(n) < int(step) for n in re.findall(r"checkpoint (\d+) is", asides)), said


class Life:
  """The processes of one start of the command."""

  def __init__(self, started, pids, out):
    self._lives, self._pids, self._out = started, pids, out

  def killed(self, seconds, rng):
    """Kills them, one soon after the other, some time from now; False: they ended before."""
    if self._lives.status(self._pids[0], seconds) is not None:
      return False
    pids = rng.sample(self._pids, len(self._pids))
    for i, pid in enumerate(pids):
      if i:
        time.sleep(rng.choice((0, 0.05, 0.5)))
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    statuses = [self._lives.status(pid, SECONDS) for pid in pids]
    assert statuses[0] in (0, -signal.SIGKILL), self._out.read_text()
    return True

  def ended(self):
    statuses = [self._lives.status(pid, SECONDS) for pid in self._pids]
    assert statuses == [0] * len(statuses), self._out.read_text()
    return True


@pytest.mark.slow
def test_one_process_killed_at_random_instants(tmp_path):
  with lives(tmp_path, JAX_NUM_CPU_DEVICES="1") as started:

    def begin(workdir, out):
      return Life(started, [started.begin(args_of(workdir), out)], out)

    began = time.monotonic()
    assert begin(tmp_path / "whole", tmp_path / "whole.log").ended()
    killed = Killed(tmp_path, result(tmp_path / "whole"), time.monotonic() - began, begin)
    assert [each["step"] for each in killed.expected[0] if "loss" in each] == list(range(1, 25))
    killed.run(200 if LONG else 4)
    print(json.dumps({"kills": killed.kills, "runs": killed.runs, "resumed": killed.resumed}))


@pytest.mark.slow
def test_two_processes_killed_at_random_instants(tmp_path):
  with lives(
    tmp_path, JAX_NUM_CPU_DEVICES="2", JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo"
  ) as started:

    def begin(workdir, out):
      with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
      args = ["--distributed", *args_of(workdir, **{"mesh.fsdp": 2})]
      pids = [
        started.begin(
          args,
          out if not i else out.with_suffix(".log1"),
          JAX_COORDINATOR_ADDRESS=address,
          JAX_NUM_PROCESSES="2",
          JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
      ]
      return Life(started, pids, out)

    began = time.monotonic()
    assert begin(tmp_path / "whole", tmp_path / "whole.log").ended()
    killed = Killed(tmp_path, result(tmp_path / "whole"), time.monotonic() - began, begin)
    killed.run(30 if LONG else 1)
    print(json.dumps({"kills": killed.kills, "runs": killed.runs, "resumed": killed.resumed}))
