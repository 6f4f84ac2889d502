"""Devices that a job uses: the settings' mesh, or what is chosen where they leave it open.

Training and passes forward share a rule (training/arrangement.py), sampling has another. On CPUs all devices
compute different images.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from igpt_jax import units
from igpt_jax.config.fields import Settings
from igpt_jax.config.run_fields import MeshConfig
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.parallel.sharding import make_mesh
from igpt_jax.training import arrangement
from igpt_jax.workspace import memory

_COPIES_BYTES = 2**30  # limit of all devices' copies of the weights


def mesh_of(
  settings: Settings,
  model: ImageGPTConfig | None = None,
  batch_size: int = 0,
  devices: Sequence[hardware.Device] | None = None,
) -> Mesh:
  """Returns the settings' mesh, with `mesh.fsdp` chosen for a model if it is open.

  Args:
    settings: of the job.
    model: the model to train, or to pass images through; None: whole copies if it is open, which is all the
      same for what depends on a batch's parts alone.
    batch_size: images that all devices compute at a time in training; 0: none are trained on.
    devices: the devices, in order; None: all of this run.

  Raises:
    UserError: the sizes don't suit the devices.
  """
  own, fsdp = settings.mesh, 1
  devices = jax.devices() if devices is None else devices
  if model is not None:
    slices, kind = hardware.by_slice(devices, own.slices), devices[0].device_kind
    fsdp = arrangement.fsdp(
      model, batch_size, len(slices[0]), kind, own.tensor, len(slices), settings.model.remat
    )
  return make_mesh(**dataclasses.asdict(own.with_fsdp(fsdp)), devices=devices)


def arranged(
  settings: Settings,
  model: ImageGPTConfig,
  batch_size: int,
  mesh: Mesh | None = None,
  devices: Sequence[hardware.Device] | None = None,
  tell: Callable[[str], None] = say,
) -> tuple[ImageGPTConfig, Mesh]:
  """Returns the model with its remat, and the mesh, for training; what the settings leave open is chosen, and said.

  Args:
    settings: of the training.
    model: its model.
    batch_size: images that all devices compute at a time.
    mesh: a mesh that has been made; None: `mesh_of`.
    devices: the devices to make it of, in order; None: all of this run.
    tell: takes the line that says what was chosen.

  Raises:
    UserError: the sizes don't suit the devices.
  """
  chosen, own = [], settings.mesh
  if mesh is None:
    mesh = mesh_of(settings, model, batch_size, devices)
    if mesh.size > 1 and not own.fsdp and own.data == -1:
      chosen.append(f"mesh {hardware.describe_mesh(mesh)}")
  first = mesh.devices.flat[0]
  if first.platform == "cpu":
    return model, mesh
  shards = sharding.batch_shards(mesh)
  images, together = -(-batch_size // shards), mesh.size // shards
  if not settings.model.remat:
    model = dataclasses.replace(model, remat=arrangement.remat(model, images, mesh))
    chosen.append(f"remat {model.remat}")
  if chosen:
    tell(
      f"{', '.join(chosen)}: chosen for {mesh.size} × {first.device_kind}, {units.counted(images, 'image')} at a "
      f"time on each{f' {together}' if together > 1 else ''} (others: config.mesh, config.model.remat)"
    )
  return model, mesh


def use_cores(settings: Settings) -> None:
  """Makes every CPU core a device, for sampling; must be called before devices are initialised."""
  if _is_default(settings.mesh) and not jax.distributed.is_initialized():
    hardware.split_cpu(min(hardware.usable_cores(), 8))


def _is_default(mesh: MeshConfig) -> bool:
  """True if a mesh is the default, or that of older versions, which is the same on CPUs."""
  return mesh.with_fsdp(1) == MeshConfig(fsdp=1)


def sampling_mesh(
  settings: Settings,
  model: ImageGPTConfig,
  samples: int | None = None,
  together: int = 0,
  devices: Sequence[hardware.Device] | None = None,
) -> Mesh:
  """Returns the settings' mesh or, if it is open, one that splits the weights no more than memory asks for.

  Samples are the same on any mesh. On CPU it has as many devices as divide the samples, each with a copy of
  the weights, if these are small.

  Args:
    settings: of the job.
    model: the model to sample from.
    samples: a number that all numbers of samples drawn at a time are multiples of; None: on CPU all devices.
    together: samples whose keys and values are held at a time; 0: `sample.batch_size`.
    devices: the devices, in order; None: all of this run.
  """
  devices, own = jax.devices() if devices is None else devices, settings.mesh
  if devices[0].platform == "cpu":
    if samples is None or jax.process_count() > 1 or not _is_default(own):
      return mesh_of(settings)
    most = min(len(devices), _COPIES_BYTES // (4 * count_params(model)))
    n = max((n for n in range(1, most + 1) if samples % n == 0), default=1)
    return make_mesh(devices=devices[:n])
  if own != MeshConfig(slices=own.slices):
    return mesh_of(settings, devices=devices)
  in_slice = len(hardware.by_slice(devices, own.slices)[0])
  usable = arrangement.usable_bytes(devices[0].device_kind)
  together = together or settings.sample.batch_size
  cache = memory.cache_bytes(model, together, settings.sample.cache, len(devices))
  tensor = arrangement.tensor_for_sampling(model, in_slice, usable, cache)
  return make_mesh(tensor=tensor, slices=own.slices, devices=devices)


def own_mesh(mesh: Mesh) -> Mesh | None:
  """Returns the mesh for work of the main process alone; None unless this process has all of it."""
  return mesh if jax.process_count() == 1 and mesh.size > 1 else None
