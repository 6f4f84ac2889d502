"""Foreign checkpoints in and out: exact both ways, and what doesn't fit is named."""

import json
import os
import shutil
import sys

import golden_files
import jax
import numpy as np
import numpy_reference
import pytest
from safetensors.numpy import load_file, save_file

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import ImageGPTConfig, abstract_params, init_params
from igpt_jax.pretrained import formats, huggingface, leaves, leveldb_table, openai
from igpt_jax.pretrained.tensor_bundle import Bundle, write_bundle

CONFIG = ImageGPTConfig(n_layer=3, n_head=2, n_embd=16, n_vocab=32, n_positions=36)
BERT = ImageGPTConfig(n_layer=2, n_head=3, n_embd=24, n_vocab=40, n_positions=12, causal=False)
CLUSTERS = np.linspace(-1, 1, 3 * CONFIG.n_vocab, dtype=np.float32).reshape(-1, 3)


def random_params(config, dtype=np.float32):
  shapes = abstract_params(config)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), shapes)


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
    other = found
    for key in path:
      other = other[key.key]
    assert other.dtype == leaf.dtype, path
    np.testing.assert_array_equal(other, leaf, err_msg=str(path))


@pytest.fixture
def checkpoint(tmp_path):
  """Prefix of a small OpenAI checkpoint."""
  prefix = tmp_path / "model.ckpt-7"
  formats.save(prefix, "openai", CONFIG, random_params(CONFIG))
  return prefix


@pytest.fixture
def directory(tmp_path):
  """A small Hugging Face directory."""
  path = tmp_path / "hf"
  formats.save(path, "huggingface", CONFIG, random_params(CONFIG), clusters=CLUSTERS)
  return path


def edit_json(path, **fields):
  value = json.loads(path.read_text()) | fields
  path.write_text(json.dumps(value))


def edit_tensors(directory, change):
  """Rewrites model.safetensors after `change(tensors)`."""
  file = directory / "model.safetensors"
  tensors = load_file(file)
  change(tensors)
  save_file(tensors, file, metadata={"format": "pt"})


def edit_variables(prefix, change):
  with Bundle(prefix) as bundle:
    variables = {name: bundle.read(name) for name in bundle.entries}
  for file in prefix.parent.glob(prefix.name + ".*"):
    file.unlink()
  change(variables)
  write_bundle(prefix, variables.items())


# --- there and back ---


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
  assert any("blocks/mlp/fc" in line for line in lines)


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


# --- which format ---


def test_detect(tmp_path, checkpoint, directory):
  for path in (checkpoint, f"{checkpoint}.index", f"{checkpoint}.data-00000-of-00001", tmp_path):
    assert formats.detect(path) == "openai"
    assert formats.load(path).config == CONFIG
  for path in (directory, directory / "config.json"):
    assert formats.detect(path) == "huggingface"
    assert formats.load(path).config == CONFIG
  assert formats.detect("gs://bucket/run") == "orbax"


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


# --- OpenAI's ---


def test_bundle_is_tensorflows_byte_for_byte(tmp_path):
  """TensorFlow wrote the golden bundles; the same tensors written here are the same files."""
  for name, step in (("a16", 1000), ("c8bert", 500)):
    prefix = golden_files.golden(name, "openai", f"model.ckpt-{step}")
    ours = tmp_path / name
    with Bundle(prefix) as bundle:
      write_bundle(ours, ((name, bundle.read(name)) for name in bundle.entries))
    for suffix in (".index", ".data-00000-of-00001"):
      assert (tmp_path / (name + suffix)).read_bytes() == (
        prefix.parent / (prefix.name + suffix)
      ).read_bytes()


