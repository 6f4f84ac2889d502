"""Checkpoints of a one-layer model with a classifier, for tests that damage their files."""

import dataclasses

import jax
import numpy as np

from igpt_jax.checkpoint import Checkpoints
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer
from igpt_jax.training.state import abstract_state, state_shardings
from support import tiny

CONFIG = tiny.make_config(n_layer=1)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, steps=10))
CLASSES = ("cat", "dog", "owl")
ABSTRACT = abstract_state(CONFIG, OPTIMIZER, len(CLASSES))
PALETTE = np.random.default_rng(0).uniform(-1, 1, (11, 3)).astype(np.float32)


def shardings():
  return state_shardings(CONFIG, OPTIMIZER, tiny.mesh_of(), len(CLASSES))


def random_state(step):
  return tiny.random_state(ABSTRACT, step, shardings())


def make_run(step):
  return {
    "model": dataclasses.asdict(CONFIG),
    "classes": list(CLASSES),
    "data": {"next_index": 16 * step, "seed": 0},
    "elapsed_seconds": 12.5,
  }


def write(workdir, *steps):
  checkpoints = Checkpoints(str(workdir), keep_best="accuracy")
  for step in steps:
    checkpoints.save(
      random_state(step), palette=PALETTE, run=make_run(step), scores={"accuracy": 0.5}
    )
    checkpoints.wait()
  checkpoints.close()


def same(found, expected) -> bool:
  """Bit for bit."""
  ours, theirs = jax.tree.leaves(found), jax.tree.leaves(expected)
  return len(ours) == len(theirs) and all(
    a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for a, b in zip(ours, theirs, strict=True)
  )
