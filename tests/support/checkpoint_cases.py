"""Small checkpoints in every format, and ways to spoil them, for the tests of `pretrained`."""

import json

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from igpt_jax.model.image_gpt import abstract_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained import formats
from igpt_jax.pretrained.tensor_bundle import Bundle, write_bundle

CONFIG = ImageGPTConfig(n_layer=3, n_head=2, n_embd=16, n_vocab=32, n_positions=36)
BERT = ImageGPTConfig(n_layer=2, n_head=3, n_embd=24, n_vocab=40, n_positions=12, causal=False)
CLUSTERS = np.linspace(-1, 1, 3 * CONFIG.n_vocab, dtype=np.float32).reshape(-1, 3)


def random_params(config, dtype=np.float32):
  shapes = abstract_params(config)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), shapes)


def assert_same(found, expected):
  """Two parameter trees are equal bit for bit, dtypes included."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
    other = found
    for key in path:
      other = other[key.key]
    assert other.dtype == leaf.dtype, path
    np.testing.assert_array_equal(other, leaf, err_msg=str(path))


def write_openai(directory):
  """Prefix of a small OpenAI checkpoint of CONFIG."""
  prefix = directory / "model.ckpt-7"
  formats.save(prefix, "openai", CONFIG, random_params(CONFIG))
  return prefix


def write_huggingface(directory):
  """A small Hugging Face directory of CONFIG, with its palette."""
  path = directory / "hf"
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
  """Rewrites an OpenAI checkpoint after `change(variables)`."""
  with Bundle(prefix) as bundle:
    variables = {name: bundle.read(name) for name in bundle.entries}
  for file in prefix.parent.glob(prefix.name + ".*"):
    file.unlink()
  change(variables)
  write_bundle(prefix, variables.items())
