"""A whole checkpoint that nobody trained, for tests of what is done with one."""

import dataclasses

import jax
import numpy as np

from igpt_jax import checkpoint
from igpt_jax.checkpoint import CheckpointInfo
from support.tiny import make_config, random_params


def write(
  path, *, palette: bool = True, causal: bool = True, resolution: int = 4, seed: int = 0, **options
):
  """Writes one, with options of the model, into `path`, which doesn't exist; returns it as a string."""
  config = make_config(n_positions=resolution**2, n_vocab=11, causal=causal, **options)
  params = random_params(config, seed)
  if not causal:
    params = {name: leaf for name, leaf in params.items() if name != "sos"}
  levels = np.random.default_rng(0).integers(0, 256, (11, 3))
  centers = (levels / 127.5 - 1).astype(np.float32)
  run = {
    "model": dataclasses.asdict(config),
    "objective": "autoregressive" if causal else "masked",
    "mask_probability": 0.15,
    "resolution": resolution,
    "config": {"data": {"augment": "none"}},
  }
  found = CheckpointInfo("", 7, config, centers if palette else None, run)
  checkpoint.save_params(str(path), jax.tree.map(np.asarray, params), found)
  return str(path)
