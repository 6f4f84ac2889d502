"""The training step compiled ahead of its first use, and what it must compute."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from igpt_jax.model.image_gpt import ImageGPTConfig
from igpt_jax.parallel import hardware
from igpt_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """A step for one shape of batch: a second one can't slip in, it would be refused.

  Attributes:
    executable: jax's compiled program.
    seconds: that compiling took.
  """

  executable: jax.stages.Compiled
  seconds: float

  def __call__(self, train_state, batch):
    return self.executable(train_state, batch)

  @property
  def memory(self) -> str:
    """What it needs of each device, in words."""
    analysis = self.executable.memory_analysis()
    if analysis is None:
      return "memory unknown"
    # Donated arguments are outputs too: they count once.
    held = analysis.argument_size_in_bytes / 2**30
    worked = analysis.temp_size_in_bytes / 2**30
    return f"per device {held:.2f} GiB held, {worked:.2f} GiB to work in"

  @property
  def needed_bytes(self) -> int:
    """Bytes of memory that the program needs of each device; 0 if unknown."""
    analysis = self.executable.memory_analysis()
    if analysis is None:
      return 0
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def compile_step(
  train_step: Callable,
  abstract: TrainState,
  shardings: TrainState,
  batch: Any,
  options: dict[str, Any] | None = None,
) -> CompiledStep:
  """Compiles for exactly this state and batch, the state donated and left where it lies.

  Args:
    train_step: of `step.make_train_step`.
    abstract: shapes of the state.
    shardings: of its leaves.
    batch: arrays, or shapes with shardings.
    options: of XLA's compiler, beyond its own defaults.
  """
  jitted = jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(shardings, jax.tree.map(lambda x: x.sharding, batch)),
    out_shardings=(shardings, None),
  )
  return timed(lambda: jitted.lower(abstract, batch).compile(options))


def timed(compile_it: Callable[[], jax.stages.Compiled]) -> CompiledStep:
  """Compiles, with the time that took."""
  began = time.monotonic()
  executable = compile_it()
  return CompiledStep(executable, time.monotonic() - began)


def flops_per_image(config: ImageGPTConfig) -> float:
  """Model FLOPs of one image's training step, forward and backward, nothing recomputed."""
  return hardware.model_flops_per_image(
    n_layer=config.n_layer,
    n_embd=config.n_embd,
    n_vocab=config.n_vocab,
    n_positions=config.n_positions,
    causal=config.causal,
  )
