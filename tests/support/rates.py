"""Digits and models of several widths, to find which learning rate suits each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.training.objectives import make_objective
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from igpt_jax.training.state import make_state
from igpt_jax.training.step import make_train_step
from support import tiny

BASE_EMBD, BASE_LAYER, HEAD_SIZE = 64, 2, 16


@functools.cache
def digits() -> np.ndarray:
  """Digits of 8 × 8 in 17 grey levels, [1797, 64], in random order."""
  images = sklearn.datasets.load_digits().images.astype(np.uint16).reshape(-1, 64)
  return np.random.default_rng(0).permutation(images)


def config_of(parametrisation: str, n_embd: int, n_layer: int = BASE_LAYER) -> ImageGPTConfig:
  """A model with heads of one size; complete_p is relative to width 64 and two layers."""
  base = {"base_embd": BASE_EMBD, "base_layer": BASE_LAYER}
  return ImageGPTConfig(
    n_layer=n_layer, n_head=n_embd // HEAD_SIZE, n_embd=n_embd, n_vocab=17, n_positions=64,
    parametrisation=parametrisation, **(base if parametrisation == "complete_p" else {}),
  )  # fmt: skip


@functools.cache
def _programs(config: ImageGPTConfig, recipe: OptimizerConfig):
  """Returns the initial state's maker, and a step (state, batch, rate) for any learning rate."""
  optimizer, objective = make_optimizer(recipe), make_objective("autoregressive", 0.0)

  def step(state, batch, rate):
    def update(grads, opt_state, params=None):
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return jax.tree.map(lambda leaf: rate * leaf, updates), opt_state

    at_rate = optax.GradientTransformation(optimizer.init, update)
    return make_train_step(config, objective, at_rate, make_schedule(recipe))(state, batch)

  return lambda: make_state(config, optimizer, 0, tiny.mesh_of()), tiny.jit(step, donate_argnums=0)


def trained(config: ImageGPTConfig, rate: float, steps: int, batch_size: int, **recipe):
  """Returns the initial parameters, those after some steps on digits, and the losses of the steps."""
  recipe = OptimizerConfig(learning_rate=1.0, steps=steps, scale=config.scale, **recipe)
  make, step = _programs(config, recipe)
  state = make()
  before = jax.device_get(state.params)
  losses, images = [], digits()
  for at in range(steps):
    rows = np.arange(at * batch_size, (at + 1) * batch_size) % len(images)
    state, metrics = step(state, {"tokens": images[rows]}, jnp.float32(rate))
    losses.append(metrics["loss"])
  return before, jax.device_get(state.params), np.asarray(jax.device_get(losses))
