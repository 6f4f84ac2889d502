"""Trunk and decay of train.schedule=wsd: runs of all lengths share the trunk, and each can be made longer."""

import json
import os
import shutil

import pytest

from igpt_jax import checkpoint
from igpt_jax.errors import UserError
from igpt_jax.jobs import pretrain
from igpt_jax.reporting import metrics
from igpt_jax.runner import loop
from igpt_jax.workspace import branches, provenance, watch
from support.quickstart import shrunk, stop_at
from support.tiny import Killed, on_one_device

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


def wsd(**changes):
  """Settings of 12 steps, the last 2 of which decay; a checkpoint a step, of which one is kept."""
  wanted = {"train.schedule": "wsd", "train.log_every": 1, "train.eval_every": 3}
  wanted |= {"train.checkpoint_every": 1, "train.max_to_keep": 1}
  return shrunk(**wanted | {f"train.{name}": value for name, value in changes.items()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Workdirs of runs that went straight to their ends: `short` (12 steps), and `long` (20), all kept."""
  folder = tmp_path_factory.mktemp("wsd")
  on_one_device(pretrain, wsd(checkpoint_every=5), str(folder / "short"))
  on_one_device(pretrain, wsd(steps=20, max_to_keep=20, checkpoint_every=2), str(folder / "long"))
  return folder


@pytest.fixture
def short(runs, tmp_path):
  return shutil.copytree(runs / "short", tmp_path / "run")


def contents(workdir, step):
  """Checksums of the whole state: parameters, optimizer, step and RNG."""
  sums = checkpoint.describe(checkpoint.path_of(str(workdir), step)).sums
  return {name: sums[name] for name in ("params", "training")}


def numbers(workdir, upto=99):
  """What metrics.jsonl says, without times."""
  names = ("step", "loss", "grad_norm", "learning_rate", "validation_loss")
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  told = [{name: each[name] for name in names if name in each} for each in records]
  return [each for each in told if each["step"] <= upto]


def assert_is(workdir, expected, step):
  """The run is bit for bit another that made as many steps."""
  assert checkpoint.latest_step(str(workdir)) == step
  assert contents(workdir, step) == contents(expected, step)
  assert numbers(workdir) == numbers(expected, step)


def test_the_trunk_is_the_same_at_every_length(runs):
  assert checkpoint.whole_steps(str(runs / "short")) == [10, 12]  # though 5 divides, and 1 is kept
  assert contents(runs / "short", 10) == contents(runs / "long", 10)
  assert numbers(runs / "short", 10) == numbers(runs / "long", 10)
  assert contents(runs / "short", 12) != contents(runs / "long", 12)


def test_a_decay_from_a_trunks_checkpoint_is_the_run_that_went_straight_there(runs, tmp_path):
  branch = tmp_path / "branch"
  branches.branch(str(runs / "long"), 8, str(branch))
  assert checkpoint.whole_steps(str(branch)) == [8]
  assert numbers(branch) == numbers(runs / "long", 8)
  on_one_device(pretrain, wsd(), str(branch))
  assert_is(branch, runs / "short", 12)
  assert checkpoint.latest_step(str(runs / "long")) == 20
  with pytest.raises(UserError, match="branch exists; fix: name another target"):
    branches.branch(str(runs / "long"), 8, str(branch))
  with pytest.raises(UserError, match=r"checkpoints/7 doesn't exist; expected .*: 10, 12"):
    branches.branch(str(runs / "short"), 7, str(tmp_path / "other"))
  assert not (tmp_path / "other").exists()


def test_an_ended_run_trains_longer_from_its_trunks_end(runs, short, capsys):
  before, ended = provenance.of_run(checkpoint.describe(str(short))), numbers(short)
  on_one_device(pretrain, wsd(steps=20), str(short))
  assert_is(short, runs / "long", 20)
  said, aside = capsys.readouterr().out, short / "decays" / "10-12-1-sqrt"
  assert (
    f"going back to step 10, before the decay; that from step 10 to 12 is put aside as {aside}"
    in said
  )
  assert "train.steps 12 → 20: the learning rate is 0.003 until the decay, from step 16 on" in said
  assert checkpoint.whole_steps(str(short)) == [16, 20]
  assert json.loads((short / "training.json").read_text())["step"] == 20
  info = checkpoint.describe(str(short))
  assert info.run["lengths"] == [{"at": 10, "steps": 12}] and provenance.of_run(info) == before
  # What it was is a workdir of its own.
  assert contents(aside, 12) == contents(runs / "short", 12) and numbers(aside) == ended
  assert json.loads((aside / "training.json").read_text())["step"] == 12
  assert json.loads((aside / "config.json").read_text())["train"]["steps"] == 12
  assert (aside / "palette.npy").read_bytes() == (short / "palette.npy").read_bytes()

  on_one_device(pretrain, wsd(steps=20), str(short))
  assert "put aside" not in capsys.readouterr().out


def test_a_run_stopped_in_its_decay_goes_on_or_is_made_longer(runs, tmp_path, monkeypatch):
  stopped, longer = tmp_path / "stopped", tmp_path / "longer"
  with monkeypatch.context() as patch:
    stop_at(patch, 11)
    on_one_device(pretrain, wsd(), str(stopped))
  shutil.copytree(stopped, longer)
  on_one_device(pretrain, wsd(), str(stopped))
  assert_is(stopped, runs / "short", 12)
  on_one_device(pretrain, wsd(steps=20), str(longer))
  assert_is(longer, runs / "long", 20)
  assert checkpoint.whole_steps(str(longer / "decays" / "10-12-1-sqrt")) == [11]


def test_a_run_killed_while_it_leaves_its_decay_loses_nothing(runs, tmp_path, monkeypatch):
  """It goes on as it was, or leaves the rest."""
  workdir, as_it_was = tmp_path / "run", tmp_path / "as_it_was"
  on_one_device(pretrain, wsd(max_to_keep=2), str(workdir))
  assert checkpoint.whole_steps(str(workdir)) == [10, 11, 12]
  rename = os.rename

  def killed(source, target):
    if str(source).endswith("checkpoints/12"):
      raise Killed
    rename(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", killed)
    with pytest.raises(Killed):
      on_one_device(pretrain, wsd(steps=20), str(workdir))
  assert checkpoint.whole_steps(str(workdir)) == [10, 12]
  assert not watch._training_has_ended(str(workdir))
  shutil.copytree(workdir, as_it_was)
  on_one_device(pretrain, wsd(max_to_keep=2), str(as_it_was))
  assert_is(as_it_was, runs / "short", 12)
  assert watch._training_has_ended(str(as_it_was))
  on_one_device(pretrain, wsd(steps=20), str(workdir))
  assert_is(workdir, runs / "long", 20)
  assert checkpoint.whole_steps(str(workdir / "decays" / "10-12-1-sqrt")) == [11, 12]


def test_another_decay_begins_from_the_trunk(runs, short, tmp_path, capsys):
  other = wsd(decay_steps=1, decay_shape="linear")
  on_one_device(pretrain, other, str(short))
  said = "\ntrain.decay_steps 0 → 1, train.decay_shape 1-sqrt → linear: the learning rate is 0.003"
  assert said in capsys.readouterr().out
  on_one_device(pretrain, other, str(tmp_path / "straight"))
  assert_is(short, tmp_path / "straight", 12)
  config = json.loads((short / "config.json").read_text())
  assert config["train"]["decay_shape"] == "linear"
  changed = {"at": 10, "steps": 12, "decay_steps": 0, "decay_shape": "1-sqrt"}
  assert checkpoint.describe(str(short)).run["lengths"] == [changed]


def test_every_decay_that_a_run_leaves_is_kept(runs, short, monkeypatch, capsys):
  """There and back again is the straight run, though the trunk's checkpoint is of the first decay."""
  linear, aside = wsd(decay_shape="linear"), short / "decays"
  with monkeypatch.context() as patch:
    stop_at(patch, 11)
    on_one_device(pretrain, linear, str(short))
  capsys.readouterr()
  on_one_device(pretrain, wsd(), str(short))
  assert "going back to step 10, before the decay" in capsys.readouterr().out
  assert_is(short, runs / "short", 12)
  assert json.loads((short / "config.json").read_text())["train"]["decay_shape"] == "1-sqrt"
  with monkeypatch.context() as patch:
    stop_at(patch, 11)
    on_one_device(pretrain, linear, str(short))
  on_one_device(pretrain, wsd(steps=20), str(short))
  assert_is(short, runs / "long", 20)
  shapes, kept = {"1-sqrt": 12, "linear": 11}, {}
  for shape, step in shapes.items():
    for name in (f"10-12-{shape}", f"10-12-{shape}-2"):
      assert checkpoint.whole_steps(str(aside / name)) == [step]
      assert numbers(aside / name)[-1]["step"] == step
      config = json.loads((aside / name / "config.json").read_text())
      assert config["train"]["decay_shape"] == shape and config["train"]["steps"] == 12
      assert (aside / name / "training.json").exists() == (step == 12)
      kept.setdefault(shape, []).append(contents(aside / name, step))
  assert len(os.listdir(aside)) == 4
  assert kept["1-sqrt"] == [contents(runs / "short", 12)] * 2
  assert kept["linear"][0] == kept["linear"][1] and kept["linear"][0] != kept["1-sqrt"][0]


@pytest.mark.parametrize(
  "changes, expected",
  [
    (
      {"decay_steps": 4},
      r"its decay of 4 begins at step 8; .* made 10 steps without decay; .*fix: train.decay_steps=2, or",
    ),
    (
      {"steps": 11, "decay_steps": 1},
      r"train.steps: 11; .* has made 12 steps; expected 12 or more",
    ),
    ({"schedule": "cosine"}, r"train.schedule: wsd there, cosine here"),
    ({"steps": 20, "batch_size": 32}, r"train.batch_size: 16 there, 32 here"),
  ],
  ids=["longer than is left", "fewer steps", "cosine", "batch"],
)
def test_a_decay_that_the_run_cannot_come_to_is_refused(short, monkeypatch, changes, expected):
  kept = {path: path.read_bytes() for path in short.rglob("[!.]*") if path.is_file()}
  monkeypatch.setattr(loop, "_compiled", lambda *args: pytest.fail("compiled"))
  with pytest.raises(UserError, match=expected):
    on_one_device(pretrain, wsd(**changes), str(short))
  assert {path: path.read_bytes() for path in kept} == kept
  assert not (short / "decays").exists()


def test_a_run_without_its_trunks_checkpoint_is_not_made_longer(short, monkeypatch):
  shutil.rmtree(short / "checkpoints" / "10")
  monkeypatch.setattr(loop, "_compiled", lambda *args: pytest.fail("compiled"))
  with pytest.raises(UserError, match="no checkpoint from before its decay, at step 10; expected"):
    on_one_device(pretrain, wsd(steps=20), str(short))
  assert checkpoint.whole_steps(str(short)) == [12]
