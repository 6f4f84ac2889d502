"""Killed at any instant, a run goes on to the numbers of one that never was: bit for bit.

`IGPT_JAX_FAULTS=long` kills 200 times one process and 30 times two; else 4 and 1. Each life is a process of the
command, forked from one that has imported all of it: what is killed is its work, not the imports.
"""

import json
import socket
import time

import pytest

from support.faults import LONG, args_of, lives, result
from support.kills import Killed, Life


@pytest.mark.slow
def test_one_process_killed_at_random_instants(tmp_path):
  with lives(tmp_path, JAX_NUM_CPU_DEVICES="1") as started:

    def begin(workdir, out):
      return Life(started, [started.begin(args_of(workdir), out)], out)

    began = time.monotonic()
    assert begin(tmp_path / "whole", tmp_path / "whole.log").ended()
    killed = Killed(tmp_path, result(tmp_path / "whole"), time.monotonic() - began, begin)
    assert [each["step"] for each in killed.expected[0] if "loss" in each] == list(range(1, 25))
    assert 24 in killed.expected[1]
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
