"""Small images of a person's own, written for a test."""

import numpy as np
from PIL import Image


def make_images(folder, n=8, colours=256, name="{:02d}.png"):
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(n):
    pixels = rng.integers(256 - colours, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name.format(i))
  return folder
