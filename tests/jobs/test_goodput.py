"""Runs say where their time went, over restarts; traces are closed."""

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
from support.tiny import Killed

pytestmark = pytest.mark.usefixtures("quick_compile")


def stored(folder):
  return json.loads((folder / goodput.FILE).read_text())


def config_of(**overrides):
  config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
  config.update_from_flattened_dict({**SMALL, "train.eval_every": 0, **overrides})
  return settings_of(config)


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
