"""What decides a result that is kept: the checkpoint and the data by their contents, and the settings.

Whoever finds a result again compares these with its own before using it. Paths, names and steps don't
count: another checkpoint may lie where one lay before, and the same one elsewhere.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from igpt_jax import files, history
from igpt_jax.checkpoint import CheckpointInfo
from igpt_jax.config import choices
from igpt_jax.config.fields import DataConfig, Settings, as_json, decides
from igpt_jax.data import transforms
from igpt_jax.data.sources import open_split
from igpt_jax.workspace import weights

_HOW_IT_IS_COMPUTED = ("dtype", "remat", "attention")  # fields of a model that settings decide


def of_checkpoint(found: CheckpointInfo) -> dict[str, Any]:
  """All that a checkpoint decides of what is computed with it, JSON; no device is touched."""
  model = dataclasses.asdict(found.config)
  masked = not found.config.causal
  return {
    "parameters": weights.checksum_of(found),
    "model": {name: value for name, value in model.items() if name not in _HOW_IT_IS_COMPUTED},
    "palette": of_palette(found.palette),
    "mask_probability": found.run["mask_probability"] if masked else None,
  }


def of_palette(centers: np.ndarray | None) -> str | None:
  """16 hexadecimal digits of colours, float [k, 3]; None: there are none."""
  if centers is None:
    return None
  return hashlib.sha256(np.ascontiguousarray(centers, np.float32).tobytes()).hexdigest()[:16]


def of_run(found: CheckpointInfo) -> str:
  """16 hexadecimal digits of the run that a checkpoint of this program is of: its data and settings.

  Two runs that begin with the same of both are one: training is deterministic.
  """
  of_run = files.flatten(found.run.get("config", {}))
  return files.digest(
    {
      "settings": {
        field: value
        for field, value in of_run.items()
        if decides(field, "pretraining") and not history.is_default_of_later(field, value)
      },
      "data": found.run.get("data", {}).get("fingerprint"),
    }
  )


def seeds_of(found: CheckpointInfo) -> tuple[int, int]:
  """Seeds of a checkpoint's run, and of the order of its images since it last went back."""
  config, data = found.run.get("config", {}), found.run.get("data", {})
  seed = config.get("seed", 0)
  return seed, data.get("seed", seed)


def of_data(data: DataConfig, splits: Iterable[str]) -> dict[str, Any]:
  """These splits' contents, and what is shown of their images.

  Raises:
    UserError: one of them isn't there.
  """
  return {
    **{name: open_split(data, name).fingerprint for name in splits},
    "resolution": data.resolution,
    "recipe": recipe(data),
  }


def of_settings(
  settings: Settings, names: Iterable[str], without: Iterable[str] = ()
) -> dict[str, Any]:
  """The fields of these names, or groups of them, but for some; and the dtype of computation."""
  names, without = tuple(names), tuple(without)
  fields = files.flatten(as_json(settings))
  return {
    **{
      field: value
      for field, value in fields.items()
      if field not in without and any(f"{field}.".startswith(f"{name}.") for name in names)
    },
    "dtype": choices.compute_dtype(settings),
  }


def recipe(data: DataConfig) -> str:
  """What evaluation shows of an image: its centre as in the paper, or its whole square."""
  shown = "paper" if data.augment == "paper" else "square"
  return f"{shown}, version {transforms.EVALUATION_VERSION}"