def test_known_bytes_of_an_index(tmp_path):
  """The format itself, pinned for clones without golden files: one variable, TensorFlow's bytes."""
  write_bundle(tmp_path / "x", [("model/sos", np.arange(3, dtype=np.float32))])
  index = (tmp_path / "x.index").read_bytes()
  header = b"\x00\x00\x06" + b"\x08\x01\x1a\x02\x08\x01"
  entry = b"\x08\x01\x12\x04\x12\x02\x08\x03\x28\x0c\x35"
  assert index.startswith(header + b"\x00\x09\x0f" + b"model/sos" + entry)
  assert index.endswith(b"\x57\xfb\x80\x8b\x24\x75\x47\xdb")
  assert (tmp_path / "x.data-00000-of-00001").read_bytes() == np.arange(3, dtype="<f4").tobytes()


@pytest.mark.parametrize("block_bytes", [1, 100, 1000])
def test_index_of_many_blocks(tmp_path, block_bytes):
  arrays = {f"model/h{i}/x": np.full((i, 2), i, np.float32) for i in range(70)}
  write_bundle(tmp_path / "x", arrays.items(), num_shards=4, block_bytes=block_bytes)
  with Bundle(tmp_path / "x") as bundle:
    assert list(bundle.entries) == sorted(arrays)
    for name, array in arrays.items():
      np.testing.assert_array_equal(bundle.read(name), array)


def test_classifier_and_optimizer_variables_are_left_out_and_said(checkpoint):
  def add(variables):
    variables["model/clf/wclf"] = np.ones((10, 16), np.float32)
    variables["model/wte/Adam"] = np.ones((32, 16), np.float32)
    variables["beta1_power"] = np.ones((), np.float32)
    variables["global_step"] = np.ones((), np.int64)

  edit_variables(checkpoint, add)
  loaded = formats.load(checkpoint)
  assert_same(loaded.params, random_params(CONFIG))
  assert all(name in loaded.notes[0] for name in ("wclf", "wte/Adam", "beta1_power", "global_step"))


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda v: v.pop("model/wtet"), r"model/wtet missing"),
    (lambda v: v.pop("model/h2/ln_2/g"), r"model/h2/ln_2/g missing"),
    (lambda v: v.pop("model/wte"), r"model/wte.*nothing"),
    (
      lambda v: v.update({"model/h1/mlp/c_fc/w": np.zeros((16, 63), np.float32)}),
      r"model/h1/mlp/c_fc/w has shape \[16, 63\], expected \[16, 64\]",
    ),
    (lambda v: v.update({"model/ln_f/g": np.zeros(16, np.int32)}), r"model/ln_f/g isn't float32"),
    (
      lambda v: v.update({"model/h0/attn/q_proj/b": np.zeros(16, np.float32)}),
      r"model/h0/attn/q_proj/b",
    ),
    (
      lambda v: [v.pop(name) for name in list(v) if name.startswith("model/h1/")],
      "none of model/h1",
    ),
    (
      lambda v: v.update({"model/h999999/ln_1/g": np.zeros(16, np.float32)}),
      "none of model/h3",
    ),
  ],
)
def test_variables_that_do_not_fit_are_named(checkpoint, change, message):
  edit_variables(checkpoint, change)
  with pytest.raises(UserError, match=message):
    formats.load(checkpoint)


def test_a_missing_or_short_data_file_is_named(checkpoint):
  data = f"{checkpoint}.data-00000-of-00001"
  whole = os.path.getsize(data)
  os.truncate(data, whole - 1)
  with pytest.raises(UserError, match=f"which has {whole - 1}"):
    formats.open_foreign(checkpoint)
  os.remove(data)
  with pytest.raises(UserError, match="data-00000-of-00001: No such file"):
    formats.open_foreign(checkpoint)


def test_every_byte_of_the_weights_is_checked(checkpoint):
  data = checkpoint.parent / f"{checkpoint.name}.data-00000-of-00001"
  content = data.read_bytes()
  for at in range(0, len(content), 997):
    damaged = bytearray(content)
    damaged[at] ^= 1
    data.write_bytes(damaged)
    with pytest.raises(UserError, match="doesn't match its CRC"):
      formats.load(checkpoint)


