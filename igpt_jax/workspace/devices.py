"""Devices that a job uses: the settings' mesh, or those that sampling chooses."""

import dataclasses

import jax
from jax.sharding import Mesh

from igpt_jax.config.fields import Settings
from igpt_jax.config.run_fields import MeshConfig
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware
from igpt_jax.parallel.sharding import make_mesh

_COPIES_BYTES = 2**30  # limit of all devices' copies of the weights


def mesh_of(settings: Settings) -> Mesh:
  return make_mesh(**dataclasses.asdict(settings.mesh))


def use_cores(settings: Settings) -> None:
  """Makes every CPU core a device, for sampling; must be called before devices are initialised."""
  if settings.mesh == MeshConfig() and not jax.distributed.is_initialized():
    hardware.split_cpu(min(hardware.usable_cores(), 8))


def sampling_mesh(settings: Settings, model: ImageGPTConfig, samples: int) -> Mesh:
  """Returns `mesh_of` the settings or, on CPU, as many devices as divide the samples.

  Samples are the same on any mesh. Every device holds a copy of the weights, if these are small.

  Args:
    settings: if its `mesh` isn't the default, it is used.
    model: the model to sample from.
    samples: the number of samples drawn at a time.
  """
  devices = jax.devices()
  alone = devices[0].platform == "cpu" and jax.process_count() == 1
  if not alone or settings.mesh != MeshConfig():
    return mesh_of(settings)
  most = min(len(devices), _COPIES_BYTES // (4 * count_params(model)))
  n = max((n for n in range(1, most + 1) if samples % n == 0), default=1)
  return make_mesh(devices=devices[:n])


def own_mesh(mesh: Mesh) -> Mesh | None:
  """Returns the mesh for work of the main process alone; None unless this process has all of it."""
  return mesh if jax.process_count() == 1 and mesh.size > 1 else None
