"""A run's settings after its start: more steps in place; and a start without a checkpoint binds nothing."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.config import choices
from igpt_jax.errors import UserError
from igpt_jax.jobs import fit_palette, pretrain
from igpt_jax.reporting import metrics
from igpt_jax.runner import loop
from igpt_jax.training import optimizer
from igpt_jax.workspace import provenance, watch
from igpt_jax.workspace import workdir as workdir_lib
from support.quickstart import assert_same, params_of, shrunk, stop_at
from support.tiny import Killed, on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")


def run_of(workdir, step):
  return checkpoint.describe(checkpoint.path_of(str(workdir), step))


def test_an_ended_run_is_trained_longer_in_place(tiny_run, tmp_path, monkeypatch, capsys):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  longer = shrunk(**{"train.steps": 20})
  for workdir in (whole, parts):
    shutil.copytree(tiny_run, workdir)
  on_one_device(pretrain, longer, str(whole))
  said = capsys.readouterr().out
  assert "train.steps 12 → 20: from step 12 on the learning rate follows the cosine" in said
  assert json.loads((whole / "config.json").read_text())["train"]["steps"] == 20
  records = [r for r in metrics.read_jsonl(whole / "metrics.jsonl") if "loss" in r]
  assert [r["step"] for r in records] == list(range(2, 21, 2))
  schedule = optimizer.make_schedule(choices.optimizer_config(choices.settle(longer)))
  assert records[6]["learning_rate"] == pytest.approx(float(schedule(13)))
  assert json.loads((whole / "training.json").read_text())["step"] == 20
  new = run_of(whole, 20).run
  assert new["lengths"] == [{"at": 12, "steps": 12}] and new["config"]["train"]["steps"] == 20
  assert new["data"]["next_index"] == 20 * 16  # the order goes on
  # It is the run that it was, for results of its checkpoints.
  assert provenance.of_run(run_of(whole, 20)) == provenance.of_run(run_of(tiny_run, 12))

  # Stopped in between it goes on as if it hadn't been, and for those who watch it hasn't ended.
  with monkeypatch.context() as patch:
    stop_at(patch, 15)
    on_one_device(pretrain, longer, str(parts))
  assert not watch._training_has_ended(str(parts)) and not (parts / "training.json").exists()
  capsys.readouterr()
  on_one_device(pretrain, longer, str(parts))
  assert "→" not in capsys.readouterr().out
  assert_same(params_of(parts), params_of(whole))
  assert run_of(parts, 20).run["lengths"] == new["lengths"]


def test_a_decay_that_the_schedule_does_not_have_changes_nothing(tmp_path, monkeypatch, capsys):
  with monkeypatch.context() as patch:
    stop_at(patch, 3)
    on_one_device(pretrain, shrunk(), str(tmp_path))
  before = provenance.of_run(run_of(tmp_path, 3))
  capsys.readouterr()
  other = {"train.decay_steps": 4, "train.decay_shape": "linear", "train.steps": 12}
  with monkeypatch.context() as patch:
    stop_at(patch, 5)
    on_one_device(pretrain, shrunk(**other), str(tmp_path))
  assert "resuming at step 3 of 12" in (said := capsys.readouterr().out) and "→" not in said
  info = run_of(tmp_path, 5)
  assert "lengths" not in info.run and provenance.of_run(info) == before


def test_fewer_steps_than_were_made_are_refused(tiny_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  before = (workdir / "config.json").read_bytes()
  with pytest.raises(UserError, match=r"train.steps: 8; .* has made 12 steps; expected 12 or more"):
    on_one_device(pretrain, shrunk(**{"train.steps": 8}), str(workdir))
  with pytest.raises(UserError, match=r"holds another config's run:\n  seed: 0 there, 1 here\nfix"):
    on_one_device(pretrain, shrunk(**{"train.steps": 20, "seed": 1}), str(workdir))
  assert (workdir / "config.json").read_bytes() == before
  assert (workdir / "training.json").exists()


def test_a_run_that_has_not_ended_may_end_earlier(tmp_path, monkeypatch, capsys):
  with monkeypatch.context() as patch:
    stop_at(patch, 5)
    on_one_device(pretrain, shrunk(**{"train.schedule": "constant"}), str(tmp_path))
  on_one_device(pretrain, shrunk(**{"train.schedule": "constant", "train.steps": 7}), str(tmp_path))
  assert "train.steps 12 → 7: the learning rate stays 0.00" in capsys.readouterr().out
  assert json.loads((tmp_path / "training.json").read_text())["step"] == 7


def test_a_run_may_end_where_it_was_stopped_and_is_evaluated_there_once(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    stop_at(patch, 5)
    on_one_device(pretrain, shrunk(), str(tmp_path))
  for _ in range(2):
    on_one_device(pretrain, shrunk(**{"train.steps": 5}), str(tmp_path))
  records = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in records if "validation_loss" in r] == [5]
  assert "validation_loss" in json.loads((tmp_path / "training.json").read_text())


@pytest.mark.slow
def test_a_b2_that_is_left_open_is_chosen_by_the_batch_said_and_recorded(tmp_path, capsys):
  """Half of what an average of squares holds is forgotten after as many images as in batches of 128."""
  chosen = 0.95 ** (16 / 128)
  assert chosen ** (128 / 16) == pytest.approx(0.95)
  told = []
  for name, b2 in (("open", 0.0), ("given", chosen)):
    on_one_device(pretrain, shrunk(**{"train.b2": b2, "train.steps": 4}), str(tmp_path / name))
    told.append("train.b2: 0: chosen by the batch size: 0.993609" in capsys.readouterr().out)
  assert told == [True, False]
  assert_same(params_of(tmp_path / "open"), params_of(tmp_path / "given"))
  info = run_of(tmp_path / "open", 4)
  assert info.run["config"]["train"]["b2"] == chosen
  assert provenance.of_run(info) == provenance.of_run(run_of(tmp_path / "given", 4))
  on_one_device(pretrain, shrunk(**{"train.b2": 0.0, "train.steps": 6}), str(tmp_path / "open"))
  assert checkpoint.latest_step(str(tmp_path / "open")) == 6


def killed_before_a_checkpoint(settings, workdir):
  with pytest.MonkeyPatch.context() as patch:

    def killed(*args):
      raise Killed

    patch.setattr(loop, "_compiled", killed)
    with pytest.raises(Killed):
      on_one_device(pretrain, settings, str(workdir))
  assert (workdir / "config.json").exists() and (workdir / "palette.npy").exists()


OTHER = {"model.n_embd": 32, "palette.size": 9, "train.steps": 4}


def test_a_start_without_a_checkpoint_binds_nothing(tmp_path, capsys):
  """Its palette isn't taken, either."""
  killed_before_a_checkpoint(shrunk(), tmp_path / "run")
  (tmp_path / "run" / "progress").mkdir()
  (tmp_path / "run" / "progress" / "2.png").write_bytes(b"of the start before")
  capsys.readouterr()
  on_one_device(pretrain, shrunk(**OTHER), str(tmp_path / "run"))
  assert "a start with other settings has left no checkpoint: begun afresh" in (
    capsys.readouterr().out
  )
  on_one_device(pretrain, shrunk(**OTHER), str(tmp_path / "fresh"))
  assert_same(params_of(tmp_path / "run"), params_of(tmp_path / "fresh"))
  both = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("run", "fresh")]
  assert both[0] == both[1]
  assert not (tmp_path / "run" / "progress").exists()