def test_a_file_that_claims_more_than_the_machine_has(checkpoint):
  """A sparse file of 2 TB: refused before anything is allocated."""
  rows = 1 << 34
  data = f"{checkpoint}.data-00000-of-00001"
  edit_variables(checkpoint, lambda v: v.pop("model/wpe"))
  index = checkpoint.parent / f"{checkpoint.name}.index"
  entries = dict(leveldb_table.table_entries(index.read_bytes()))
  size = rows * 16 * 4
  varint = leveldb_table.varint
  dims = b"".join(b"\x12" + varint(len(dim)) + dim for dim in (b"\x08" + varint(rows), b"\x08\x10"))
  start = os.path.getsize(data)
  entries[b"model/wpe"] = (
    b"\x08\x01\x12"
    + varint(len(dims))
    + dims
    + b"\x20"
    + varint(start)
    + b"\x28"
    + varint(size)
    + b"\x35\0\0\0\0"
  )
  index.write_bytes(leveldb_table.pack_table(sorted(entries.items()), 1 << 18))
  os.truncate(data, start + size)
  with pytest.raises(UserError, match=r"memory: .* this machine has"):
    formats.load(checkpoint)
  with pytest.raises(UserError, match=r"memory: the largest array"):
    formats.load(checkpoint, place=lambda path, array: array)


# --- Hugging Face's ---


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"activation_function": "gelu_new"}, "activation_function gelu_new"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
    ({"scale_attn_weights": False}, "scale_attn_weights False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ({"model_type": "gpt2"}, "model_type gpt2"),
    ({"n_inner": 128}, "n_inner 128"),
    ({"n_layer": 2}, "3 layers; expected n_layer 2"),
    ({"n_layer": 10**12}, "n_layer 1000000000000"),
    ({"n_layer": True}, "n_layer True"),
    ({"n_head": 0}, "n_head 0"),
    ({"n_head": 3}, "n_head: 3"),
    ({"n_embd": 18}, r"has shape \[33, 16\], expected \[33, 18\]"),
    ({"vocab_size": 32}, r"has shape \[33, 16\], expected \[32, 16\]"),
    ({"vocab_size": 1}, "vocab_size 1"),
    ({"n_positions": "36"}, "n_positions 36"),
  ],
)
def test_configurations_that_do_not_fit(directory, fields, message):
  edit_json(directory / "config.json", **fields)
  with pytest.raises(UserError, match=message):
    formats.load(directory)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda t: t["transformer.h.2.mlp.c_fc.bias"].__setitem__(5, 1e-7),
      r"transformer\.h\.2\.mlp\.c_fc\.bias in .* aren't zero",
    ),
    (lambda t: t.pop("lm_head.weight"), "has no lm_head.weight"),
    (lambda t: t.pop("transformer.wpe.weight"), "transformer.wpe.weight missing"),
    (
      lambda t: t.update({"lm_head.weight": np.zeros((33, 16), np.float32)}),
      r"lm_head.weight has shape \[33, 16\], expected \[32, 16\]",
    ),
    (
      lambda t: t.update({"transformer.ln_f.weight": np.zeros(16, np.float64)}),
      "transformer.ln_f.weight isn't float32",
    ),
    (
      lambda t: t.update({"transformer.ln_f.bias": np.zeros(16, np.float32)}),
      "transformer.ln_f.bias",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(directory, change, message):
  edit_tensors(directory, change)
  with pytest.raises(UserError, match=message):
    formats.load(directory)


def test_biases_and_causal_masks_may_be_absent_or_there(directory):
  def change(tensors):
    for name in list(tensors):
      if name.endswith(".bias"):
        del tensors[name]
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 36, 36), np.uint8)
    tensors["transformer.h.0.attn.masked_bias"] = np.float32(-1e4)[None]

  edit_tensors(directory, change)
  assert_same(formats.load(directory).params, random_params(CONFIG))


def test_a_classifier_beside_the_model_is_left_out_and_said(directory):
  edit_tensors(directory, lambda t: t.update({"score.weight": np.ones((10, 16), np.float32)}))
  assert any("score.weight" in note for note in formats.load(directory).notes)


