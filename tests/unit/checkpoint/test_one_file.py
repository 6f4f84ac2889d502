"""A model as one file: all of it back, the same bytes each time, and no damage unnoticed."""

import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from igpt_jax import checkpoint, history
from igpt_jax.checkpoint import CheckpointInfo, one_file
from igpt_jax.config.fields import Settings, as_json
from igpt_jax.errors import NewerFormat, UserError
from igpt_jax.pretrained import formats
from igpt_jax.training.state import param_shardings
from igpt_jax.workspace import weights
from support.tiny import ALL_OPTIONS, make_config, mesh_of, random_params, settings_of

CONFIG = make_config(n_layer=1, n_embd=8, **ALL_OPTIONS)
PALETTE = np.random.default_rng(0).uniform(-1, 1, (11, 3)).astype(np.float32)
PLACES = {
  "data.path": "/home/somebody/photos", "init_from": "runs/another", "palette.path": "default",
  "compilation_cache": "/tmp/cache", "data.resolution": 4, "data.augment": "none",
  "ablate.workdirs": ("~/somebody", "/home/somebody/run"),
}  # fmt: skip


def params_of(dtype="float32"):
  return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), random_params(CONFIG))


def info_of(palette=PALETTE, **more):
  run = {
    "model": dataclasses.asdict(CONFIG),
    "objective": "autoregressive",
    "mask_probability": 0.15,
    "resolution": 4,
    "config": as_json(settings_of(changes=PLACES)),
    "began_with": {"checkpoint": "/home/somebody/model", "step": 3},
    **more,
  }
  return CheckpointInfo("", 70, CONFIG, palette, run)


@pytest.fixture
def path(tmp_path):
  target = str(tmp_path / "model.safetensors")
  one_file.save(target, params_of("bfloat16"), info_of())
  return target


def assert_same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("palette", [PALETTE, None], ids=["colours", "tokens"])
def test_all_of_a_model_comes_back(tmp_path, dtype, palette):
  target = str(tmp_path / "any name")
  params = params_of(dtype)
  one_file.save(target, params, info_of(palette, elapsed_seconds=3.5))
  assert formats.detect(target) == one_file.FORMAT
  found = one_file.describe(target)
  assert (found.step, found.config, found.run["elapsed_seconds"]) == (70, CONFIG, 3.5)
  assert found.palette is None if palette is None else np.array_equal(found.palette, palette)
  loaded = one_file.load(found)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {dtype}
  assert_same(loaded, params)
  # Known by the same checksum as the checkpoint that it was made of.
  checkpoint.save_params(str(tmp_path / "run"), params, info_of(palette))
  original = checkpoint.describe(str(tmp_path / "run"))
  assert weights.checksum_of(found) == weights.checksum_of(original)


def test_it_is_computed_in_float32_on_any_mesh(path):
  found, mesh = weights.describe(path, Settings()), mesh_of((1, 2, 2))
  loaded = weights.read(found, mesh, lambda line: None)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {"float32"}
  jax.tree.map(lambda leaf, s: leaf.sharding == s or pytest.fail(str(s)), loaded,
               param_shardings(CONFIG, mesh))  # fmt: skip
  assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(np.float32), params_of("bfloat16")))


def test_the_same_model_makes_the_same_bytes(path, tmp_path):
  again = tmp_path / "again"
  found = one_file.describe(path)
  one_file.save(str(again), one_file.load(found), found)
  with open(path, "rb") as file:
    assert again.read_bytes() == file.read()
  assert len(list(tmp_path.iterdir())) == 2


def test_it_tells_no_places_of_the_machine_that_it_was_made_on(path):
  run = one_file.describe(path).run
  config = run["config"]
  assert (
    run["began_with"] == {"checkpoint": "", "step": 3} and config["ablate"]["workdirs"] == [""] * 2
  )
  assert config["data"]["path"] == "" and config["init_from"] == "" and config["seed"] == 0
  assert config["compilation_cache"] == "user" and config["palette"]["path"] == "default"
  assert config["data"]["resolution"] == 4
  with open(path, "rb") as file:
    content = file.read()
  assert b"somebody" not in content and b"runs/another" not in content


