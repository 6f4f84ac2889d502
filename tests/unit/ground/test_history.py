"""Workdirs of other versions: older ones go on, newer ones are refused in words and stay as they are."""

import copy
import dataclasses
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import igpt_jax
from igpt_jax import checkpoint, history
from igpt_jax.checkpoint import Checkpoints
from igpt_jax.config.fields import Settings, as_json
from igpt_jax.errors import NewerFormat, UserError
from igpt_jax.training import optimizer
from igpt_jax.training.state import state_shardings
from igpt_jax.workspace import weights, workdir
from support.frozen import FROZEN, config_of
from support.saved_states import ABSTRACT, CONFIG, OPTIMIZER, make_run, random_state, save
from support.tiny import mesh_of


def change_config(folder, **fields):
  path = pathlib.Path(folder) / "config.json"
  config = json.loads(path.read_text())
  config.update(fields)
  path.write_text(json.dumps(config))


@pytest.fixture
def older(tmp_path):
  """A workdir of format 1, its config.json alone."""
  shutil.copy(FROZEN / "config.json", tmp_path)
  return str(tmp_path)


@pytest.fixture
def renamed(monkeypatch):
  """A later version, in which a field and a part have other places, and another field is gone."""
  monkeypatch.setattr(history, "FORMAT", history.FORMAT + 2)
  table = {
    history.FORMAT - 1: {"seed": "chance.start", "palette": "colours", "log.wandb": ""},
    history.FORMAT: {"chance.start": "chance.seed"},
  }
  monkeypatch.setattr(history, "RENAMED", {**history.RENAMED, **table})
  monkeypatch.setattr(workdir, "as_json", copy.deepcopy)
  config = as_json(config_of())
  config["chance"] = {"seed": config.pop("seed")}
  config["colours"] = config.pop("palette")
  del config["log"]["wandb"]
  return config


def test_what_is_written_carries_the_number(tmp_path):
  """A workdir, a run's checkpoint, an imported one."""
  workdir.claim(Settings(), str(tmp_path))
  assert json.loads((tmp_path / "config.json").read_text())[history.KEY] == history.FORMAT
  workdir.check(Settings(), str(tmp_path))
  save(tmp_path / "run", random_state(3))
  found = checkpoint.describe(str(tmp_path / "run"))
  params = checkpoint.load_host_params(found)
  imported = checkpoint.save_params(str(tmp_path / "imported"), params, found)
  for path in (tmp_path / "run" / "checkpoints" / "3", imported):
    assert ocp.checkpointables_metadata(path).custom_metadata[history.KEY] == history.FORMAT


def test_names_that_have_changed_are_translated(older, renamed):
  workdir.check(renamed, older)
  renamed["chance"]["seed"] = 5
  with pytest.raises(UserError, match=r"chance\.seed: 0 there, 5 here"):
    workdir.check(renamed, older)


def test_names_that_have_changed_are_translated_once(tmp_path, renamed):
  """What the later version writes is read by it, also where a new name is an old one of before."""
  workdir.claim(renamed, str(tmp_path))
  workdir.check(renamed, str(tmp_path))
  history.RENAMED[history.FORMAT]["chance.seed"] = "never"
  assert workdir.read(str(tmp_path))["chance.seed"] == 0


def test_a_checkpoints_config_is_translated(tmp_path, monkeypatch):
  save(tmp_path, random_state(3), config={"seed": 7, "data": {"name": "digits"}})
  monkeypatch.setattr(history, "FORMAT", history.FORMAT + 1)
  monkeypatch.setattr(history, "RENAMED", {history.FORMAT: {"seed": "chance.seed"}})
  monkeypatch.setattr(history, "ADDED", {"data.crop": "none"})
  found = checkpoint.describe(str(tmp_path)).run["config"]
  assert found == {"data": {"name": "digits", "crop": "none"}, "chance": {"seed": 7}}


def test_a_field_that_came_later_had_its_default(older, monkeypatch):
  monkeypatch.setattr(workdir, "as_json", copy.deepcopy)
  config = as_json(config_of())
  config["data"]["crop"], config["corners"] = 0, "round"
  with pytest.raises(UserError, match=r"corners: absent there, round here\n  data\.crop: absent"):
    workdir.check(config, older)
  monkeypatch.setattr(history, "ADDED", {**history.ADDED, "data.crop": 0, "corners": "round"})
  workdir.check(config, older)
  config["data"]["crop"] = 3
  with pytest.raises(UserError, match=r"  data\.crop: 0 there, 3 here\nfix"):
    workdir.check(config, older)


def test_a_b2_of_0_from_before_it_was_left_open_stays_0(older):
  """Under today's name for it, which float32 rounds to 0; a later 0 is open."""
  config = json.loads((pathlib.Path(older) / "config.json").read_text())
  change_config(older, train=config["train"] | {"b2": 0.0})
  ours = config_of()
  given = [
    dataclasses.replace(ours, train=dataclasses.replace(ours.train, b2=b2)) for b2 in (0.0, 1e-300)
  ]
  with pytest.raises(UserError, match=r"train\.b2: 1e-300 there, 0\.0 here"):
    workdir.check(given[0], older)
  workdir.check(given[1], older)
  os.remove(older + "/config.json")
  workdir.claim(given[0], older)
  workdir.check(given[0], older)


