"""Facts about the devices: kind, published peaks, memory, cores."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import TypeAlias

import jax
from jax.sharding import Mesh

from igpt_jax import cpu_compiler, extras, units
from igpt_jax.errors import UserError
from igpt_jax.parallel import tpu_types

# jax declares it as a variable, which type checkers don't take.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one device, as JAX counts them.

  Attributes:
    name: short name.
    peak_flops: the vendor's dense bfloat16 matmul peak, FLOP/s.
    hbm_bytes: memory that programs can use, bytes.
    hbm_bandwidth: bytes a second between that memory and the cores.
  """

  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float


_GIB = 2.0**30
_NVIDIA_VERSION = "/proc/driver/nvidia/version"

# device_kind as JAX reports it -> chip. A TPU's memory is what the compiler lets a program use; a device of
# tpu7x is half a chip.
CHIPS = {
  "TPU v4": Chip("v4", 275e12, 31.75 * _GIB, 1228e9),
  "TPU v5 lite": Chip("v5e", 197e12, 15.75 * _GIB, 819e9),
  "TPU v5e": Chip("v5e", 197e12, 15.75 * _GIB, 819e9),
  "TPU v5": Chip("v5p", 459e12, 95.7 * _GIB, 2765e9),
  "TPU v5p": Chip("v5p", 459e12, 95.7 * _GIB, 2765e9),
  "TPU v6 lite": Chip("v6e", 918e12, 31.25 * _GIB, 1638e9),
  "TPU v6e": Chip("v6e", 918e12, 31.25 * _GIB, 1638e9),
  "TPU7x": Chip("tpu7x", 1153.5e12, 94.75 * _GIB, 3690e9),
  "NVIDIA A100-SXM4-40GB": Chip("a100", 312e12, 39 * _GIB, 1555e9),
  "NVIDIA A100-SXM4-80GB": Chip("a100", 312e12, 79 * _GIB, 2039e9),
  "NVIDIA H100 80GB HBM3": Chip("h100", 989e12, 79 * _GIB, 3350e9),
  "NVIDIA H200": Chip("h200", 989e12, 140 * _GIB, 4800e9),
}


def target():
  """Returns the device that the program being traced is for, with a platform and a device_kind.

  It is the current mesh's, whose devices needn't be here (ahead-of-time compilation); without a mesh
  this machine's.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0] if device is None else device


def platform() -> str:
  """Returns the platform of `target`: "cpu", "gpu" or "tpu"."""
  return target().platform


def cuda_capability() -> tuple[int, int] | None:
  """Compute capability of the NVIDIA GPU that programs are for, (9, 0) for an H100; None without one."""
  device = jax.local_devices()[0]
  if platform() != "gpu" or "cuda" not in device.client.platform_version:
    return None
  major, minor = device.compute_capability.split(".")
  return int(major), int(minor)


def check_platform() -> None:
  """Initialises the devices that JAX_PLATFORMS names, other than a CPU's, which `split_cpu` may change.

  Raises:
    UserError: there are none, or jax has no such platform.
  """
  wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
  if not wanted or wanted == "cpu":
    return
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # an assertion if the plugin isn't installed
    why = str(error).split("\n")[0].partition(" (set JAX_PLATFORMS")[0][:300]
    raise UserError(
      f"JAX_PLATFORMS: {wanted}: {why or 'no such devices'}; expected cpu, or tpu or cuda with its "
      f"plugin ({extras.install('tpu')} or {extras.install('cuda')}) and its devices; fix: unset "
      "JAX_PLATFORMS, which takes what there is"
    ) from None


def usable_cores() -> int:
  """Number of cores that this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def split_cpu(n_devices: int) -> None:
  """Makes a CPU count as n devices, unless devices are in use; no effect on accelerators.

  XLA's threads share the work of one operation, and sampling has many small ones; devices instead
  run the whole program, each on its own images.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return  # the user has set their number
  cpu_compiler.keep_collectives_in_order(n_devices)
  with contextlib.suppress(RuntimeError):  # devices are in use: they stay as they are
    jax.config.update("jax_num_cpu_devices", n_devices)


def chip_of(device: Device) -> Chip | None:
  """Returns a device's chip, or None if its figures aren't known (a CPU, a new accelerator)."""
  return CHIPS.get(device.device_kind)


def kind_of(name: str) -> str:
  """Returns the `device_kind` of a chip by its short name, such as "v5e"; of a TPU without figures, "TPU v3"."""
  return next((kind for kind, chip in CHIPS.items() if chip.name == name), f"TPU {name}")


def has_wide_matrix_unit(kind: str) -> bool:
  """True if devices of this `device_kind` are TPUs with 256 × 256 matrix units (v6e on), not 128 × 128."""
  return kind.startswith("TPU") and not kind.startswith(("TPU v2", "TPU v3", "TPU v4", "TPU v5"))


def vmem_bytes(kind: str) -> int:
  """Bytes of vector memory of a core with 256 × 256 matrix units, by its `device_kind`: v6e's 128 MiB, else tpu7x' 64."""
  return (128 if kind in ("TPU v6 lite", "TPU v6e") else 64) * 2**20


def memory_bytes(mesh: Mesh) -> float | None:
  """Bytes that programs can use of a mesh's device here; a CPU's share of the machine's; None if unknown."""
  # Only the process that a device belongs to may ask it; of another's, the published figure does.
  here = mesh.local_devices
  device = here[0] if here else mesh.devices.flat[0]
  if device.platform == "cpu":
    if "SC_PHYS_PAGES" not in os.sysconf_names:
      return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole / jax.local_device_count()
  limit = (device.memory_stats() or {}).get("bytes_limit") if here else None
  chip = chip_of(device)
  return limit or (chip and chip.hbm_bytes)