def test_no_changed_byte_goes_unnoticed(path, tmp_path):
  """Anywhere: in the lengths, the names, the run, the palette, the weights."""
  with open(path, "rb") as file:
    whole = file.read()
  header = 8 + struct.unpack("<Q", whole[:8])[0]
  places = [*range(0, header, 23), *range(header, len(whole), 97), header - 1, len(whole) - 1]
  damaged = tmp_path / "damaged"
  for place in places:
    damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError) as caught:
      one_file.load(weights.describe(str(damaged), Settings()))
    assert str(caught.value).count("\n") == 0 and str(damaged) in str(caught.value), place


@pytest.mark.parametrize("left", [0, 7, 9, 500, -1])
def test_a_truncated_file_is_refused(path, tmp_path, left):
  with open(path, "rb") as file:
    whole = file.read()
  (tmp_path / "short").write_bytes(whole[:left])
  with pytest.raises(UserError, match=r"short: .*expected .*fix|short: a file of no known format"):
    weights.describe(str(tmp_path / "short"), Settings())


def test_other_programs_files_are_refused(tmp_path):
  target = str(tmp_path / "model.safetensors")
  save_file({"wte": np.zeros((2, 2), np.float32)}, target, metadata={"format": "pt"})
  with pytest.raises(UserError, match=r"doesn't say which model .* name the folder"):
    weights.describe(target, Settings())


def test_one_of_a_newer_version_is_refused(tmp_path, monkeypatch):
  target = str(tmp_path / "new")
  with monkeypatch.context() as later:
    later.setattr(history, "FORMAT", history.FORMAT + 1)
    one_file.save(target, params_of(), info_of())
  with pytest.raises(NewerFormat, match="by a newer igpt_jax"):
    weights.describe(target, Settings())


def test_a_model_that_its_tensors_are_not_of_is_refused(tmp_path):
  """Checksums don't show it, where whoever wrote the file described another model."""
  target = str(tmp_path / "odd")
  wider = json.loads(json.dumps(dataclasses.asdict(CONFIG))) | {"n_embd": 16}
  one_file.save(target, params_of(), info_of(model=wider))
  with pytest.raises(UserError, match=r"tensors of .*has shape \[.*expected"):
    weights.describe(target, Settings())
  one_file.save(target, params_of(), info_of(model=wider | {"n_heads": 2}))
  with pytest.raises(UserError, match=r"odd can't be read \(TypeError: .*n_heads"):
    weights.describe(target, Settings())


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path):
  with pytest.raises(OSError):
    one_file.save(str(tmp_path / "no" / "file"), params_of(), info_of())
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "more, message",
  [
    ({"resolution": 7}, "its resolution is 7; expected the side of an image of 16 positions"),
    ({"resolution": None}, "its resolution is None"),
    ({"objective": "masked"}, "its objective is 'masked'; expected autoregressive"),
    ({"mask_probability": "some"}, "its mask_probability is 'some'; expected a number within"),
    (
      {"model": {**dataclasses.asdict(CONFIG), "n_embd": 2**40 + 1}},
      r"model\.n_embd: 1099511627777",
    ),
  ],
)
def test_a_description_that_does_not_fit_its_model_is_one_line(tmp_path, more, message):
  """Its checksums fit: anybody may write such a file."""
  path = str(tmp_path / "model.safetensors")
  one_file.save(path, params_of(), info_of(**more))
  with pytest.raises(UserError, match=message):
    one_file.describe(path)


def test_a_step_and_a_palette_that_do_not_fit_are_refused(tmp_path):
  path = str(tmp_path / "model.safetensors")
  one_file.save(path, params_of(), dataclasses.replace(info_of(), step="many"))
  with pytest.raises(UserError, match="its step is 'many'; expected a number of updates"):
    one_file.describe(path)
  one_file.save(path, params_of(), info_of(palette=PALETTE[:2]))
  with pytest.raises(
    UserError, match=r"its palette is float32 \[2, 3\]; expected float32 \[11, 3\]"
  ):
    one_file.describe(path)
