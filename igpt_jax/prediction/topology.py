"""TPU slices that needn't be here, as the TPU's compiler describes their devices."""

import dataclasses
import difflib
import functools
import importlib.util
import math
import os
from typing import Any

import jax

from igpt_jax import extras
from igpt_jax.errors import UserError
from igpt_jax.parallel import hardware, tpu_types
from igpt_jax.prediction import bundles
from igpt_jax.prediction.schedule import Links, Network


@dataclasses.dataclass(frozen=True)
class Generation:
  """A generation of TPUs; figures from public documents.

  Attributes:
    clock: cycles a second of its cores.
    link_bandwidth: bytes a second and direction of one link between chips.
    network: bits a second that a chip's host can send over the data center's network, its share.
    ring: the least number of chips in a dimension that wraps around.
    narrow: True if its matrix units are 128 × 128.
    cores: cores of a device, which share the grid of a kernel.
  """

  clock: float
  link_bandwidth: float
  network: float
  ring: int
  narrow: bool
  cores: int = 1


GENERATIONS = {
  "v4": Generation(1.05e9, 45e9, 50e9, 4, True, 2),
  "v5e": Generation(1.5e9, 45e9, 25e9, 16, True),
  "v5p": Generation(1.75e9, 90e9, 50e9, 4, True, 2),
  "v6e": Generation(1.75e9, 90e9, 100e9, 16, False),
  "tpu7x": Generation(2.2e9, 90e9, 100e9, 4, False),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice, or several of one shape.

  Attributes:
    name: such as "v5p:4x4x4".
    generation: the generation of its chips.
    devices: JAX' devices: one per chip, two on tpu7x.
    chip: the figures of a device.
    dump: the folder that the compiler leaves its kernels' code in.
    slices: number of slices.
    network: bits a second that each chip sends to other slices.
  """

  name: str
  generation: Generation
  devices: tuple[hardware.Device, ...]
  chip: hardware.Chip
  dump: bundles.Dump
  slices: int = 1
  network: float = math.inf

  @property
  def title(self) -> str:
    """Its name, with the number of slices if there are several: "2×v5p:4x4x4"."""
    return self.name if self.slices == 1 else f"{self.slices}×{self.name}"

  @property
  def n_chips(self) -> int:
    return len({(hardware.slice_index(d), *d.coords) for d in self.devices})

  @property
  def limits(self) -> bundles.Limits:
    """What bounds a kernel on one of its devices."""
    return bundles.Limits(self.generation.clock, self.generation.cores, self.chip.hbm_bandwidth)

  @property
  def between_slices(self) -> Network:
    """The network that joins its slices."""
    return Network(self.slices, self.network / 8 * self.n_chips / len(self.devices))

  def links(self, devices) -> Links:
    """A slice's interconnect, for collectives that number `devices` in this order.

    Those of several slices come slice after slice, and collectives number each slice's alike.
    """
    devices = devices[: len(devices) // self.slices]
    shape = [int(n) for n in self.name.partition(":")[2].split("x")]
    wrapped = tuple(n >= self.generation.ring for n in shape) + (False,) * (4 - len(shape))
    spots = tuple(
      (*d.coords[: len(shape)], *[0] * (3 - len(shape)), d.core_on_chip) for d in devices
    )
    return Links(self.generation.link_bandwidth, spots, wrapped)


def check_name(name: str) -> None:
  """Checks a topology's name without loading anything.

  Raises:
    UserError: there is no such topology; it names the nearest.
  """
  kind, _, shape = name.partition(":")
  if kind not in GENERATIONS:
    near = difflib.get_close_matches(kind, GENERATIONS, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}:{shape}" if near and shape else ""
    raise UserError(
      f"config.compile.topology: {name!r}; expected one of {', '.join(GENERATIONS)} with a slice's shape, "
      f"such as v5e:4x4 or v5p:4x4x4{hint}"
    )
  tpu_types.check_shape(tpu_types.KINDS[kind], shape, name, "config.compile.topology")


@functools.cache
def _prepare_compiler() -> bundles.Dump:
  """Makes the settings that libtpu reads when it is loaded, once in a process."""
  dump = bundles.Dump()
  settings = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  for key, value in settings.items():
    os.environ.setdefault(key, value)
  flags = os.environ.get("LIBTPU_INIT_ARGS", "")
  os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {dump.flags}".strip()
  jax.config.update("jax_platforms", "cpu")
  return dump


@functools.cache
def open_topology(name: str, slices: int = 1, network: float = 0.0) -> Topology:
  """Loads the TPU's compiler and describes a slice, or several of one shape.

  Call it before anything else has used a device: the compiler reads its settings once, and this
  process must not look for TPUs of its own.

  Args:
    name: `config.compile.topology`.
    slices: `config.mesh.slices`.
    network: Gbit/s that each chip sends to other slices; 0: the figure of its generation.

  Raises:
    UserError: there is no such slice, or no number of slices, or no libtpu.
  """
  check_name(name)
  if slices < 1:
    raise UserError(
      f"config.mesh.slices: {slices}; {name} is compiled for without devices that could say how many "
      "slices there are; expected 1 or more"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"config.compile.topology: {name} needs the TPU's compiler, libtpu; fix: {extras.install('tpu')} "
      "(0.7 GB; no TPU is needed)"
    )
  dump = _prepare_compiler()
  from jax.experimental import topologies

  kind, _, shape = name.partition(":")
  alone = tpu_types.chips_of(shape) == 1
  if alone and slices > 1:
    raise UserError(
      f"config.mesh.slices: {slices}; one chip, {name}, is compiled for alone; expected 1; fix: a larger slice"
    )
  # A v4 chip's two cores are one device, as on rented v4 slices.
  options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
  if slices > 1:
    options["num_slices"] = slices
  described = f"{kind}:2x2" if alone else name  # the compiler describes whole hosts
  devices = topologies.get_topology_desc(platform="tpu", topology_name=described, **options).devices
  devices = devices[:1] if alone else devices
  chip = hardware.chip_of(devices[0])
  if chip is None:
    raise UserError(
      f"config.compile.topology: {name}: no figures for its chips, {devices[0].device_kind!r}; fix: another topology"
    )
  generation = GENERATIONS[kind]
  speed = network * 1e9 or generation.network
  return Topology(name, generation, tuple(devices), chip, dump, slices, speed)
