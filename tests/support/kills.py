"""Runs that are killed at random instants until they have ended by themselves."""

import contextlib
import os
import random
import re
import signal
import time

from igpt_jax import checkpoint
from support.faults import SECONDS, SEED, result


class Killed:
  """Runs until they end by themselves, `kills` kills later; each must come to `expected`.

  Args:
    folder: a local one, of what they say and, unless `place` says otherwise, of their workdirs.
    expected: the `result` of a run that was never killed.
    seconds: how long that took.
    begin: (workdir, out) -> the started `Life`.
    place: where their workdirs lie.
  """

  def __init__(self, folder, expected, seconds, begin, place=""):
    self.folder, self.expected, self.seconds, self.begin = folder, expected, seconds, begin
    self.place = place or folder
    self.random = random.Random(SEED)
    self.kills = self.runs = self.resumed = 0

  def run(self, kills):
    while self.kills < kills:
      workdir = f"{self.place}/run{self.runs}"
      self.until_ended(workdir, kills)
      records, sums = result(workdir)
      assert records == self.expected[0], workdir
      # One that was to be deleted stays where the run had no more to save after the last kill.
      assert sums.items() >= self.expected[1].items(), workdir
      self.runs += 1

  def instant(self):
    """The first run, which `seconds` are of, compiled; the others take about half as long."""
    return self.random.uniform(0, self.seconds / 2)

  def until_ended(self, workdir, kills):
    out = self.folder / f"run{self.runs}.log"
    newest = -1
    while True:
      life = self.begin(workdir, out)
      if self.kills < kills and life.killed(self.instant(), self.random):
        self.kills += 1
        print(f"kill {self.kills} of {kills}, run {self.runs}", flush=True)
      elif life.ended():
        break
      reached = checkpoint.latest_step(workdir)
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
