"""Training steps compiled for TPU slices that aren't here, as `pretrain` and `compile` make them."""

import jax
import jax.numpy as jnp

from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import sharding
from igpt_jax.training import compilation
from igpt_jax.training.objectives import make_objective
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from igpt_jax.training.state import abstract_state, state_shardings
from igpt_jax.training.step import make_train_step
from support import tiny


def step_text(
  model: ImageGPTConfig,
  topology: str,
  shape: tuple[int, int, int],
  *,
  slices: int = 1,
  accumulate: int = 1,
  optimizer: str = "adam",
  batch: int = 0,
) -> str:
  """Returns the compiled step's text; the batch is two images a shard and part, if none is given."""
  recipe = OptimizerConfig(learning_rate=1e-3, steps=10, optimizer=optimizer)
  mesh = sharding.make_mesh(*shape, slices=slices, devices=tiny.tpu_devices(topology, slices))
  tx, objective = make_optimizer(recipe), make_objective("autoregressive", 0.15)
  step = make_train_step(model, objective, tx, make_schedule(recipe), accumulate)
  tokens = jax.ShapeDtypeStruct(
    (batch or 2 * accumulate * sharding.batch_shards(mesh), model.n_positions),
    jnp.uint16,
    sharding=sharding.sharding(mesh, "batch"),
  )
  abstract, shardings = abstract_state(model, tx), state_shardings(model, tx, mesh)
  with jax.set_mesh(mesh):
    made = compilation.compile_step(step, abstract, shardings, {"tokens": tokens})
  return made.executable.as_text()
