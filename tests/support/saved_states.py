"""Training states with random numbers, saved as a run saves them."""

import dataclasses

import numpy as np

from igpt_jax.checkpoint import Checkpoints
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer
from igpt_jax.training.state import TrainState, abstract_state, state_shardings
from support import tiny

CONFIG = tiny.make_config()


OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, steps=10))


ABSTRACT = abstract_state(CONFIG, OPTIMIZER)


PALETTE = np.random.default_rng(0).uniform(-1, 1, (11, 3)).astype(np.float32)


def make_run(**changes):
  return {"model": dataclasses.asdict(CONFIG), "objective": "autoregressive", **changes}


def random_state(step, shape=(1, 1, 1)) -> TrainState:
  return tiny.random_state(ABSTRACT, step, state_shardings(CONFIG, OPTIMIZER, tiny.mesh_of(shape)))


def save(workdir, *states, palette=PALETTE, keep=3, keep_every=0, **run):
  checkpoints = Checkpoints(str(workdir), keep=keep, keep_every=keep_every)
  for state in states:
    checkpoints.save(state, palette=palette, run=make_run(**run))
    checkpoints.wait()
  checkpoints.close()
