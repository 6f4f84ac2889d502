"""Arrangement of a model over a slice's devices, by rule: what splits its weights, and what is recomputed.

The rule sums up forecasts of the published models (docs/scale.md, "Which mesh"). `prediction/plan.py` compiles
several arrangements and compares them instead. Memory is by arithmetic in both.
"""

import dataclasses
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from igpt_jax.model.attention import tpu
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, sharding

_STATE = 18  # bytes per parameter: itself, two moments, a gradient (float32), a bfloat16 copy
# Bytes kept per layer, position and channel of bfloat16, measured on compiled programs.
_KEPT = {"none": 72.0, "names": 19.0, "full": 2.2}
_HIDDEN = 8.0  # of "names": the MLP's hidden units, which 256 × 256 matrix units recompute
_WORKING = 60.0  # bytes per position and channel of the layer that is being computed
_STATE_SHARE = 1 / 3  # largest share of a device's memory for a training state, beside activations
_STEP_SHARE = (
  0.95  # and for a step with "names": the arithmetic may be a little below the compiler's figure
)

_SMALL = 50e6  # parameters; of smaller models nothing was forecast
_FEW = 8  # devices: with so many, splitting over all takes no more than 1% longer than over half
_MOST = 32  # parts of a matrix
_ROWS = 32  # a part's rows are a multiple: others are gathered by a sum of whole matrices

_HELD = 4  # bytes per parameter in sampling: bfloat16, and each layer taken out of the stack
_WEIGHTS_SHARE = 0.7  # largest share of a device's memory for weights in sampling
_CACHE_SHARE = 0.9  # and for weights and cache together
_GPU_SHARE = 0.75  # of a GPU's memory that XLA takes unless told otherwise


def state_bytes(model: ImageGPTConfig, mesh: Mesh) -> float:
  """Bytes per device of a training state, with gradients."""
  return _STATE * count_params(model) / sharding.weight_shards(mesh)


def step_bytes(model: ImageGPTConfig, images: int, mesh: Mesh) -> float:
  """Bytes per device of a training step, by arithmetic: within about a fifth of the compiler's figure.

  Args:
    model: with the remat to count.
    images: of a part of the batch that is computed at a time (`sharding.batch_size_per_shard`).
    mesh: the mesh of state and batches.
  """
  kept = _KEPT.get(model.remat, _KEPT["full"])
  if model.remat == "names" and tpu.has_wide_matrix_unit(_kind(mesh)):
    kept -= _HIDDEN
  tensor = mesh.size // sharding.batch_shards(mesh)
  activations = (model.n_layer * kept + _WORKING) * model.n_embd / tensor
  logits = 10 * model.tokens.rows
  return state_bytes(model, mesh) + images * model.n_positions * (activations + logits)


def fsdp(model: ImageGPTConfig, devices: int, kind: str, tensor: int = 1, slices: int = 1) -> int:
  """Returns the number of a slice's devices that split each matrix of a model.

  On TPUs half of them, or all of a few or where there are several slices, up to 32, even where the state
  would fit without: a device then receives its part of the summed gradients alone, and updates that. On
  other accelerators, and for models smaller than the published ones, as few as hold the state. On CPUs 1.

  Args:
    model: the model.
    devices: groups of devices of a slice that compute an image together.
    kind: the devices' `device_kind`.
    tensor: devices of such a group.
    slices: number of slices, each of which holds a whole state.
  """
  if kind == "cpu":
    return 1
  powers = [2**n for n in range(devices.bit_length())]
  possible = [n for n in powers if devices % n == 0 and model.n_embd % (_ROWS * tensor * n) == 0]
  state, room = _STATE * count_params(model) / tensor, _STATE_SHARE * usable_bytes(kind)
  least = _first(possible or [1], lambda n: state / n <= room)
  if not kind.startswith("TPU") or count_params(model) < _SMALL:
    return least
  most = min(devices if devices <= _FEW or slices > 1 else devices // 2, _MOST)
  return max([least, *(n for n in possible if n <= most)])


def remat(model: ImageGPTConfig, images: int, mesh: Mesh) -> str:
  """Returns the policy that trains fastest of those that should fit: "names", or else "full".

  Args:
    model: the model, with any remat.
    images, mesh: as in `step_bytes`.
  """
  needed = step_bytes(dataclasses.replace(model, remat="names"), images, mesh)
  return "names" if needed <= _STEP_SHARE * usable_bytes(_kind(mesh)) else "full"


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


def _kind(mesh: Mesh) -> str:
  return mesh.devices.flat[0].device_kind


def _first(possible: Sequence[int], fits: Callable[[int], bool]) -> int:
  """Returns the first number that fits, or the last."""
  return next((n for n in possible if fits(n)), possible[-1])
