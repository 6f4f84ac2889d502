"""The handwritten digits that ship inside scikit-learn, as a TFDS data set: nothing to download.

1,797 real 8×8 scans of ten classes (UCI Optical Recognition of Handwritten Digits, CC BY 4.0).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, cast

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

if TYPE_CHECKING:
  from sklearn.utils import Bunch

N_TEST = 300


class Builder(tfds.core.GeneratorBasedBuilder):
  """8×8 grey images, 1,497 for train and 300 for test by a fixed permutation."""

  name = "digits"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://archive.ics.uci.edu/dataset/80",
    )

  def _split_generators(self, dl_manager):
    from sklearn import datasets

    digits = cast("Bunch", datasets.load_digits())
    order = np.random.default_rng(0).permutation(len(digits.images))
    return {
      "train": self._generate_examples(digits, order[:-N_TEST]),
      "test": self._generate_examples(digits, order[-N_TEST:]),
    }

  def _generate_examples(self, digits, indices):
    # The scans have the 17 levels 0..16; scale them to 0..255.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for index in indices:
      file = io.BytesIO()
      Image.fromarray(images[index]).save(file, "png")
      yield int(index), {"image": file.getvalue(), "label": int(digits.target[index])}
