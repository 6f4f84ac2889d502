"""Restarts of a TPU program: every start of every host asks the compilation cache by one key."""

import pytest

from support.tpu_job import NEEDS_LIBTPU, run_support

pytestmark = [pytest.mark.tpu_compile, NEEDS_LIBTPU]


def keys_after(folder, place, batch=16, depth=0, hash_seed="0"):
  """The training steps that are kept once a process has started in `place`, by their keys."""
  place.mkdir()
  arguments = (folder, batch, depth)
  done = run_support("tpu_start", *arguments, cwd=place, PYTHONHASHSEED=hash_seed)
  return {path.name for path in folder.glob("*/jit_train_step-*-cache")}, done.stderr


def test_a_restart_finds_its_training_step(tmp_path):
  """Compiles nothing, where a chip is there to load it: without one, a program is found and can't be loaded.

  Another process, folder, order of Python's sets and depth of the stack: nothing of these is in the key,
  though a kernel's own code says where it was written. Another batch is another program.
  """
  folder = tmp_path / "compiled"
  first, _ = keys_after(folder, tmp_path / "first")
  assert len(first) == 1
  again, said = keys_after(folder, tmp_path / "again", depth=7, hash_seed="1")
  assert again == first and "PjRtCompiler must be constructed with a Client" in said
  other, said = keys_after(folder, tmp_path / "other", batch=32)
  assert len(other) == 2 and "must be constructed with a Client" not in said