def driver(device: Device) -> str:
  """Returns versions of what runs a device's programs: the runtime's, and that of NVIDIA's driver."""
  lines = [line.strip() for line in device.client.platform_version.splitlines()]
  if device.platform == "gpu" and os.path.exists(_NVIDIA_VERSION):
    with open(_NVIDIA_VERSION, encoding="utf-8") as file:
      version = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", file.read())
    lines += [f"NVIDIA driver {version[1]}"] if version else []
  return ", ".join(line for line in lines if line)


def topology_of(devices: Sequence[Device]) -> str | None:
  """Returns the name of one slice's topology, such as "v5e:4x4"; None if they aren't a whole slice of TPUs."""
  chip = chip_of(devices[0])
  if devices[0].platform != "tpu" or chip is None or chip.name not in tpu_types.KINDS:
    return None
  chips = {tuple(device.coords) for device in devices}
  sides = [len(set(axis)) for axis in zip(*chips, strict=True)]
  if math.prod(sides) != len(chips):
    return None
  for shape in tpu_types.KINDS[chip.name].shapes:
    named = [int(n) for n in shape.split("x")]
    if sorted(named + [1] * (len(sides) - len(named))) == sorted(sides):
      return f"{chip.name}:{shape}"
  return None


def slice_index(device: Device) -> int | None:
  """Number of the slice that a device is in; None if it doesn't say, as a CPU doesn't."""
  return getattr(device, "slice_index", None)


def by_slice(devices: Sequence[Device], slices: int) -> list[list[Device]]:
  """Returns the devices of every slice, in the slices' order.

  Args:
    devices: in the order that each slice's devices keep.
    slices: `config.mesh.slices`: 1 takes all devices for one slice's; -1 is as many as they say.

  Raises:
    UserError: the devices are in another number of slices, or unevenly.
  """
  groups: dict[int | None, list[Device]] = {}
  for device in devices:
    groups.setdefault(slice_index(device), []).append(device)
  if slices == 1 and (len(groups) == 1 or devices[0].platform != "tpu"):
    return [list(devices)]
  if slices not in (-1, len(groups)):
    if None in groups:
      raise UserError(
        f"config.mesh.slices: {slices}; the {len(devices)} {devices[0].device_kind} devices of this run "
        "don't say which slice they are in (slice_index); expected 1, or TPUs of several slices"
      )
    raise UserError(
      f"config.mesh.slices: {slices}; the {len(devices)} devices of this run are in "
      f"{units.counted(len(groups), 'slice')}; expected {len(groups)}, or -1: as many as there are"
    )
  sizes = {index: len(group) for index, group in groups.items()}
  if len(set(sizes.values())) > 1:
    raise UserError(
      f"config.mesh.slices: {slices}; the slices have different numbers of devices "
      f"({', '.join(f'slice {index}: {n}' for index, n in sorted(sizes.items()))}); expected slices "
      "of one shape"
    )
  return [groups[index] for index in sorted(groups, key=lambda index: index or 0)]


def peak_flops(mesh: Mesh) -> float | None:
  """Peak FLOP/s of all devices of a mesh together, or None if unknown."""
  chip = chip_of(mesh.devices.flat[0])
  return None if chip is None else chip.peak_flops * mesh.size


def describe_devices(mesh: Mesh) -> str:
  """Number and kind of the devices, and the mesh: "8 TPU v5 lite (data 2 × fsdp 4 × tensor 1)"."""
  return f"{mesh.size} {mesh.devices.flat[0].device_kind} ({describe_mesh(mesh)})"


def describe_mesh(mesh: Mesh) -> str:
  """The mesh's axes and their sizes: "data 2 × fsdp 4 × tensor 1"."""
  return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
