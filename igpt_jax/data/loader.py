"""Loads one element of a batch: reads, decodes, transforms and encodes a record, or its substitute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from igpt_jax import watchdog
from igpt_jax.data import image_decoding, own_images, sources, transforms
from igpt_jax.tokens import TokenSpec

_TOLERATED_IN_FOLDER = 3  # unreadable images, unless data.max_bad is 0
_UNUSED_RNG = np.random.default_rng(0)  # `load` takes a generator, but evaluation draws nothing


class Loader:
  """Maps a record's index to an element of a batch. Picklable, for worker processes."""

  def __init__(self, split, config, spec: TokenSpec | None, *, train: bool, images: bool):
    self._split = split
    self._config = config
    self._spec = spec
    self._train = train
    self._images = images
    self._cache: dict[int, tuple[np.ndarray, np.int32]] = {}
    self._set_up()

  def _set_up(self):
    config = self._config
    evaluate = transforms.eval_transform(config.augment, config.resolution)
    # An image is cached after it, so that a photo of 36 MB takes a few kB.
    self._begin: Callable[[np.ndarray], np.ndarray] | None = evaluate
    if self._train:
      self._begin = transforms.train_begin(config.augment, config.resolution)
      make = transforms.train_transform
      self._transform = make(config.augment, config.resolution, config.resample)
    else:
      self._transform = lambda image, rng: evaluate(image)
    # Images that aren't cached are decoded every time, and then only as far as the crop needs.
    self._from_encoded = self._train and (config.augment, config.resample) == ("paper", "fused")

  def __getstate__(self):
    state = {**self.__dict__, "_cache": {}}
    del state["_transform"], state["_begin"]
    return state

  def __setstate__(self, state):
    watchdog.end_with_parent()
    self.__dict__.update(state)
    self._set_up()

  def load(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns the element of one record; raises BadRecord if it can't be read."""
    split = self._split
    if split.is_tokens:
      record = split[index]
      return {"tokens": record["tokens"], "label": np.int32(record["label"])}
    if index in self._cache:
      image, label = self._cache[index]
      image = self._transform(image, rng)
    else:
      record = split[index]
      data, label = record["image"], np.int32(record["label"])
      bytes_per_image = self._config.cache_mb * 2**20 // len(split)  # of the cache
      in_part = self._from_encoded and len(data) > bytes_per_image
      if in_part and (not split.is_folder or own_images.as_stored(data)):
        image = transforms.paper_train_encoded(data, rng, self._config.resolution, record["id"])
      else:
        decode = own_images.read if split.is_folder else image_decoding.decode
        image = decode(data, record["id"])
        if self._begin is not None:
          image = self._begin(image)
        if image.nbytes <= bytes_per_image:
          # A copy of a part, which would keep the whole.
          self._cache[index] = (image if image.base is None else image.copy()), label
        image = self._transform(image, rng)
    element: dict[str, Any] = {"label": label}
    if self._spec is not None:
      element["tokens"] = self._spec.encode(image)
    if self._images:
      element["image"] = image
    return element

  def empty(self) -> dict[str, Any]:
    """Returns a padding element of the same shapes, its label -1."""
    resolution = self._config.resolution
    element: dict[str, Any] = {"label": np.int32(-1)}
    spec = TokenSpec() if self._split.is_tokens else self._spec
    if spec is not None:
      element["tokens"] = np.zeros(spec.shape(spec.n_positions(resolution)), np.uint16)
    if self._images and not self._split.is_tokens:
      element["image"] = np.zeros((resolution, resolution, 3), np.uint8)
    return element

  def train_element(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns the first readable record from `index` on, and the number of damaged ones before it."""
    n, n_bad = len(self._split), 0
    # More damaged records in a row would exceed the tolerance, so give up after these.
    for n_bad in range(tolerance(n, self._config) + 2):
      try:
        element = self.load((index + n_bad) % n, rng)
        break
      except image_decoding.BadRecord:
        continue
    else:
      element = self.empty()
    return {**element, "index": np.int32(index), "n_bad": np.int32(n_bad)}

  def eval_element(self, index: int) -> dict[str, Any]:
    """Returns the record with mask True; an empty one with mask False if damaged or past the end."""
    element, inside, n_bad = None, index < len(self._split), 0
    if inside:
      try:
        element = self.load(index, _UNUSED_RNG)
      except image_decoding.BadRecord:
        n_bad = 1
    return {
      **(element or self.empty()),
      "index": np.int32(index if inside else -1),
      "n_bad": np.int32(n_bad),
      "mask": np.bool_(element is not None),
    }


def tolerance(n_records: int, config: sources.DataConfig) -> int:
  """Returns the number of damaged records that a split of `n_records` may have; never all of them.

  A person's folder is often so small that `max_bad` is less than one image of it, and a photo may be
  damaged or moved away while others are trained on.
  """
  of_folder = _TOLERATED_IN_FOLDER if config.name == "folder" and config.max_bad else 0
  return min(max(int(n_records * config.max_bad), of_folder), n_records - 1)
