"""Public peaks of the accelerators we know: what a step's speed is divided by."""

import dataclasses
import os
from typing import TypeAlias

import jax
from jax.sharding import Mesh

from igpt_jax.errors import UserError

# jax makes it a variable, which says no type.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX counts them.

  Attributes:
    name: short name.
    peak_flops: dense bfloat16 matmul peak, FLOP/s (vendor's figure).
    hbm_bytes: memory a program can use, bytes.
  """

  name: str
  peak_flops: float
  hbm_bytes: float


_GIB = 2.0**30

# device_kind as JAX reports it -> chip. TPU memory is what the compiler lets a program use.
CHIPS = {
  "TPU v4": Chip("v4", 275e12, 31.75 * _GIB),
  "TPU v5 lite": Chip("v5e", 197e12, 15.75 * _GIB),
  "TPU v5e": Chip("v5e", 197e12, 15.75 * _GIB),
  "TPU v5": Chip("v5p", 459e12, 95.7 * _GIB),
  "TPU v5p": Chip("v5p", 459e12, 95.7 * _GIB),
  "TPU v6 lite": Chip("v6e", 918e12, 31.25 * _GIB),
  "TPU v6e": Chip("v6e", 918e12, 31.25 * _GIB),
  "TPU7x": Chip("tpu7x", 1153.5e12, 94.75 * _GIB),
  "NVIDIA A100-SXM4-40GB": Chip("a100", 312e12, 39 * _GIB),
  "NVIDIA A100-SXM4-80GB": Chip("a100", 312e12, 79 * _GIB),
  "NVIDIA H100 80GB HBM3": Chip("h100", 989e12, 79 * _GIB),
  "NVIDIA H200": Chip("h200", 989e12, 140 * _GIB),
}


def target():
  """The kind of device that the program being traced is for; it has a platform and a device_kind.

  The mesh in force tells, also one of devices that aren't here (ahead-of-time compilation); then
  this machine's own devices.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0] if device is None else device


def platform() -> str:
  """The platform of `target`: "cpu", "gpu" or "tpu"."""
  return target().platform


def cuda_capability() -> tuple[int, int] | None:
  """Compute capability of the NVIDIA GPU that programs are for, (9, 0) of an H100; None: there is none."""
  device = jax.local_devices()[0]
  if platform() != "gpu" or "cuda" not in device.client.platform_version:
    return None
  major, minor = device.compute_capability.split(".")
  return int(major), int(minor)


def check_platform() -> None:
  """Asks for the devices that JAX_PLATFORMS names; a CPU's wait for `split_cpu`.

  Raises:
    UserError: there are none, or jax has no such platform.
  """
  wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
  if not wanted or wanted == "cpu":
    return
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # of a plugin that isn't installed jax asserts
    why = str(error).split("\n")[0].partition(" (set JAX_PLATFORMS")[0][:300]
    raise UserError(
      f"JAX_PLATFORMS: {wanted}: {why or 'no such devices'}; expected cpu, or tpu or cuda with its "
      "plugin (pip install 'igpt_jax[tpu]' or 'igpt_jax[cuda]') and its devices; fix: unset "
      "JAX_PLATFORMS, which takes what there is"
    ) from None


def usable_cores() -> int:
  """Number of cores that this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def split_cpu(n_devices: int) -> None:
  """Makes a CPU count as so many devices, where no device was asked for yet; nothing on accelerators.

  XLA's threads share the work of an operation, of which sampling has many small ones; devices each
  go through the whole program for their own images.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return  # the user has said how many
  try:
    jax.config.update("jax_num_cpu_devices", n_devices)
  except RuntimeError:  # devices are in use: they stay as they are
    return


def chip_of(device: Device) -> Chip | None:
  """The chip behind a device, or None when its peak isn't known (a CPU, a new accelerator)."""
  return CHIPS.get(device.device_kind)


def memory_bytes(device: Device) -> float | None:
  """Memory that programs can use of a device; of a CPU, its share of the machine's. None: not known."""
  if device.platform == "cpu":
    if "SC_PHYS_PAGES" not in os.sysconf_names:
      return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole / jax.local_device_count()
  limit = (device.memory_stats() or {}).get("bytes_limit")
  chip = chip_of(device)
  return limit or (chip and chip.hbm_bytes)


def peak_flops(mesh: Mesh) -> float | None:
  """FLOP/s of all devices of a mesh together, or None when it isn't known."""
  chip = chip_of(mesh.devices.flat[0])
  return None if chip is None else chip.peak_flops * mesh.size


def describe_devices(mesh: Mesh) -> str:
  """How many of what, and the mesh over them: "8 TPU v5 lite (data 2 × fsdp 4 × tensor 1)"."""
  return f"{mesh.size} {mesh.devices.flat[0].device_kind} ({describe_mesh(mesh)})"


def describe_mesh(mesh: Mesh) -> str:
  """Its axes and their sizes: "data 2 × fsdp 4 × tensor 1"."""
  return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def model_flops_per_image(
  *, n_layer: int, n_embd: int, n_vocab: int, n_positions: int, causal: bool
) -> float:
  """FLOPs of one image's training step, forward and backward, nothing recomputed.

  6 per matmul parameter and token, and attention's 12·T·d per layer and token (scores and values,
  forward and backward), halved when causal: what a kernel that skips the masked half must do.
  """
  matmul_parameters = n_layer * 12 * n_embd**2 + n_vocab * n_embd
  attention = n_layer * 12 * n_positions * n_embd * (0.5 if causal else 1.0)
  return n_positions * (6 * matmul_parameters + attention)
