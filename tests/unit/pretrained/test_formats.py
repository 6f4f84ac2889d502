"""Foreign checkpoints in and out: exact both ways, recognised, and nothing half-written."""

import json
import os
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import abstract_params, init_params
from igpt_jax.pretrained import formats, huggingface, leaves, openai
from igpt_jax.pretrained.tensor_bundle import Bundle
from support.checkpoint_cases import (
  BERT,
  CLUSTERS,
  CONFIG,
  assert_same,
  edit_json,
  random_params,
  write_huggingface,
  write_openai,
)


@pytest.fixture
def checkpoint(tmp_path):
  return write_openai(tmp_path)


@pytest.fixture
def directory(tmp_path):
  return write_huggingface(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
  "name, config, num_shards",
  [("openai", CONFIG, 1), ("openai", CONFIG, 5), ("openai", BERT, 3), ("huggingface", CONFIG, 1)],
)
def test_round_trip_is_exact(tmp_path, name, config, num_shards, dtype):
  params = random_params(config, dtype)
  target = tmp_path / "model.ckpt-3"
  formats.save(target, name, config, params, num_shards=num_shards)
  loaded = formats.load(target)
  assert loaded.config == config
  assert_same(loaded.params, params)
  if name == "openai":
    assert len(list(tmp_path.glob("*.data-*"))) == num_shards
  assert not list(tmp_path.glob("*part*"))


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("name", ["openai", "huggingface"])
def test_files_have_the_permissions_of_any_new_one(tmp_path, name, umask, mode):
  (tmp_path / "out").mkdir()
  before = os.umask(umask)
  try:
    formats.save(tmp_path / "out" / "m", name, CONFIG, random_params(CONFIG), clusters=CLUSTERS)
  finally:
    os.umask(before)
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert len(files) >= 3
  assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
    path.name: mode for path in files
  }


def test_a_small_checkpoint_is_read_in_one_line(directory, tmp_path):
  lines = []
  loaded = formats.load(directory, report=lines.append)
  assert len(lines) == len(loaded.notes) + 1
  assert re.fullmatch(r"read \d+(\.\d+)? kB in \d\S* s from .*", lines[-1])
  assert "0.0" not in lines[-1].partition(" in ")[0]
  formats.save(tmp_path / "again", "huggingface", CONFIG, loaded.params, report=lines.append)
  assert len(lines) == len(loaded.notes) + 1


def test_a_large_one_says_how_far_it_is(directory, monkeypatch):
  now = iter(range(0, 10_000, 7))
  monkeypatch.setattr(leaves.time, "monotonic", lambda: next(now))
  lines = []
  notes = formats.load(directory, report=lines.append).notes
  lines = lines[len(notes) :]
  assert len(lines) > 3
  assert all(
    re.match(r"reading: \d\S* kB/\d\S* kB  \S+ \w+/s  ETA 0:", line) for line in lines[:-1]
  )


def test_huggingface_is_cut_into_files_with_an_index(tmp_path):
  params = random_params(CONFIG)
  huggingface.write_directory(tmp_path / "hf", CONFIG, params, max_shard_bytes=20_000)
  files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
  assert len(files) > 2
  assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
  assert set(index["weight_map"].values()) == set(files)
  stored = sum(array.nbytes for f in files for array in load_file(tmp_path / "hf" / f).values())
  assert index["metadata"]["total_size"] == stored
  assert_same(formats.load(tmp_path / "hf").params, params)


def test_all_formats_hold_the_same_model(tmp_path, checkpoint, directory):
  """ours → openai and ours → huggingface describe one model in two layouts."""
  assert_same(formats.load(checkpoint).params, formats.load(directory).params)
  tensors = load_file(directory / "model.safetensors")
  with Bundle(checkpoint) as bundle:
    q, k, v = (bundle.read(f"model/h1/attn/{name}_proj") for name in "qkv")
    wte, sos = bundle.read("model/wte"), bundle.read("model/sos")
  merged = tensors["transformer.h.1.attn.c_attn.weight"]
  for i, weight in enumerate((q, k, v)):
    theirs = merged[:, 16 * i : 16 * (i + 1)]
    np.testing.assert_array_equal(theirs, weight.reshape(16, 16).T)
  np.testing.assert_array_equal(tensors["transformer.wte.weight"], [*wte, sos])


