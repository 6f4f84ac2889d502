"""Runs whose sizes are chosen, for tests."""

import json

import numpy as np
from PIL import Image

from support.tiny import settings_of


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
