"""Told to stop at any moment, a run ends within two steps and a save, and goes on to the same numbers.

`IGPT_JAX_FAULTS=long` tells it ten times, by Ctrl-C and SIGTERM in turn; else three times.
"""

import os
import random
import re
import signal
import time

import pytest

from igpt_jax import checkpoint
from support.faults import LONG, SECONDS, SEED, args_of, lives, result

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
STEPS = 60


class Told:
  """Lives of one run, which are told to stop."""

  def __init__(self, started, workdir, seed):
    self._lives, self.workdir = started, workdir
    self._random = random.Random(seed)
    self.saved = self.left = 0

  def live(self, number, log):
    """One life, told to stop after its first step or, now and then, before; True: it has ended."""
    log.touch()
    life = self._lives.begin(args_of(self.workdir, **{"train.steps": STEPS}), log)
    if self._random.random() < 0.8:
      while "\nstep" not in log.read_text() and self._lives.status(life, 0.01) is None:
        pass
      time.sleep(self._random.uniform(0, 0.5))
    else:
      time.sleep(self._random.uniform(0, 2))
    if self._lives.status(life, 0) is None:
      os.kill(life, number)
    status = self._lives.status(life, SECONDS)
    said = log.read_text()
    assert "Traceback" not in said, said
    if "done: " in said:
      assert status == 0, said
      return True
    name = NAMES[number]
    if status == 0:
      (step,) = re.findall(rf"stopped by {name} at step (\d+): saved", said)
      assert f"stopping after step {step}: saving" in said
      assert checkpoint.latest_step(str(self.workdir)) == int(step)
      # The step before those two has been logged when it hears of it.
      heard = said.split("stopping after")[0]
      logged = re.findall(r"^(?:step|resuming at step) +(\d+)", heard, re.MULTILINE)
      assert int(step) <= int(logged[-1]) + 2, said
      self.saved += 1
    else:
      assert status == 128 + number, said
      assert said.endswith(
        f"igpt_jax: stopped by {name}: there is nothing to save; the same command starts again\n"
      ), said
      assert "stopping after" not in said
      self.left += 1
    return False


@pytest.mark.slow
def test_told_to_stop_at_random_moments(tmp_path):
  times = 10 if LONG else 3
  with lives(tmp_path, JAX_NUM_CPU_DEVICES="1") as started:

    def whole(workdir):
      log = workdir.with_suffix(".log")
      life = started.begin(args_of(workdir, **{"train.steps": STEPS}), log)
      assert started.status(life, SECONDS) == 0, log.read_text()
      return result(workdir)

    expected, runs, saved, left = whole(tmp_path / "whole"), 0, 0, 0
    while saved + left < times or not saved:
      told, life = Told(started, tmp_path / f"run{runs}", f"{SEED} {runs}"), 0
      while told.saved + told.left < times:
        number = (signal.SIGINT, signal.SIGTERM)[life % 2]
        if told.live(number, tmp_path / f"run{runs}.{life}.log"):
          break
        life += 1
      records, sums = whole(told.workdir)
      assert records == expected[0], told.workdir
      assert sums[STEPS] == expected[1][STEPS], told.workdir
      runs, saved, left = runs + 1, saved + told.saved, left + told.left
    print(f"{saved} saved, {left} left with nothing to save, in {runs} runs")
