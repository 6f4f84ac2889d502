"""What bfloat16, the default on accelerators, may not change: gradients, and where training goes.

Products of bfloat16 numbers are as exact as these are (a relative 2^-8) while their sums are made in
float32. A sum made in bfloat16 stalls once it's 2^8 times what is added: tokens of one colour occur
that often in every batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.model.image_gpt import bind
from igpt_jax.parallel import sharding
from igpt_jax.training.objectives import make_objective, per_image
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from igpt_jax.training.state import make_state
from igpt_jax.training.step import make_train_step
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 0.02  # of each leaf's norm
BATCH = 64
FREQUENT = 5  # the colour of 60% of the pixels


def images(config, batch: int, seed: int = 0) -> np.ndarray:
  """Tokens of which one colour is most, as the background of photographs and digits is."""
  background = np.random.default_rng(seed).random((batch, config.n_positions)) < 0.6
  return np.where(background, FREQUENT, tiny.random_tokens(config, batch, seed)).astype(np.int32)


def gradients(config, mesh, tokens):
  """Gradients of the training loss, by leaf."""
  objective = make_objective("autoregressive" if config.causal else "masked", 0.15)

  def loss(params, tokens):
    keys = jax.random.split(jax.random.key(0), len(tokens))
    return jnp.mean(per_image(*objective(bind(config, params), tokens, keys)))

  with jax.set_mesh(mesh):
    found = tiny.jit(jax.grad(loss))(tiny.random_params(config), sharding.put_global(tokens, mesh))
  return tiny.leaf_names(jax.device_get(found))


def relative(found, expected) -> float:
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bert"])
@pytest.mark.parametrize(
  "shape, changes",
  [
    ((1, 1, 1), {}),
    ((1, 8, 1), {}),
    ((8, 1, 1), {}),
    ((2, 2, 2), {}),
    pytest.param(
      (1, 1, 1), {"attention": "tpu_interpret", "remat": "names"}, marks=pytest.mark.slow
    ),
    ((1, 8, 1), {"attention": "tpu_interpret", "remat": "names"}),
  ],
  ids=["one", "fsdp", "data", "all", "tpu", "tpu fsdp"],
)
def test_each_gradient_is_near_float32s(causal, shape, changes):
  """By the norm of each leaf, and of the most frequent colour's row of the tables.

  10,000 pixels of a batch are of one colour.
  """
  full = tiny.make_config(
    n_layer=2, n_head=2, n_embd=64, n_positions=256, n_vocab=16, causal=causal, attention="xla"
  )
  half = dataclasses.replace(full, dtype="bfloat16", **changes)
  tokens = images(full, BATCH)
  expected = expected_gradients(full)
  for name, leaf in gradients(half, tiny.mesh_of(shape), tokens).items():
    assert leaf.dtype == np.float32, name
    assert relative(leaf, expected[name]) < TOLERANCE, name
    if name in ("wte", "wtet"):
      assert relative(leaf[FREQUENT], expected[name][FREQUENT]) < TOLERANCE, name


@functools.cache
def expected_gradients(config):
  return gradients(config, tiny.mesh_of(), images(config, BATCH))


def test_weight_gradients_are_summed_over_devices_in_float32():
  """Eight hosts' shares of one product, each rounded to bfloat16 first, would add up their errors."""
  config = tiny.make_config(dtype="bfloat16", n_embd=32)
  mesh = tiny.mesh_of((4, 2, 1))
  objective = make_objective("autoregressive")

  def loss(params, tokens):
    return jnp.mean(per_image(*objective(bind(config, params), tokens, None)))

  with jax.set_mesh(mesh):
    tokens = sharding.put_global(images(config, 8), mesh)
    program = str(jax.make_jaxpr(jax.grad(loss))(tiny.random_params(config), tokens))
  sums = [line for line in program.splitlines() if "psum" in line or "reduce_scatter" in line]
  assert sums and not [line for line in sums if "bf16" in line]


@pytest.mark.slow
def test_300_steps_go_where_float32s_go():
  """Loss curves of one start and one data order stay together."""
  recipe = OptimizerConfig(learning_rate=3e-3, steps=300, warmup_steps=20)
  optimizer, schedule = make_optimizer(recipe), make_schedule(recipe)
  mesh = tiny.mesh_of()
  curves = {}
  for dtype in ("float32", "bfloat16"):
    config = tiny.make_config(dtype=dtype)
    step = tiny.jit(
      make_train_step(config, make_objective("autoregressive"), optimizer, schedule),
      donate_argnums=0,
    )
    state = make_state(config, optimizer, 0, mesh)
    losses = []
    with jax.set_mesh(mesh):
      for at in range(recipe.steps):
        state, metrics = step(state, {"tokens": striped(config, BATCH, at)})
        losses.append(metrics["loss"])
    curves[dtype] = np.asarray(jax.device_get(losses))
  full, half = curves["float32"], curves["bfloat16"]
  assert full[-20:].mean() < full[:20].mean() - 0.5  # something is learned
  assert np.abs(full - half).max() < 0.05
  assert abs(full[-50:].mean() - half[-50:].mean()) < 0.01


def striped(config, batch: int, seed: int) -> np.ndarray:
  """Images on one background with a stripe of one colour: something that can be learned."""
  rng = np.random.default_rng(seed)
  side = round(config.n_positions**0.5)
  colours, rows = rng.integers(config.n_vocab, size=batch), rng.integers(side, size=batch)
  tokens = np.full((batch, side, side), FREQUENT, np.int32)
  tokens[np.arange(batch), rows] = colours[:, None]
  return tokens.reshape(batch, -1)