def test_a_tied_head_is_told_apart(directory):
  edit_json(directory / "config.json", tie_word_embeddings=True)
  with pytest.raises(UserError, match=r"lm_head.weight differs from transformer.wte.weight"):
    formats.load(directory)
  edit_tensors(directory, lambda t: t.pop("lm_head.weight"))
  loaded = formats.load(directory)
  expected = random_params(CONFIG)
  assert_same(loaded.params, expected | {"wtet": expected["wte"]})
  assert any("tied" in note or "tie_word" in note for note in loaded.notes)
  edit_tensors(
    directory, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].copy()})
  )
  assert_same(formats.load(directory).params, expected | {"wtet": expected["wte"]})


@pytest.mark.parametrize(
  "file",
  [
    "../other.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "x.bin",
    "",
    ".safetensors",
    "a\0.safetensors",
    3,
    None,
  ],
)
def test_an_index_names_files_of_its_own_directory(tmp_path, file):
  huggingface.write_directory(
    tmp_path / "hf", CONFIG, random_params(CONFIG), max_shard_bytes=20_000
  )
  index = tmp_path / "hf" / "model.safetensors.index.json"
  shutil.copy(next((tmp_path / "hf").glob("*.safetensors")), tmp_path / "other.safetensors")
  weight_map = json.loads(index.read_text())["weight_map"]
  edit_json(index, weight_map=weight_map | {"lm_head.weight": file})
  with pytest.raises(UserError, match="bare name"):
    formats.load(tmp_path / "hf")


def test_index_and_files_must_agree(tmp_path):
  huggingface.write_directory(
    tmp_path / "hf", CONFIG, random_params(CONFIG), max_shard_bytes=20_000
  )
  index = tmp_path / "hf" / "model.safetensors.index.json"
  weight_map = json.loads(index.read_text())["weight_map"]
  edit_json(index, weight_map=weight_map | {"transformer.extra": weight_map["lm_head.weight"]})
  with pytest.raises(UserError, match=r"transformer.extra .* found in None"):
    formats.load(tmp_path / "hf")
  os.remove(tmp_path / "hf" / weight_map["lm_head.weight"])
  with pytest.raises(UserError, match="No such file"):
    formats.load(tmp_path / "hf")


def test_bert_has_no_place_in_transformers(tmp_path):
  with pytest.raises(UserError, match="always masks the future"):
    formats.save(tmp_path / "hf", "huggingface", BERT, random_params(BERT))
  assert not list(tmp_path.iterdir())


# --- palettes ---


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


# --- nothing half-written, nothing executed ---


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


def test_an_old_pickle_needs_torch(directory, monkeypatch):
  os.remove(directory / "model.safetensors")
  (directory / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(UserError, match="pip install torch"):
    formats.load(directory)


@pytest.mark.parametrize("target", ["pipe", "directory"])
def test_only_regular_files_are_opened(checkpoint, target):
  """A pipe would block for ever."""
  data = f"{checkpoint}.data-00000-of-00001"
  os.remove(data)
  os.mkfifo(data) if target == "pipe" else os.mkdir(data)
  with pytest.raises(UserError, match=r"regular file|Is a directory"):
    formats.load(checkpoint)


def test_shape_table_covers_our_parameters():
  """Every leaf of the model is in both tables, once, under its shape."""
  for table, config in ((openai.table, CONFIG), (openai.table, BERT), (huggingface.table, CONFIG)):
    found = {leaf.path: leaf.shape for leaf in table(config)}
    expected = {
      tuple(key.key for key in path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    assert found == expected


def test_openai_table_matches_the_reference_variables():
  shapes = dict(n_layer=3, n_head=2, n_embd=16, n_vocab=32, n_positions=36)
  for causal in (True, False):
    variables = numpy_reference.random_variables(0, causal=causal, **shapes)
    table = openai.table(ImageGPTConfig(causal=causal, **shapes))
    specs = {name: (array.shape, array.dtype) for name, array in variables.items()}
    leaves.check_specs(table, specs, "the reference")
    assert {part.name for leaf in table for part in leaf.parts} == set(variables)
