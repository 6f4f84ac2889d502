"""Runs whose sizes are chosen, for tests."""

import json

import numpy as np
from PIL import Image

from igpt_jax.config import named
from igpt_jax.config.fields import with_values
from igpt_jax.workspace import sizing, workdir
from support.tiny import mesh_of, settings_of

CPU = 6e10  # FLOP/s of two cores


def folder_of(path, images: int):
  """A folder of `images` to train on, nothing of which is held out."""
  folder = path / "photos" / "train" / "all"
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(images):
    pixels = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((40, 30)).save(folder / f"{i}.png")
  return path / "photos"


def asking(photos, minutes=12.0, **changes):
  given = {"data.name": "folder", "data.path": str(photos), "sizing.minutes": minutes}
  return settings_of(changes={**given, "data.validation": 0.0, **changes})


def record(folder):
  return json.loads((folder / "sizing.json").read_text())


def photos_config(folder, **changes):
  """The settings of configs/photos.py."""
  given = {"data.path": str(folder), "data.validation": 0.0}
  return with_values(named.settings_of("photos", "config"), {**given, **changes})


def sized(settings, folder):
  return sizing.size(settings, str(folder), mesh_of())


def begin(settings, folder):
  """Claims the folder, as a run does that begins there and comes to a checkpoint."""
  found = sized(settings, folder)
  claim(found, folder)
  return found


def claim(settings, folder):
  workdir.claim(settings, str(folder))
  (folder / "checkpoints" / "10").mkdir(parents=True)
