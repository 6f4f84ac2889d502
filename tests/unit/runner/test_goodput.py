"""Every second of a run is accounted for, over all its starts; and steps are traced as asked for."""

import json
import threading

import pytest

from igpt_jax.reporting import summary
from igpt_jax.runner import goodput

pytestmark = pytest.mark.usefixtures("quick_compile")


class Times:
  """Clocks that a test turns."""

  def __init__(self):
    self.now = 1_000.0

  def monotonic(self):
    return self.now

  def time(self):
    return 1.7e9 + self.now


class Waiting:
  """Batches that have made the loop wait."""

  wait_seconds = 0.0


@pytest.fixture
def times(monkeypatch):
  turned = Times()
  monkeypatch.setattr(goodput, "time", turned)
  return turned


def stored(folder):
  return json.loads((folder / goodput.FILE).read_text())


def spend(times, clock, **seconds):
  for phase, each in seconds.items():
    with clock.phase(phase):
      times.now += each


def test_every_second_has_a_phase(times, tmp_path):
  clock = goodput.Clock(str(tmp_path), 0, began=times.now - 7)
  clock.reads(batches := Waiting())
  clock.enter("step")
  times.now += 20
  batches.wait_seconds = 4.0
  spend(times, clock, compile=5, evaluation=3, checkpoint=1)
  times.now += 2
  spent = clock.end(10, ended=True)
  assert spent["seconds"] == {
    "start": 7, "compile": 5, "data": 4, "step": 18, "evaluation": 3, "checkpoint": 1, "profile": 0,
    "repeated": 0, "down": 0,
  }  # fmt: skip
  assert spent["goodput"] == 18 / 38
  assert stored(tmp_path).items() >= spent.items()
  assert goodput.describe(spent) == (
    "goodput 47.4% of 0:00:38: start 18.4%, compile 13.2%, data wait 10.5%, steps 47.4%, "
    "evaluation 7.9%, checkpoints 2.6%"
  )


def test_a_kill_loses_what_came_after_the_checkpoint(times, tmp_path):
  clock = goodput.Clock(str(tmp_path), 0)
  clock.enter("step")
  times.now += 10
  clock.saved(100)
  times.now += 30
  spend(times, clock, evaluation=5)
  clock.note(140)
  times.now += 3  # too soon to be written again: counts as time between
  clock.note(143)
  times.now += 50  # killed, and started again so much later

  times.now += 2
  clock = goodput.Clock(str(tmp_path), 100, began=times.now - 2)
  clock.enter("step")
  times.now += 90
  spent = clock.end(200, ended=True)
  found = spent["seconds"]
  assert (found["start"], found["step"], found["evaluation"]) == (2, 100, 0)
  assert (found["repeated"], found["down"]) == (35, 53)
  assert sum(found.values()) == times.now - 1_000
  assert (spent["starts"], spent["steps_again"]) == (2, 40)
  assert spent["goodput"] == pytest.approx(100 / 190)  # of all time, the lost included
  assert goodput.describe(spent).endswith(
    ", lost to 1 restart 46.3% (steps done again: 40, time between: 0:00:53)"
  )


def test_an_older_checkpoint_and_none_at_all_lose_more(times, tmp_path):
  clock = goodput.Clock(str(tmp_path), 0)
  clock.enter("step")
  for step in (1, 2, 3):
    times.now += 10
    clock.saved(step)
  for first_step, left, again in ((2, 20, 1), (0, 0, 3)):
    told = goodput.Clock(str(tmp_path), first_step).spent()
    assert (told["seconds"]["step"], told["seconds"]["repeated"]) == (left, 30 - left)
    assert told["steps_again"] == again


def test_the_times_at_a_kept_checkpoint_are_kept(times, tmp_path):
  """A run that goes back behind a long decay still knows what it had spent until then."""
  clock = goodput.Clock(str(tmp_path), 0, keep_steps=(10,))
  for step in range(10, 50):
    spend(times, clock, step=1)
    clock.saved(step)
  told = goodput.Clock(str(tmp_path), 10).spent()["seconds"]
  assert (told["step"], told["repeated"]) == (1, 39)


def test_what_had_ended_stays_as_it_was(times, tmp_path):
  clock = goodput.Clock(str(tmp_path), 0)
  clock.enter("step")
  times.now += 10
  clock.saved(5)
  spent = clock.end(5, ended=True)
  before = stored(tmp_path)
  times.now += 1_000
  again = goodput.Clock(str(tmp_path), 5)
  again.enter("step")
  times.now += 1
  again.saved(5)
  assert again.end(5, ended=True) == spent
  assert stored(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": {}}', '{"seconds": 3}'])
def test_a_damaged_file_is_said_and_replaced(times, tmp_path, capsys, text):
  (tmp_path / goodput.FILE).write_text(text)
  clock = goodput.Clock(str(tmp_path), 7)
  assert "goodput.json: can't be read" in capsys.readouterr().out
  clock.end(8, ended=False)
  assert stored(tmp_path)["starts"] == 1


def test_a_folder_that_can_not_be_written_does_not_end_a_run(times, tmp_path, capsys):
  clock = goodput.Clock(str(tmp_path / "missing"), 0)
  clock.saved(1)
  assert "goodput.json: can't be written" in capsys.readouterr().out


def test_a_loop_doesnt_wait_for_a_bucket(times, buckets, monkeypatch):
  """What is noted is uploaded beside it, one at a time; a checkpoint's time is written after that."""
  steps, begun, go_on, write_json = [], threading.Event(), threading.Event(), summary.write_json
  clock = goodput.Clock("gs://bucket/run", 0)

  def slow(path, values):
    if values["step"] == 1:
      begun.set()
      assert go_on.wait(60)
    write_json(path, values)
    steps.append(values["step"])

  monkeypatch.setattr(summary, "write_json", slow)
  for step in (1, 2, 3):  # 2 and 3 come while 1 is on its way
    times.now += 100
    clock.note(step)
    assert begun.wait(60) and steps == []
  go_on.set()
  clock.saved(4)
  clock.end(5, ended=True)
  assert steps == [1, 4, 5]
  assert json.loads(buckets.content("bucket", "run/goodput.json"))["step"] == 5


def test_what_leaving_takes_is_told_and_handed_on(times, tmp_path):
  """Two seconds a step, a second of which waits for data, and the longest save; a later start knows it."""
  clock = goodput.Clock(str(tmp_path), 4)
  assert stored(tmp_path)["leaving"] == {"step_seconds": None, "save_seconds": None}
  clock.reads(batches := Waiting())
  clock.enter("step")
  times.now += 10
  batches.wait_seconds = 5.0
  spend(times, clock, evaluation=30)
  clock.save_seconds = lambda: 7.5
  clock.saved(9)
  leaving = {"step_seconds": 2.0, "save_seconds": 7.5}
  assert stored(tmp_path)["leaving"] == leaving
  goodput.Clock(str(tmp_path), 9)
  assert stored(tmp_path)["leaving"] == leaving


def test_programs_are_in_the_line_if_there_are_any(times, tmp_path):
  spent = goodput.Clock(str(tmp_path), 0).end(0, ended=False)
  assert "compiled" not in goodput.describe(spent)
  spent["programs"] = {"read": 31, "read_seconds": 2.14, "compiled": 1, "compile_seconds": 0.2}
  assert goodput.describe(spent).endswith("; 1 program compiled in 0.2 s, 31 read in 2.1 s")
