"""Provenance of stored results: checkpoint and data, by their contents, and the settings.

A stored result is used again only if its provenance is the same. Paths, names and steps don't count:
they may name another checkpoint today.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from igpt_jax import files, history
from igpt_jax.checkpoint import CheckpointInfo
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings, as_json, decides
from igpt_jax.config.run_fields import DataConfig
from igpt_jax.data import transforms
from igpt_jax.data.sources import open_split
from igpt_jax.workspace import weights
from igpt_jax.workspace import workdir as workdir_lib

# Fields of a model that don't belong to its checkpoint.
_HOW_IT_IS_COMPUTED = ("dtype", "remat", "attention")


def of_checkpoint(info: CheckpointInfo) -> dict[str, Any]:
  """Returns all of a checkpoint that decides results, as JSON; no device is used."""
  model = dataclasses.asdict(info.config)
  masked = not info.config.causal
  return {
    "parameters": weights.checksum_of(info),
    "model": {
      name: value
      for name, value in model.items()
      if name not in _HOW_IT_IS_COMPUTED and (name, value) not in history.ADDED_TO_MODEL.items()
    },
    "palette": of_palette(info.palette),
    "mask_probability": info.run["mask_probability"] if masked else None,
  }


def of_palette(centers: np.ndarray | None) -> str | None:
  """Returns 16 hexadecimal digits of colours, float [k, 3]; None for None."""
  if centers is None:
    return None
  return hashlib.sha256(np.ascontiguousarray(centers, np.float32).tobytes()).hexdigest()[:16]


def of_run(info: CheckpointInfo) -> str:
  """Returns 16 hexadecimal digits of a checkpoint's run: its data and settings.

  Training is deterministic: runs with the same digits have the same numbers, up to the step where one
  was given another number of steps, or decay: it stays the run that it was.
  """
  config = begun_with(info)
  settings = {
    name: value
    for name, value in config.items()
    if decides(name, "pretraining")
    and workdir_lib.is_used(name, config.get("train.schedule", ""))
    and not history.is_default_of_later(name, value)
  }
  return files.digest({"settings": settings, "data": info.run.get("data", {}).get("fingerprint")})


def begun_with(info: CheckpointInfo) -> dict[str, Any]:
  """Returns the settings of a checkpoint's run by "group.field", its length and decay as at its begin."""
  config = files.flatten(info.run.get("config", {}))
  for changed in reversed(info.run.get("lengths", [])):
    config |= {f"train.{name}": value for name, value in changed.items() if name != "at"}
  return config


def seeds_of(info: CheckpointInfo) -> tuple[int, int]:
  """Returns the seed of a checkpoint's run, and that of its data order since the last rollback."""
  config, data = info.run.get("config", {}), info.run.get("data", {})
  seed = config.get("seed", 0)
  return seed, data.get("seed", seed)


def of_data(data: DataConfig, splits: Iterable[str]) -> dict[str, Any]:
  """Returns the fingerprints of splits, and the preprocessing of their images.

  Raises:
    UserError: a split doesn't exist.
  """
  return {
    **{name: open_split(data, name).fingerprint for name in splits},
    "resolution": data.resolution,
    "recipe": recipe(data),
  }


def of_settings(
  settings: Settings, names: Iterable[str], without: Iterable[str] = ()
) -> dict[str, Any]:
  """Returns the settings of these names or groups, except `without`, and the compute dtype."""
  names, without = tuple(names), tuple(without)
  chosen = {
    field: value
    for field, value in files.flatten(as_json(settings)).items()
    if field not in without and any(f"{field}.".startswith(f"{name}.") for name in names)
  }
  return {**chosen, "dtype": choices.compute_dtype(settings)}


def recipe(data: DataConfig) -> str:
  """Returns the preprocessing in evaluation: the paper's centre crop, or the whole square."""
  shown = "paper" if data.augment == "paper" else "square"
  return f"{shown}, version {transforms.EVALUATION_VERSION}"
