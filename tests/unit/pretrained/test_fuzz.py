"""Damaged and hostile checkpoints: a clear error, in bounded memory, and nothing else.

Each kind of file is mutated 100 times, byte by byte and, with checksums made right again, in what
it means. Whatever isn't a `UserError` must be a checkpoint of the right shapes.
"""

import os
import pickle
import resource
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

from igpt_jax.model.image_gpt import abstract_params
from igpt_jax.pretrained import formats, huggingface
from support.fuzzing import (
  CONFIG,
  MAX_PROCESS_BYTES,
  MUTATIONS,
  Canary,
  bounded,
  bounded_tracing,
  mutate_bytes,
  mutate_index,
  mutate_json,
  mutate_npy,
  mutate_safetensors,
  outcome,
)

MUTATIONS_SLOW = 1000


# kind -> (what is loaded, the file that is mutated, how)
KINDS = {
  "index bytes": ("openai/model.ckpt-1", "openai/model.ckpt-1.index", mutate_bytes),
  "index content": ("openai/model.ckpt-1", "openai/model.ckpt-1.index", mutate_index),
  "data": ("openai/model.ckpt-1", "openai/model.ckpt-1.data-00000-of-00001", mutate_bytes),
  "kmeans_centers.npy": ("openai/model.ckpt-1", "openai/kmeans_centers.npy", mutate_npy),
  "safetensors": ("hf", "hf/model.safetensors", mutate_safetensors),
  "config.json": ("hf", "hf/config.json", mutate_json),
  "preprocessor_config.json": ("hf", "hf/preprocessor_config.json", mutate_json),
  "safetensors index": ("cut", "cut/model.safetensors.index.json", mutate_json),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
  """Every format of one small model, and its parameters."""
  root = tmp_path_factory.mktemp("originals")
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract_params(CONFIG)
  )
  clusters = np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3)
  (root / "openai").mkdir()
  formats.save(root / "openai/model.ckpt-1", "openai", CONFIG, params, clusters=clusters)
  formats.save(root / "hf", "huggingface", CONFIG, params, clusters=clusters)
  huggingface.write_directory(root / "cut", CONFIG, params, max_shard_bytes=3000)
  return root, params


def fuzz(kind, originals, directory, count, seed):
  """Loads `count` mutations; returns how many were refused."""
  root, params = originals
  target, file, mutate = KINDS[kind]
  shutil.copytree(root / file.split("/")[0], directory / file.split("/")[0])
  original = (root / file).read_bytes()
  names = sorted(os.listdir(directory / file.split("/")[0]))
  rng = np.random.default_rng([seed, sorted(KINDS).index(kind)])
  refused = 0
  rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  tracemalloc.start()
  try:
    for i in range(count):
      mutated = mutate(rng, original)
      (directory / file).write_bytes(mutated)
      # Checksums cover the index's bytes and the weights: either they are right or it is refused.
      exact = kind in ("index bytes", "data")
      try:
        with bounded():
          refused += outcome(directory / target, params, exact) is None
      except BaseException:
        keep = directory / "offending"
        keep.write_bytes(mutated)
        print(f"mutation {i} of {kind!r}, seed {seed}, is in {keep}")
        raise
      assert sorted(os.listdir(directory / file.split("/")[0])) == names
  finally:
    tracemalloc.stop()
  grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss)
  assert grown < MAX_PROCESS_BYTES
  return refused


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind, originals, tmp_path):
  refused = fuzz(kind, originals, tmp_path, MUTATIONS, seed=0)
  assert refused > MUTATIONS / 4, "the mutations hardly damage anything"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_more_mutations(kind, originals, tmp_path):
  assert fuzz(kind, originals, tmp_path, MUTATIONS_SLOW, seed=1) > MUTATIONS_SLOW / 4


@pytest.mark.parametrize("file", sorted({file for _, file, _ in KINDS.values()}))
def test_a_pickle_in_disguise_is_not_run(file, originals, tmp_path):
  root, params = originals
  folder = file.split("/")[0]
  shutil.copytree(root / folder, tmp_path / folder)
  (tmp_path / file).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
  pickle.loads((tmp_path / file).read_bytes())
  os.rmdir(tmp_path / "ran")  # the canary does sing
  with bounded_tracing():
    assert (
      outcome(
        tmp_path / ("openai/model.ckpt-1" if folder == "openai" else folder), params, exact=False
      )
      is None
    )
  assert not (tmp_path / "ran").exists()


def test_an_object_array_is_not_run(originals, tmp_path):
  root, params = originals
  shutil.copytree(root / "openai", tmp_path / "openai")
  array = np.empty(1, object)
  array[0] = Canary(tmp_path / "ran")
  np.save(tmp_path / "openai/kmeans_centers.npy", array, allow_pickle=True)
  with bounded_tracing():
    assert outcome(tmp_path / "openai/model.ckpt-1", params, exact=False) is None
  assert not (tmp_path / "ran").exists()
