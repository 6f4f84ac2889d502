"""Every second of a run is accounted for, over all its starts; and steps are traced as asked for."""

import json
import runpy
import time

import pytest

from igpt_jax import checkpoint
from igpt_jax.config.read import settings_of
from igpt_jax.config.run_fields import ProfileConfig
from igpt_jax.errors import UserError
from igpt_jax.jobs import finetune, pretrain, probe
from igpt_jax.reporting import summary
from igpt_jax.runner import goodput, loop, run
from support import tiny
from support.hosts import ROOT, SMALL

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


def config_of(**overrides):
  config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
  config.update_from_flattened_dict({**SMALL, "train.eval_every": 0, **overrides})
  return settings_of(config)


class Killed(BaseException):
  """As good as SIGKILL: nothing is saved or closed."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run that was killed after step 6, and went on from its checkpoint of step 4; and what it said."""
  workdir = tmp_path_factory.mktemp("run")

  def kill(self, at_step):
    if at_step == 6:
      while checkpoint.whole_steps(str(workdir)) != [4]:
        time.sleep(0.01)
      raise Killed

  config = config_of(**{"profile.start": 5, "profile.steps": 100})
  said = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run, "say", said.append)
    patch.setattr(loop.StopSignal, "asked", kill)
    patch.setattr(goodput, "_WRITE_SECONDS", 0.0)
    with pytest.raises(Killed):
      tiny.on_one_device(pretrain, config, str(workdir))
    assert stored(workdir)["step"] == 5 and not stored(workdir)["ended"]
    patch.undo()
    patch.setattr(run, "say", said.append)
    tiny.on_one_device(pretrain, config, str(workdir))
  return workdir, [line for line in said if line.startswith("profile")]


def test_a_run_says_where_its_time_went(trained):
  trained, _ = trained
  found = json.loads((trained / "training.json").read_text())
  assert found["starts"] == 2 and found["steps_again"] == 1
  assert found["seconds"]["repeated"] > 0 and found["seconds"]["step"] > 0
  assert sum(found["seconds"].values()) >= found["elapsed_seconds"] - 1e-3
  assert f"goodput {found['goodput']:.1%}" in summary.write_summary(str(trained))
  assert stored(trained)["ended"]
  assert stored(trained)["seconds"] == found["seconds"]


PROFILE = {"profile.start": 1, "profile.steps": 2}


def traced(folder):
  return list((folder / "profile").rglob("*.xplane.pb"))


def test_a_trace_is_closed_when_a_run_fails_or_ends(trained):
  workdir, said = trained
  assert [line.partition(" in ")[0] for line in said] == [
    "profile: steps 5 to 5",
    "profile: steps 5 to 7",
  ]
  assert 1 <= len(traced(workdir)) <= 2  # of one name if they are of one second


def test_jobs_trace_their_steps(trained, tmp_path, capsys):
  """Fine-tuning and SGD probes, whose window ends within the run, and at its end."""
  config = config_of(
    **PROFILE,
    **{
      "checkpoint": str(trained[0]),
      "finetune.steps": 2,
      "finetune.eval_every": 2,
      "finetune.batch_size": 16,
      "evaluate.images": 20,
    },
  )
  tiny.on_one_device(finetune, config, str(tmp_path))
  said = capsys.readouterr().out
  assert f"profile: steps 1 to 1 in {tmp_path}/finetune/profile" in said and "goodput" in said
  assert traced(tmp_path / "finetune")
  assert json.loads((tmp_path / "finetune" / "finetune.json").read_text())["seconds"]["profile"] > 0

  config = tiny.changed(
    config,
    {"probe.method": "sgd", "probe.steps": 5, "probe.eval_every": 5, "probe.batch_size": 16},
  )
  tiny.on_one_device(probe, config, str(tmp_path))
  said = capsys.readouterr().out
  assert "profile: steps 1 to 2 in " in said and "goodput" in said
  assert len(list(tmp_path.rglob("*.xplane.pb"))) == 2


@pytest.mark.parametrize(
  "field, value",
  [("profile.start", -1), ("profile.steps", -1), ("profile.start", 8), ("hang_seconds", -1.0), ("host_seconds", 0)],
)  # fmt: skip
def test_mistakes_are_refused(field, value):
  with pytest.raises(UserError, match=rf"config\.{field}: {value}; expected"):
    config_of(**{"profile.steps": 1, field: value})
  with pytest.raises(UserError, match=r"config\.profile\.steps: 1\.5; expected a whole number"):
    ProfileConfig(0, 1.5)
