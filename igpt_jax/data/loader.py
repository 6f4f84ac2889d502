"""One element of a batch: a record read, decoded, transformed and encoded; or its substitute."""

from __future__ import annotations

from typing import Any

import numpy as np

from igpt_jax import watchdog
from igpt_jax.data import image_decoding, own_images, sources, transforms

_NOTHING_DRAWN = np.random.default_rng(0)  # evaluation takes a generator, and draws nothing


class Loader:
  """Index of a record -> element of a batch. Sent to worker processes, so it holds no open thing."""

  def __init__(self, split, config, palette, *, train: bool, images: bool):
    self._split = split
    self._config = config
    self._palette = palette
    self._train = train
    self._images = images
    self._cache: dict[int, tuple[np.ndarray, np.int32]] = {}
    self._set_up()

  def _set_up(self):
    config = self._config
    if self._train:
      self._transform = transforms.train_transform(
        config.augment, config.resolution, config.resample
      )
      # An image that is decoded anew each time need not be decoded whole.
      self._from_encoded = config.augment == "paper" and config.resample == "fused"
    else:
      evaluate = transforms.eval_transform(config.augment, config.resolution)
      self._transform = lambda image, rng: evaluate(image)
      self._from_encoded = False

  def __getstate__(self):
    state = {**self.__dict__, "_cache": {}}
    del state["_transform"]
    return state

  def __setstate__(self, state):
    watchdog.end_with_parent()
    self.__dict__.update(state)
    self._set_up()

  def load(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """The element of one record. Raises BadRecord."""
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
      bytes_per_image = self._config.cache_mb * 2**20 // len(split)  # for each decoded image
      is_file = split.is_folder
      in_part = self._from_encoded and len(data) > bytes_per_image
      if in_part and (not is_file or own_images.as_stored(data)):
        image = transforms.paper_train_encoded(data, rng, self._config.resolution, record["id"])
      else:
        decode = own_images.read if is_file else image_decoding.decode
        image = decode(data, record["id"])
        if image.nbytes <= bytes_per_image:
          self._cache[index] = image, label
        image = self._transform(image, rng)
    element: dict[str, Any] = {"label": label}
    if self._palette is not None:
      element["tokens"] = self._palette.encode(image).reshape(-1)
    if self._images:
      element["image"] = image
    return element

  def empty(self) -> dict[str, Any]:
    """A padding element of the same shapes."""
    resolution = self._config.resolution
    element: dict[str, Any] = {"label": np.int32(-1)}
    if self._palette is not None or self._split.is_tokens:
      element["tokens"] = np.zeros(resolution**2, np.uint16)
    if self._images and not self._split.is_tokens:
      element["image"] = np.zeros((resolution, resolution, 3), np.uint8)
    return element

  def train_element(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """The record, or the next readable one; `index` and `n_bad` count the damaged ones before it."""
    n, n_bad = len(self._split), 0
    # As many damaged records in a row exceed any tolerance, whatever else there is.
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
    """The record with mask True; or, past the end or damaged, an empty one with mask False."""
    element, good, n_bad = None, False, 0
    if index < len(self._split):
      try:
        element, good = self.load(index, _NOTHING_DRAWN), True
      except image_decoding.BadRecord:
        n_bad = 1
    element = element or self.empty()
    inside = index if index < len(self._split) else -1
    return {**element, "index": np.int32(inside), "n_bad": np.int32(n_bad), "mask": np.bool_(good)}


def tolerance(n_records: int, config: sources.DataConfig) -> int:
  """Number of damaged records that a split of `n_records` may have; never all of them."""
  return min(int(n_records * config.max_bad), n_records - 1)
