"""The devices that a job uses: the mesh its settings ask for, and the ones that sampling takes."""

import dataclasses

import jax
from jax.sharding import Mesh

from igpt_jax.config.fields import MeshConfig, Settings
from igpt_jax.model.image_gpt import ImageGPTConfig, count_params
from igpt_jax.parallel import hardware
from igpt_jax.parallel.sharding import make_mesh


def mesh_of(settings: Settings) -> Mesh:
  return make_mesh(**dataclasses.asdict(settings.mesh))


# What copies of the weights may take, one for each device.
_COPIES_BYTES = 2**30


def _mesh_is_open(settings: Settings) -> bool:
  """Whether the settings leave to us how devices are used."""
  return settings.mesh == MeshConfig()


def use_cores(settings: Settings) -> None:
  """Makes each core of a CPU a device, for sampling; before anything asks for devices."""
  if _mesh_is_open(settings) and not jax.distributed.is_initialized():
    hardware.split_cpu(min(hardware.usable_cores(), 8))


def sampling_mesh(settings: Settings, model: ImageGPTConfig, samples: int) -> Mesh:
  """`mesh_of` the settings; of a CPU's devices as many as divide the samples.

  Samples are the same on any mesh. Each device has a copy of the weights, while these take little.

  Args:
    settings: whose `mesh` it is.
    model: to sample from.
    samples: that are drawn at a time.
  """
  devices = jax.devices()
  if devices[0].platform != "cpu" or jax.process_count() > 1 or not _mesh_is_open(settings):
    return mesh_of(settings)
  most = min(len(devices), _COPIES_BYTES // (4 * count_params(model)))
  n = max((n for n in range(1, most + 1) if samples % n == 0), default=1)
  return make_mesh(devices=devices[:n])


def own_mesh(mesh: Mesh) -> Mesh | None:
  """The mesh, where this process has all of it; for work that the main process does by itself."""
  return mesh if jax.process_count() == 1 and mesh.size > 1 else None
