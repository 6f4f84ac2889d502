"""Checks that work fits the devices' memory, before it starts; errors name the settings that help."""

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from igpt_jax import units
from igpt_jax.errors import DoesNotFit, UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, sharding
from igpt_jax.training.compilation import CompiledStep
from igpt_jax.training.state import state_bytes

_KNOBS = {
  "sample": "a smaller sample.samples or sample.completions, sample.cache='int8'",
  "complete": "a smaller sample.batch_size or complete.n, sample.cache='int8'",
  "evaluate": "a smaller evaluate.batch_size",
  "probe": "a smaller probe.batch_size or features.batch_size, fewer features.layers, mesh.fsdp=-1 with "
  "mesh.data=1",
  "finetune": "a smaller finetune.batch_size, model.remat='full', mesh.fsdp=-1 with mesh.data=1",
}
_TRAINING = (
  "a smaller train.batch_size, or train.accumulate=2 or more, model.remat='full', mesh.fsdp=-1 with "
  "mesh.data=1, model.dtype='bfloat16'; --config.job=compile tells what each of them needs"
)
_SMALLER_CACHE = f"{_KNOBS['sample']}, sample.batch_size in job complete"
_OTHERS = "a smaller batch_size of that job"


def training_bytes(
  model: ImageGPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> float:
  """Returns the bytes of a device's share of a training state and its gradients, which are float32."""
  held = state_bytes(model, optimizer) + 4 * count_params(model)
  return held / sharding.weight_shards(mesh)


def check_state(model: ImageGPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> None:
  """Raises DoesNotFit if a device's share of the training state exceeds its memory."""
  parameters, need = count_params(model), training_bytes(model, optimizer, mesh)
  available = hardware.memory_bytes(mesh)
  if available is not None and need > available:
    raise DoesNotFit(
      f"model: {parameters:,} parameters ({model.n_layer} layers of {model.n_embd}) take "
      f"{units.memory(need)} of each device to train, on a mesh of {hardware.describe_mesh(mesh)}; expected at "
      f"most {units.memory(available)}; fix: mesh.fsdp=-1 with mesh.data=1 over more devices, or a smaller model"
    )


def cache_bytes(model: ImageGPTConfig, samples: int, cache_dtype: str, devices: int) -> float:
  """Returns the bytes of a device for the keys and values of so many samples, spread over the devices."""
  item = np.dtype(cache_dtype or model.dtype).itemsize
  return 2 * model.n_layer * model.n_positions * model.n_embd * item * samples / devices


def check_cache(
  model: ImageGPTConfig, samples: int, cache_dtype: str, mesh: Mesh, fix: str = _SMALLER_CACHE
) -> None:
  """Raises DoesNotFit if a device's share of the key-value cache exceeds its memory."""
  available = hardware.memory_bytes(mesh)
  need = cache_bytes(model, samples, cache_dtype, mesh.size)
  if available is not None and need > available:
    raise DoesNotFit(
      f"sampling: keys and values of {samples:,} images take {units.memory(need)} of each device, which has "
      f"{units.memory(available)}; fix: {fix}, or more devices"
    )


def check_step(compiled: CompiledStep, mesh: Mesh, job: str = "pretrain") -> None:
  """Raises DoesNotFit if a job's compiled training step needs more memory than a device has."""
  available, need = hardware.memory_bytes(mesh), compiled.needed_bytes
  if available is not None and need > available:
    raise DoesNotFit(
      f"training: a step needs {units.memory(need)} of each device, which has "
      f"{units.memory(available)}; fix: {_knobs(job)}"
    )


def lacking_beside_state(
  compiled: CompiledStep,
  model: ImageGPTConfig,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
) -> str:
  """Returns in words what a program lacks on a device that holds a training state, too; "": it fits."""
  available = hardware.memory_bytes(mesh)
  need = compiled.needed_bytes + training_bytes(model, optimizer, mesh)
  if available is None or need <= available:
    return ""
  return f"need {units.memory(need)} of each device beside the training state, which has {units.memory(available)}"


def in_words(error: Exception, job: str) -> UserError | None:
  """Returns the error to report for an exhausted memory; None: `error` is another."""
  exhausted = isinstance(error, jax.errors.JaxRuntimeError) and (
    "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
  )
  if not exhausted and not isinstance(error, MemoryError):
    return None
  first = str(error).strip().splitlines()[0][:300] if str(error).strip() else "MemoryError"
  return UserError(f"out of memory ({first}); fix: {_knobs(job)}")


def _knobs(job: str) -> str:
  """Returns the settings that make a job need less memory, in words."""
  training = job in ("pretrain", "ablate", "isoflop", "lowdata")
  return _KNOBS.get(job, _TRAINING if training else _OTHERS)