def test_jax_arrays_are_written_through_fetch(tmp_path):
  params = init_params(CONFIG, jax.random.key(0))
  fetched = []

  def fetch(leaf):
    fetched.append(leaf)
    return np.asarray(leaf)

  formats.save(tmp_path / "hf", "huggingface", CONFIG, params, fetch=fetch)
  assert len(fetched) == len(jax.tree.leaves(params))
  assert_same(formats.load(tmp_path / "hf").params, jax.tree.map(np.asarray, params))


def test_leaves_are_placed_one_by_one_largest_first(checkpoint):
  lines, placed = [], []

  def place(path, array):
    placed.append((path, array.nbytes))
    return jax.numpy.asarray(array)

  loaded = formats.load(checkpoint, place=place, report=lines.append)
  assert len(placed) == len(jax.tree.leaves(loaded.params)) == 11
  assert [size for _, size in placed] == sorted((size for _, size in placed), reverse=True)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
  assert lines[-1].startswith("read ")


def test_leaves_go_onto_their_devices(checkpoint):
  """Split over every device there is where their shapes allow; the values are the same."""
  devices = np.array(jax.devices())
  mesh = jax.sharding.Mesh(devices, ("x",))

  def sharding(leaf):
    fits = [axis for axis, size in enumerate(leaf.shape) if size % len(devices) == 0]
    axes = ["x" if fits and axis == fits[0] else None for axis in range(leaf.ndim)]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

  shardings = jax.tree.map(sharding, abstract_params(CONFIG))
  params = formats.load(checkpoint, place=leaves.placer(shardings)).params
  assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
  assert_same(jax.tree.map(np.asarray, params), random_params(CONFIG))


def test_dtype_is_kept_unless_asked_for(tmp_path):
  half = random_params(CONFIG, "bfloat16")
  formats.save(tmp_path / "model.ckpt-1", "openai", CONFIG, half)
  wide = formats.load(tmp_path / "model.ckpt-1", dtype="float32").params
  assert_same(wide, jax.tree.map(lambda leaf: leaf.astype(np.float32), half))


def test_detect(tmp_path, checkpoint, directory):
  for path in (checkpoint, f"{checkpoint}.index", f"{checkpoint}.data-00000-of-00001", tmp_path):
    assert formats.detect(path) == "openai"
    assert formats.load(path).config == CONFIG
  for path in (directory, directory / "config.json"):
    assert formats.detect(path) == "huggingface"
    assert formats.load(path).config == CONFIG


def test_detect_our_own_checkpoints(tmp_path):
  from orbax.checkpoint import v1 as ocp

  step = tmp_path / "run" / "checkpoints" / "10"
  ocp.save_checkpointables(step, {"params": {"a": np.zeros(3)}})
  for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", step):
    assert formats.detect(path) == "orbax"
  with pytest.raises(UserError, match="own"):
    formats.load(step)


def test_detect_refuses(tmp_path, checkpoint):
  with pytest.raises(UserError, match="nothing is there"):
    formats.detect(tmp_path / "absent")
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="holds nothing"):
    formats.detect(tmp_path / "empty")
  formats.save(tmp_path / "model.ckpt-8", "openai", BERT, random_params(BERT))
  with pytest.raises(UserError, match=r"holds 2: model\.ckpt-7\.index, model\.ckpt-8\.index"):
    formats.detect(tmp_path)
  with pytest.raises(UserError, match="format: 'flax'"):
    formats.save(tmp_path / "x", "flax", CONFIG, random_params(CONFIG))


