"""The training step compiled ahead of its first use, and its model FLOPs."""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from igpt_jax import units
from igpt_jax.model.image_gpt import abstract_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import compilation_cache, hardware
from igpt_jax.parallel.hosts import say
from igpt_jax.training import muon
from igpt_jax.training.optimizer import OptimizerConfig
from igpt_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """Step that is compiled for one shape of batch, and refuses any other.

  Attributes:
    executable: jax' compiled program.
    seconds: time that compiling took, or reading it from the compilation cache.
    from_cache: True if it was read.
  """

  executable: jax.stages.Compiled
  seconds: float
  from_cache: bool = False

  def __call__(self, train_state, batch):
    return self.executable(train_state, batch)

  @property
  def took(self) -> str:
    """How long compiling took, in words."""
    read = " (read from the cache)" if self.from_cache else ""
    return f"compiled in {units.seconds(self.seconds)}{read}"

  @property
  def memory(self) -> str:
    """The memory that it needs on every device, in words."""
    analysis = self.executable.memory_analysis()
    if analysis is None:
      return "memory unknown"
    # Donated arguments are outputs too: they count once.
    held = units.memory(analysis.argument_size_in_bytes)
    return f"per device {held} held, {units.memory(analysis.temp_size_in_bytes)} to work in"

  @property
  def needed_bytes(self) -> int:
    """Bytes of memory that the program needs on every device; 0 if unknown."""
    analysis = self.executable.memory_analysis()
    if analysis is None:
      return 0
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


# Options of XLA for chips whose SparseCores can move data beside the cores that compute. By default weights are
# gathered and gradients summed while nothing else runs, or within one of XLA's own products, of which the
# kernels around attention (model/block_tpu.py) leave none in the loops over layers. Left to the SparseCores, and
# moved to the turn of the loop before or after their own, they run behind the kernels. (XL, which is too wide for
# these kernels, gains by it as well: docs/scale.md.)
_COLLECTIVES_ON_SPARSE_CORES = {
  **{
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
  },
  **{
    f"xla_tpu_enable_async_collective_fusion_fuse_{kind}": False
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
  },
  "xla_tpu_enable_ici_ag_pipelining": True,
  "xla_tpu_enable_ici_rs_pipelining": True,
}

# tpu7x' compiler would lay out 16-bit matrices in tiles of 16 rows, and kernels take tiles of 8: where XLA writes
# into a stack of all layers and a kernel reads it, the whole stack would be copied for every layer.
_TILES_OF_KERNELS = {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}


def step_options(kind: str) -> dict[str, bool]:
  """Returns the options of XLA's compiler with which a step is compiled for devices of this `device_kind`."""
  known = kind in hardware.CHIPS and hardware.has_wide_matrix_unit(kind)
  return {**_COLLECTIVES_ON_SPARSE_CORES, **_TILES_OF_KERNELS} if known else {}


def compile_step(
  train_step: Callable,
  abstract: TrainState,
  shardings: TrainState,
  batch: Any,
  options: dict[str, Any] | None = None,
) -> CompiledStep:
  """Compiles a step for exactly this state and batch; it donates the state and keeps its shardings.

  Args:
    train_step: a function (state, batch) -> (state, metrics).
    abstract: shapes of the state.
    shardings: those of its leaves.
    batch: arrays, or shapes with shardings.
    options: those of XLA's compiler that differ from its defaults, beside `step_options`.
  """
  jitted = jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(shardings, jax.tree.map(lambda x: x.sharding, batch)),
    out_shardings=(shardings, None),
  )
  (device, *_) = jax.tree.leaves(batch)[0].sharding.device_set
  options = {**step_options(device.device_kind), **(options or {})}
  return timed(lambda: _compile(jitted.lower(abstract, batch), options))


def _compile(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
  """Compiles with these options or, if the compiler that is installed lacks one, with none of them."""
  try:
    return lowered.compile(options)
  except jax.errors.JaxRuntimeError as error:
    unknown = [name for name in options if name in str(error)]
    if not unknown:
      raise
    say(
      f"{unknown[0]}: not an option of this machine's compiler; compiling without, which may be slower"
    )
    return lowered.compile()


def timed(compile_it: Callable[[], jax.stages.Compiled]) -> CompiledStep:
  """Compiles by calling `compile_it`, and takes the time of that."""
  began, programs = time.monotonic(), compilation_cache.Tally()
  executable = compile_it()
  return CompiledStep(executable, time.monotonic() - began, programs.all_read)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_of(number: str, unit: str) -> int:
  """Returns an amount of memory that the compiler prints, such as ("16.98", "G"), in bytes."""
  return round(float(number) * _UNITS[unit])


def refused_bytes(message: str) -> int | None:
  """Returns the bytes that a program needs by the TPU compiler's error that it doesn't fit; None: another error."""
  # It says so before it schedules a program, from its sizes alone, or at the end.
  needed = re.search(
    r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM", message
  ) or re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
  return None if needed is None else bytes_of(needed[1], needed[2])


def flops_per_image(config: ImageGPTConfig) -> float:
  """Model FLOPs of one image's training step, forward and backward, nothing recomputed.

  6 per matmul parameter and token, and attention's 12·T·d per layer and token (scores and values,
  forward and backward), halved when causal: what a kernel that skips the masked half must do.
  """
  spec = config.tokens
  heads = spec.codes * config.n_embd**2 if spec.codes > 1 else 0
  matmul_parameters = config.n_layer * 12 * config.n_embd**2 + heads + spec.rows * config.n_embd
  attention = config.n_layer * 12 * config.n_positions * config.n_embd
  return config.n_positions * (6 * matmul_parameters + attention * (0.5 if config.causal else 1.0))


def optimizer_flops(model: ImageGPTConfig, optimizer: OptimizerConfig) -> float:
  """FLOPs of the matrix products of one update; 0 for Adam, whose elementwise work isn't counted."""
  return muon.flops(abstract_params(model)) if optimizer.optimizer == "muon" else 0.0


def flops_per_step(model: ImageGPTConfig, optimizer: OptimizerConfig, batch_size: int) -> float:
  """Model FLOPs of a batch, and the optimizer's own."""
  return flops_per_image(model) * batch_size + optimizer_flops(model, optimizer)
