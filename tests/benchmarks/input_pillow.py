"""The input pipeline beside the paper's augmentation done step by step with Pillow alone.

  python tests/benchmarks/input_pillow.py --name imagenet2012 --data_dir ~/tensorflow_datasets

Both ends are the same: records are read from a prepared TFDS data set, and colours looked up.
"""

import argparse
import dataclasses
import io
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from igpt_jax.data import sources, transforms
from igpt_jax.data.palette import Palette
from igpt_jax.timing.input import throughput
from igpt_jax.tokens import TokenSpec


class PillowSplit(sources.Split):
  """Pillow decodes, resizes the whole image, crops 224², averages; records come out finished."""

  def __init__(self, split: sources.Split, resolution: int):
    super().__init__(split.records, split.indices, split.name)
    self._resolution = resolution
    self._rng = np.random.default_rng(0)

  def __getitem__(self, index):
    record = super().__getitem__(index)
    image = Image.open(io.BytesIO(record["image"])).convert("RGB")
    crop = transforms.draw_paper_crop(self._rng, image.height, image.width)
    image = image.resize((crop.width, crop.height), Image.Resampling.BILINEAR)
    side = transforms.PAPER_CROP
    image = image.crop((crop.left, crop.top, crop.left + side, crop.top + side))
    image = image.resize((self._resolution, self._resolution), Image.Resampling.BOX)
    return {**record, "image": np.asarray(image)}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--name", default="imagenet2012")
  parser.add_argument("--data_dir", default="")
  parser.add_argument("--resolution", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()
  config = sources.DataConfig(
    name=options.name, data_dir=options.data_dir, resolution=options.resolution, augment="paper",
    threads=1,
  )  # fmt: skip
  split, spec = sources.open_split(config, "train"), TokenSpec(palette=Palette.default())
  pillow = PillowSplit(split, options.resolution), dataclasses.replace(config, augment="none")
  for _ in range(options.repeats):  # taking turns
    for name, (records, settings) in {"pipeline": (split, config), "Pillow": pillow}.items():
      cost = throughput(records, settings, spec)
      print(f"{name}: {cost.cpu_ms:.3f} CPU ms an image, {cost.images_per_second:,.0f} images/s")


if __name__ == "__main__":
  main()