def test_palettes_travel_with_the_weights(tmp_path):
  params = random_params(CONFIG)
  formats.save(tmp_path / "hf", "huggingface", CONFIG, params, clusters=CLUSTERS)
  formats.save(tmp_path / "model.ckpt-1", "openai", CONFIG, params, clusters=CLUSTERS)
  for path in (tmp_path / "hf", tmp_path / "model.ckpt-1"):
    loaded = formats.load(path)
    assert loaded.clusters.dtype == np.float32
    np.testing.assert_array_equal(loaded.clusters, CLUSTERS)
  fields = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
  assert fields["size"] == {"height": 6, "width": 6}


@pytest.mark.parametrize(
  "clusters, message",
  [
    (CLUSTERS[:5], "5 colours; expected the model's 32"),
    (CLUSTERS[:, :2], r"shape \[32, 2\]"),
    (127.5 * (CLUSTERS + 1), r"expected \[-1, 1\]"),
    (np.where(CLUSTERS > 0, np.nan, CLUSTERS), r"expected \[-1, 1\]"),
    (CLUSTERS.astype(object), r"object \[32, 3\]"),
    (CLUSTERS.astype(str), r"expected \[k, 3\] numbers"),
  ],
)
def test_palettes_that_are_none(checkpoint, clusters, message):
  np.save(checkpoint.parent / "kmeans_centers.npy", clusters, allow_pickle=True)
  with pytest.raises(UserError, match=message):
    formats.load(checkpoint)


def test_palette_of_another_scale_is_refused(directory):
  edit_json(directory / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
  with pytest.raises(UserError, match="image_mean"):
    formats.load(directory)


@pytest.mark.parametrize("name", ["openai", "huggingface"])
def test_a_failed_write_leaves_nothing(tmp_path, name):
  params = random_params(CONFIG)
  del params["blocks"]["mlp"]["proj"]
  with pytest.raises(UserError, match="blocks/mlp/proj is missing"):
    formats.save(tmp_path / "x", name, CONFIG, params)
  assert not list(tmp_path.iterdir())

  calls = []

  def fail_midway(leaf):
    calls.append(leaf)
    if len(calls) == 6:
      raise RuntimeError("device lost")
    return np.asarray(leaf)

  with pytest.raises(RuntimeError, match="device lost"):
    formats.save(tmp_path / "x", name, CONFIG, random_params(CONFIG), fetch=fail_midway)
  assert not list(tmp_path.iterdir())


def test_colours_are_there_before_the_weights(tmp_path, monkeypatch):
  """A conversion that is killed leaves no checkpoint without its palette; one that fails, nothing."""
  seen = []

  def fail(prefix, *arguments, **settings):
    seen.extend(os.listdir(tmp_path))
    raise UserError("no room")

  monkeypatch.setattr(openai, "write_checkpoint", fail)
  with pytest.raises(UserError, match="no room"):
    formats.save(tmp_path / "m", "openai", CONFIG, random_params(CONFIG), clusters=CLUSTERS)
  assert seen == ["kmeans_centers.npy"] and not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["openai", "huggingface"])
def test_nothing_is_overwritten(tmp_path, name):
  formats.save(tmp_path / "x", name, CONFIG, random_params(CONFIG))
  before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
  with pytest.raises(UserError, match="exists"):
    formats.save(tmp_path / "x", name, CONFIG, random_params(CONFIG))
  with pytest.raises(UserError, match=r"No such file|Not a directory"):
    target = f"{tmp_path}/absent/y" if name == "openai" else f"{__file__}/y"
    formats.save(target, name, CONFIG, random_params(CONFIG))
  assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_shape_table_covers_our_parameters():
  """Every leaf of the model is in both tables, once, under its shape."""
  for table, config in ((openai.table, CONFIG), (openai.table, BERT), (huggingface.table, CONFIG)):
    found = {leaf.path: leaf.shape for leaf in table(config)}
    expected = {
      tuple(key.key for key in path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    assert found == expected
