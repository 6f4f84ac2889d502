"""Job `compile` as a person runs it, a small model, and the mark of tests that need the TPU compiler."""

import importlib.util
import os
import subprocess
import sys

import pytest

from support.paths import ROOT, TESTS

NEEDS_LIBTPU = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'jax[tpu]'"
)

SMALL = (
  "--config.model.n_layer=3", "--config.model.n_head=4", "--config.model.n_embd=256",
  "--config.data.resolution=16", "--config.train.batch_size=32", "--config.train.steps=1000", "--config.train.warmup_steps=0",
  "--config.sample.samples=8",
)  # fmt: skip


def call(workdir, *overrides, config="imagenet32_s"):
  return subprocess.run(
    [
      sys.executable, "-m", "igpt_jax.main", f"--config=configs/{config}.py",
      f"--workdir={workdir}", "--config.job=compile", *overrides,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )  # fmt: skip


def run_support(module, *arguments, cwd=ROOT, **environment):
  """A module of tests/support in a process of its own, which loads the TPU's compiler as it likes."""
  paths = os.pathsep.join((str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")))
  done = subprocess.run(
    [sys.executable, "-m", f"support.{module}", *map(str, arguments)],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": paths, **environment},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done
