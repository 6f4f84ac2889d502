"""Crops of photographs that ship inside scikit-learn and scikit-image, as a TFDS data set.

A stand-in for ImageNet with ImageNet's feature spec (JPEG of any shape, label, file_name), so that
the path from its bytes to tokens is tested whole with nothing to download. The label is the
photograph; validation patches come from a part of it that no training patch touches.

Licences of the photographs, as their packages state them:

  astronaut  Eileen Collins, NASA Great Images: public domain
  chelsea    a cat, by Stéfan van der Walt: CC0
  china      a temple, by danielbuechele (Flickr): CC BY 2.0
  coffee     a cup, by Rachel Michetti, courtesy of Pikolo Espresso Bar: CC0
  flower     a flower, by vultilion (Flickr): CC BY 2.0
  hubble     Hubble eXtreme Deep Field, NASA: public domain
  ihc        immunohistochemically stained colonic glands: no known copyright restrictions
  retina     fundus of a healthy left eye, Wikimedia Commons: CC0
  rocket     launch of DSCOVR on a Falcon 9, SpaceX: public domain
"""

from __future__ import annotations

import importlib.util
import io
import pathlib
import zlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from igpt_jax import errors

PHOTOGRAPHS = {
  "astronaut": "skimage/data/astronaut.png",
  "chelsea": "skimage/data/chelsea.png",
  "china": "sklearn/datasets/images/china.jpg",
  "coffee": "skimage/data/coffee.png",
  "flower": "sklearn/datasets/images/flower.jpg",
  "hubble": "skimage/data/hubble_deep_field.jpg",
  "ihc": "skimage/data/ihc.png",
  "retina": "skimage/data/retina.jpg",
  "rocket": "skimage/data/rocket.jpg",
}
N_TRAIN, N_VALIDATION = 200, 40  # patches of each photograph
VALIDATION_SHARE = 0.3  # of each photograph's width, at its right
SIDES = (96, 192)  # of a patch, in pixels


class Builder(tfds.core.GeneratorBasedBuilder):
  """1,800 training and 360 validation patches of nine photographs."""

  name = "photo_patches"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(names=sorted(PHOTOGRAPHS)),
          "file_name": tfds.features.Text(),  # such as 'coffee_train_17_x3_y200.JPEG'
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples("train", N_TRAIN),
      "validation": self._generate_examples("validation", N_VALIDATION),
    }

  def _generate_examples(self, split, n):
    for name in sorted(PHOTOGRAPHS):
      photograph = Image.open(_path(name)).convert("RGB")
      border = round(photograph.width * (1 - VALIDATION_SHARE))
      left, right = (0, border) if split == "train" else (border, photograph.width)
      rng = np.random.default_rng([zlib.crc32(name.encode()), split == "train"])
      for i in range(n):
        limits = np.minimum(SIDES[1], [right - left, photograph.height])
        width, height = (int(side) for side in rng.integers(SIDES[0], limits + 1))
        x = int(rng.integers(left, right - width + 1))
        y = int(rng.integers(photograph.height - height + 1))
        file = io.BytesIO()
        patch = photograph.crop((x, y, x + width, y + height))
        # Three of four 4:4:4, as among ImageNet's own.
        patch.save(file, "jpeg", quality=92, subsampling=0 if i % 4 else 2)
        file_name = f"{name}_{split}_{i}_x{x}_y{y}.JPEG"
        yield file_name, {"image": file.getvalue(), "label": name, "file_name": file_name}


def _path(name: str) -> pathlib.Path:
  """Where an installed package keeps the photograph, found without importing the package."""
  package, _, rest = PHOTOGRAPHS[name].partition("/")
  spec = importlib.util.find_spec(package)
  path = pathlib.Path(spec.origin).parent / rest if spec and spec.origin else None
  if path is None or not path.is_file():
    raise errors.UserError(
      f"data set photo_patches: {PHOTOGRAPHS[name]} isn't installed; fix: pip install -e '.[test]'"
    )
  return path
