"""The quickstart, made small enough for a test, and the command as a person runs it."""

import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.config.read import settings_of
from igpt_jax.parallel.sharding import make_mesh
from igpt_jax.runner import loop
from support.paths import ROOT


def load_config(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def shrunk(**overrides):
  """Settings of the quickstart, made small enough for a test; "part.field" or part__field sets others."""
  config = load_config("quickstart")
  config.model.n_layer, config.model.n_head, config.model.n_embd = 2, 2, 16
  config.train.batch_size = 16
  config.train.steps = 12
  config.train.warmup_steps = 2
  config.train.log_every = 2
  config.train.eval_every = 6
  config.train.checkpoint_every = 4
  config.train.eval_images = 32
  config.train.progress_images = 0
  config.sample.samples, config.sample.completions, config.sample.per_image = 4, 2, 2
  config.features.images = 300
  config.lowdata.labels_per_class, config.lowdata.trials = (2, 5), 2
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in overrides.items()}
  )
  return settings_of(config)


def params_of(workdir, step=None):
  path = workdir if step is None else f"{workdir}/checkpoints/{step}"
  mesh = make_mesh(devices=jax.devices()[:1])
  return jax.tree.map(np.asarray, checkpoint.load_pretrained(str(path), mesh).params)


def assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
  """Has a training run asked to stop when it has made so many steps."""
  asked = loop.StopSignal.asked

  def at(self, at_step):
    if at_step >= step:
      self.requested = "SIGTERM"
    return asked(self, at_step)

  patch.setattr(loop.StopSignal, "asked", at)


def command(config, workdir, *overrides):
  return [
    sys.executable,
    "-m",
    "igpt_jax.main",
    f"--config={config}",
    f"--workdir={workdir}",
    *overrides,
  ]


def call(config, workdir, *overrides, timeout=300, **environment):
  return subprocess.run(
    command(config, workdir, *overrides),
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
