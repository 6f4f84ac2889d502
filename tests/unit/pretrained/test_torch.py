"""pytorch_model.bin, the pickles of older Hugging Face directories, through torch's safe loader.

Optional: needs torch, which the package itself doesn't.
"""

import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from igpt_jax.errors import UserError
from igpt_jax.pretrained import formats
from support.checkpoint_cases import CONFIG, assert_same, random_params, write_huggingface
from support.fuzzing import MUTATIONS, Canary, bounded_tracing, mutate_bytes, outcome

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def directory(tmp_path):
  """A directory without weights."""
  path = write_huggingface(tmp_path)
  os.rename(path / "model.safetensors", tmp_path / "weights")
  return path


@pytest.fixture
def state(directory):
  weights = load_file(directory.parent / "weights")
  return {name: torch.from_numpy(array) for name, array in weights.items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_old_pickle_through_torch(directory, state, zipped, dtype):
  state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
  torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
  loaded = formats.load(directory)
  expected = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(CONFIG))
  assert_same(loaded.params, expected)


def test_an_old_pickle_that_runs_code_is_refused(directory, state, tmp_path):
  torch.save(state | {"x": Canary(tmp_path / "ran")}, directory / "pytorch_model.bin")
  with pytest.raises(UserError, match="weights"):
    formats.load(directory)
  assert not (tmp_path / "ran").exists()


def test_an_old_pickle_that_claims_too_much_is_refused(directory, state):
  state["transformer.wpe.weight"] = torch.zeros(1, 1).expand(1 << 40, 8)
  torch.save(state, directory / "pytorch_model.bin")
  with pytest.raises(UserError, match="contiguous tensors of the file's size"):
    formats.load(directory)


def test_mutations_of_an_old_pickle(directory, state):
  file = directory / "pytorch_model.bin"
  torch.save(state, file)
  original = file.read_bytes()
  rng = np.random.default_rng(3)
  refused = 0
  for _ in range(MUTATIONS):
    file.write_bytes(mutate_bytes(rng, original))
    with bounded_tracing():
      refused += outcome(directory, None, exact=False) is None
  assert refused > MUTATIONS / 4
