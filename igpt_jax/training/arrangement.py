"""Arrangement of a model over a slice's devices, by rule: what splits its weights, and what is recomputed.

The rule sums up forecasts of the published models (docs/scale.md, "Which mesh"). `prediction/plan.py` compiles
several arrangements and compares them instead. Memory is by arithmetic in both.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, sharding

_STATE = 18  # bytes per parameter: itself, two moments, a gradient (float32), a bfloat16 copy
# Bytes kept per layer, position and channel in bfloat16, measured on compiled programs.
_KEPT = {"none": 72.0, "names": 19.0, "full": 2.2}
_HIDDEN = 8.0  # of "names": the MLP's hidden units, which aren't kept for 256 × 256 matrix units
_WORKING = 60.0  # bytes per position and channel of the layer that is being computed
# Bytes per D² of whole weights and gradients that are on their way, measured on a compiled program of XL:
# collectives on SparseCores run a layer ahead of the one that is computed, or behind it (compilation.py).
_ON_THEIR_WAY = 160.0
_STATE_SHARE = 1 / 3  # largest share of a device's memory for a training state, beside activations
# And for a step with "names": the arithmetic may be a little below the compiler's figure.
_STEP_SHARE = 0.95

_SMALL = 50e6  # parameters; of smaller models nothing was forecast
FEW = 8  # devices: splitting over all of so few takes about 1% longer at most than over half
_MOST = 32  # parts of a matrix
_ROWS = 32  # a part's rows are a multiple: others are gathered by a sum of whole matrices

_HELD = 4  # bytes per parameter in sampling: bfloat16, and each layer taken out of the stack
_WEIGHTS_SHARE = 0.7  # largest share of a device's memory for weights in sampling
_CACHE_SHARE = 0.9  # and for weights and cache together
_GPU_SHARE = 0.75  # of a GPU's memory that XLA takes unless told otherwise


def state_bytes(model: ImageGPTConfig, shards: int) -> float:
  """Bytes per device of a training state, with gradients, of which each device has one of `shards` parts."""
  return _STATE * count_params(model) / shards


def step_bytes(
  model: ImageGPTConfig, images: int, kind: str, shards: int, tensor: int = 1
) -> float:
  """Bytes per device of a training step, by arithmetic: within about a fifth of the compiler's figure.

  Args:
    model: with the remat to count.
    images: of a part of the batch that is computed at a time (`sharding.batch_size_per_shard`).
    kind: the devices' `device_kind`.
    shards: parts that the state is split in.
    tensor: devices that compute an image together.
  """
  kept = _KEPT.get(model.remat, _KEPT["full"])
  whole = 0.0
  if hardware.has_wide_matrix_unit(kind):
    whole = _ON_THEIR_WAY * model.n_embd**2 / tensor
    kept -= _HIDDEN if model.remat == "names" else 0
  item = jnp.dtype(model.dtype).itemsize / 2
  activations = item * (model.n_layer * kept + _WORKING) * model.n_embd / tensor
  logits = 10 * model.tokens.rows
  return state_bytes(model, shards) + whole + images * model.n_positions * (activations + logits)


def fsdp(
  model: ImageGPTConfig,
  batch_size: int,
  devices: int,
  kind: str,
  tensor: int = 1,
  slices: int = 1,
  remat: str = "",
) -> int:
  """Returns the number of a slice's devices that split each matrix of a model.

  On TPUs half of them, or all of a few or where there are several slices, up to 32, even where the state
  would fit without: a device then receives its part of the summed gradients alone, and updates that. On
  other accelerators, and for models smaller than the published ones, the fewest with which a step fits, else
  the fewest that hold the state. On CPUs 1.

  Args:
    model: the model, with any remat.
    batch_size: images that all devices compute at a time; 0: no step is to fit, the state alone.
    devices: devices of a slice.
    kind: the devices' `device_kind`.
    tensor: devices that compute an image together; -1: all that are left.
    slices: number of slices, each of which holds a whole state.
    remat: that of the step that is to fit; "": names.
  """
  if kind == "cpu":
    return 1
  model, tensor = dataclasses.replace(model, remat=remat or "names"), max(tensor, 1)
  groups = devices // tensor  # of devices with different images
  powers = [2**n for n in range(groups.bit_length())]
  possible = [
    n for n in powers if groups % n == 0 and model.n_embd % (_ROWS * tensor * n) == 0
  ] or [1]
  images, usable = -(-batch_size // max(groups * slices, 1)), usable_bytes(kind)

  def holds(n: int) -> bool:
    return state_bytes(model, n * tensor) <= _STATE_SHARE * usable

  def fits(n: int) -> bool:
    return holds(n) and step_bytes(model, images, kind, n * tensor, tensor) <= _STEP_SHARE * usable

  least = _first([n for n in possible if fits(n)] or possible, holds)
  if not kind.startswith("TPU") or count_params(model) < _SMALL:
    return least
  most = min(groups if groups <= FEW or slices > 1 else groups // 2, _MOST)
  return max([least, *(n for n in possible if n <= most)])


def remat(model: ImageGPTConfig, images: int, mesh: Mesh) -> str:
  """Returns the policy that trains fastest of those that should fit: "names", or else "full".

  Args:
    model: the model, with any remat.
    images: as in `step_bytes`.
    mesh: the mesh of state and batches.
  """
  named = dataclasses.replace(model, remat="names")
  kind = mesh.devices.flat[0].device_kind
  tensor = mesh.size // sharding.batch_shards(mesh)
  needed = step_bytes(named, images, kind, sharding.weight_shards(mesh), tensor)
  return "names" if needed <= _STEP_SHARE * usable_bytes(kind) else "full"


def tensor_for_sampling(
  model: ImageGPTConfig, devices: int, usable: float, cache_bytes: float = 0.0
) -> int:
  """Returns the number of a slice's devices that split the weights in sampling: as few as hold them.

  Every pixel reads all weights, which fsdp would gather for each.

  Args:
    model: the model to sample from.
    devices: of a slice.
    usable: bytes of a device that programs can use.
    cache_bytes: a device's part of the cache of keys and values.
  """
  possible = [n for n in range(1, devices + 1) if devices % n == 0 and model.n_head % n == 0]
  most = min(_WEIGHTS_SHARE * usable, _CACHE_SHARE * usable - cache_bytes)
  return _first(possible, lambda n: _HELD * count_params(model) / n < most)


def usable_bytes(kind: str) -> float:
  """Bytes of an accelerator that programs can use, by its `device_kind`; if that is unknown, the least of all."""
  chip = hardware.CHIPS.get(kind)
  published = chip.hbm_bytes if chip else min(chip.hbm_bytes for chip in hardware.CHIPS.values())
  return published if kind.startswith("TPU") else _GPU_SHARE * published


def _first(possible: Sequence[int], fits: Callable[[int], bool]) -> int:
  """Returns the first number that fits, or the last."""
  return next((n for n in possible if fits(n)), possible[-1])
