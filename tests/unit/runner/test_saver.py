"""How often, and for how long, a save that fails is tried again; by a clock that the test turns."""

import types

import pytest

from igpt_jax.errors import SaveFailed
from igpt_jax.runner import saving


class Clock:
  def __init__(self):
    self.now, self.slept = 100.0, []

  def monotonic(self):
    return self.now

  def sleep(self, seconds):
    self.slept.append(seconds)
    self.now += seconds


class Disk:
  """Checkpoints that fail until some time."""

  folder = "checkpoints"

  def __init__(self, clock, until):
    self._clock, self._until, self.begun = clock, until, 0

  def begin(self, state, step):
    self.begun += 1
    if self._clock.now < self._until:
      raise OSError(28, "No space left on device")

  def wait(self):
    pass

  reopen = wait

  def is_saving(self):
    return False

  def kept(self):
    return "whole ones: 1"


@pytest.fixture
def clock(monkeypatch):
  turned = Clock()
  monkeypatch.setattr(
    saving, "time", types.SimpleNamespace(monotonic=turned.monotonic, sleep=turned.sleep)
  )
  return turned


def test_a_failed_save_is_tried_at_growing_intervals_for_so_long(clock):
  disk, flushed = Disk(clock, until=1_000.0), []
  saver = saving.Saver(disk, disk.begin, 200.0)
  with pytest.raises(SaveFailed, match=r"step 3 .*No space left.* tried 10 times in 200 s"):
    saver(None, 3, lambda: flushed.append(clock.now))
  assert clock.slept == [1, 2, 4, 8, 16, 32, 60, 60, 17]
  assert disk.begun == len(flushed) == 10


def test_training_goes_on_once_it_is_saved(clock, capsys):
  disk = Disk(clock, until=105.0)
  saving.Saver(disk, disk.begin, 200.0)(None, 3)
  assert clock.slept == [1, 2, 4] and "step 3 is saved, at try 4" in capsys.readouterr().out


def test_no_process_begins_a_save_that_another_cannot_prepare(clock, monkeypatch, capsys):
  """Else it would wait in a save that the other one doesn't come to."""
  disk, said = Disk(clock, until=0.0), [False, True, False, False, False, False]
  monkeypatch.setattr(saving.hosts, "on_any", lambda here, what: said.pop(0) or here)
  saving.Saver(disk, disk.begin, 200.0)(None, 3)
  assert said == [] and disk.begun == 1
  assert "it failed on another process" in capsys.readouterr().out