def test_b2_of_1e_300_is_0_to_the_last_bit():
  gradients, updates = {"w": jnp.array([0.3, -2e-4, 1e4])}, []
  for b2 in (0.0, 1e-300):
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(learning_rate=1.0, steps=9, b2=b2))
    state = tx.init(gradients)
    for _ in range(3):
      made, state = jax.jit(tx.update)(gradients, state, gradients)
      gradients = {"w": gradients["w"] * 1.7}
    updates.append(made["w"])
    gradients = {"w": jnp.array([0.3, -2e-4, 1e4])}
  np.testing.assert_array_equal(*updates)


def test_settings_that_this_version_hasnt_are_named(older):
  """But where they don't matter to the run."""
  change_config(older, probe={"later": 1})
  workdir.check(config_of(), older)
  change_config(older, crop=3)
  with pytest.raises(UserError, match=r"settings that igpt_jax .* doesn't have:\n  crop: 3\nfix"):
    workdir.check(config_of(), older)


@pytest.mark.parametrize("number", [history.FORMAT + 1, 10**9])
def test_a_newer_workdir_is_refused(older, number):
  change_config(older, **{history.KEY: number})
  with pytest.raises(NewerFormat, match=f"format {number} by a newer igpt_jax"):
    workdir.check(config_of(), older)


@pytest.mark.parametrize("number", [0, -1, "2", None, True, 1.5])
def test_a_number_that_is_none_is_refused(older, number):
  change_config(older, **{history.KEY: number})
  with pytest.raises(UserError, match=r"format_version .*; expected 1 to \d+; it is damaged"):
    workdir.check(config_of(), older)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"seed": ', '{"data": 3}'])
def test_a_damaged_config_is_one_line(tmp_path, monkeypatch, text):
  monkeypatch.setattr(history, "ADDED", {"data.crop": 0})
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=r"config\.json is damaged"):
    workdir.check(Settings(), str(tmp_path))


def test_a_newer_checkpoint_is_refused_and_stays(tmp_path, monkeypatch):
  """It isn't damaged: it isn't set aside, and no older one is gone on from in its place."""
  save(tmp_path, random_state(1))
  with monkeypatch.context() as later:
    later.setattr(history, "FORMAT", history.FORMAT + 1)
    save(tmp_path, random_state(2))
  before = sorted(os.listdir(tmp_path / "checkpoints"))
  for read in (checkpoint.newest, checkpoint.describe, Checkpoints):
    with pytest.raises(NewerFormat, match=r"checkpoints/2: written in format"):
      read(str(tmp_path))
  assert sorted(os.listdir(tmp_path / "checkpoints")) == before == ["1", "2"]


def test_a_newer_checkpoint_alone_is_refused(tmp_path, monkeypatch):
  """Without the workdir around it, as a job's `checkpoint` or `init_from` names it."""
  save(tmp_path, random_state(1))
  with monkeypatch.context() as later:
    later.setattr(history, "FORMAT", history.FORMAT + 1)
    save(tmp_path, random_state(2))
  older, newer = (str(shutil.copytree(tmp_path / "checkpoints" / n, tmp_path / n)) for n in "12")
  for read in (
    checkpoint.describe,
    lambda path: weights.describe(path, Settings()),
    lambda path: checkpoint.load_pretrained(path, mesh_of()),
    igpt_jax.load,
  ):
    with pytest.raises(NewerFormat, match=r"/2: written in format \d+ by a newer igpt_jax"):
      read(newer)
  assert checkpoint.describe(older).step == 1


def test_an_older_checkpoint_alone_is_read():
  """One of the first version, without a number; its settings have today's names."""
  path = str(FROZEN / "checkpoints" / "40")
  stored = ocp.checkpointables_metadata(path).custom_metadata
  assert history.KEY not in stored and "images" in stored["config"]
  found = weights.describe(path, Settings())
  assert found.step == 40 and found.run["config"]["complete"]["images"] == ""
  assert "images" not in found.run["config"]
  assert igpt_jax.load(path).sample(1).shape == (1, 8, 8, 3)


def test_a_checkpoint_without_a_number_is_read(tmp_path, monkeypatch):
  with monkeypatch.context() as before:
    before.setattr(history, "KEY", "unused")
    before.setattr(history, "FORMAT", None)
    save(tmp_path, random_state(4))
  checkpoints = Checkpoints(str(tmp_path))
  resumed = checkpoints.resume(ABSTRACT, state_shardings(CONFIG, OPTIMIZER, mesh_of((1, 1, 1))))
  checkpoints.close()
  assert resumed.step == 4 and resumed.run["model"] == make_run()["model"]
