"""One start of a run on a TPU slice that isn't here, as far as its training step: compiled, and kept.

python -m support.tpu_start FOLDER BATCH DEPTH      # DEPTH frames deeper in the stack than at 0
"""

import sys

import jax
import jax.numpy as jnp

from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import compilation_cache, sharding
from igpt_jax.training import compilation
from igpt_jax.training.objectives import make_objective
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from igpt_jax.training.state import abstract_state, state_shardings
from igpt_jax.training.step import make_train_step
from support import tiny

# Heads of 64 and 256 tokens: the fused attention kernel is in the program, and what it says of itself.
MODEL = ImageGPTConfig(n_layer=2, n_head=2, n_embd=128, n_positions=256, dtype="bfloat16")


def start(batch: int) -> None:
  mesh = sharding.make_mesh(-1, 1, 1, devices=tiny.tpu_devices("v5e:4x4"))
  recipe = OptimizerConfig(learning_rate=1e-3, steps=10)
  tx, objective = make_optimizer(recipe), make_objective("autoregressive", 0.15)
  tokens = jax.ShapeDtypeStruct(
    (batch, MODEL.n_positions), jnp.uint16, sharding=sharding.sharding(mesh, "batch")
  )
  step = make_train_step(MODEL, objective, tx, make_schedule(recipe), 1)
  abstract, shardings = abstract_state(MODEL, tx), state_shardings(MODEL, tx, mesh)
  with jax.set_mesh(mesh):
    made = compilation.compile_step(step, abstract, shardings, {"tokens": tokens})
  assert "tpu_custom_call" in made.executable.as_text()


def deeper(batch: int, depth: int) -> None:
  """Starts from further down the stack, as a run that goes on may."""
  start(batch) if depth == 0 else deeper(batch, depth - 1)


if __name__ == "__main__":
  compilation_cache.use(sys.argv[1], workdir="")
  deeper(*map(int, sys.argv[2:]))
