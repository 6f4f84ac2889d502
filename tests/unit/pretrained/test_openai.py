"""TensorFlow's files byte for byte, and OpenAI's variables: what doesn't fit is named."""

import os

import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained import formats, leaves, leveldb_table, openai
from igpt_jax.pretrained.tensor_bundle import Bundle, write_bundle
from support import golden_files, numpy_reference
from support.checkpoint_cases import (
  CONFIG,
  assert_same,
  edit_variables,
  random_params,
  write_openai,
)


@pytest.fixture
def checkpoint(tmp_path):
  return write_openai(tmp_path)


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


@pytest.mark.parametrize("target", ["pipe", "directory"])
def test_only_regular_files_are_opened(checkpoint, target):
  """A pipe would block for ever."""
  data = f"{checkpoint}.data-00000-of-00001"
  os.remove(data)
  os.mkfifo(data) if target == "pipe" else os.mkdir(data)
  with pytest.raises(UserError, match=r"regular file|Is a directory"):
    formats.load(checkpoint)


def test_openai_table_matches_the_reference_variables():
  shapes = dict(n_layer=3, n_head=2, n_embd=16, n_vocab=32, n_positions=36)
  for causal in (True, False):
    variables = numpy_reference.random_variables(0, causal=causal, **shapes)
    table = openai.table(ImageGPTConfig(causal=causal, **shapes))
    specs = {name: (array.shape, array.dtype) for name, array in variables.items()}
    leaves.check_specs(table, specs, "the reference")
    assert {part.name for leaf in table for part in leaf.parts} == set(variables)