def test_later_jobs_look_for_the_data_where_the_run_resumed(tmp_path, monkeypatch):
  """A folder that was moved between two starts: config.json names its new place."""
  for i in range(24):
    pixels = np.random.default_rng(i).integers(256, size=(8, 8, 3), dtype=np.uint8)
    (tmp_path / "before").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(tmp_path / "before" / f"{i}.png")
  places = [str(tmp_path / name) for name in ("before", "after")]
  of_folder = {"data.name": "folder", "data.augment": "none", "train.batch_size": 8}
  runs = [shrunk(**{**of_folder, "data.path": place}) for place in places]
  workdir = str(tmp_path / "run")
  with monkeypatch.context() as patch:
    stop_at(patch, 5)
    on_one_device(pretrain, runs[0], workdir)
  os.rename(*places)
  on_one_device(pretrain, runs[1], workdir)
  assert workdir_lib.read(workdir)["data.path"] == places[1]


def test_a_palette_that_was_fitted_by_itself_is_kept(tmp_path):
  fit_palette.run(shrunk(**{"palette.size": 9}), str(tmp_path))
  colours = (tmp_path / "palette.npy").read_bytes()
  killed_before_a_checkpoint(shrunk(**{"palette.size": 9}), tmp_path)
  workdir_lib.forget_unbegun(shrunk(**OTHER), str(tmp_path), "pretraining")
  assert not (tmp_path / "config.json").exists()
  assert (tmp_path / "palette.npy").read_bytes() == colours


@pytest.mark.parametrize("left", ["training.json", "goodput.json", "checkpoints/12.damaged/x"])
def test_a_run_whose_checkpoints_are_gone_is_not_overwritten(tiny_run, tmp_path, left):
  workdir = tmp_path / "run"
  for name in ("config.json", "metrics.jsonl", left):
    target = workdir / name
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tiny_run / name
    target.write_bytes(source.read_bytes() if source.exists() else b"")
  kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
  with pytest.raises(UserError, match="holds another config's run"):
    on_one_device(pretrain, shrunk(**OTHER), str(workdir))
  assert {p: p.read_bytes() for p in kept} == kept
