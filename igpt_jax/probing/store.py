"""Features on disk: a folder per split and model; resumable, and refused if made from anything else.

FOLDER/
  identity.json   what they were computed from: parameters' checksum, data, resolution, …
  progress.json   rows done, for every layer
  layer-LL.npy    float32 [N, width], a row for each of the split's first N images, in its order
  images.npy      uint8 [N, H, W, 3], what the model was shown, before the palette
  labels.npy      int32 [N], -1 where an image couldn't be read

A store opened for fewer rows than it holds returns the first of them; opened for more, its arrays are
extended and only the missing rows computed.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np

from igpt_jax import files, units
from igpt_jax.errors import UserError
from igpt_jax.probing.features import FeatureRows
from igpt_jax.reporting import summary

_SECONDS_BETWEEN_SAVES = 20.0


class FeatureStore:
  """One split's features. Opens the folder if it exists; `begin` creates it.

  Args:
    folder: the folder of the arrays.
    identity: everything the features are computed from, JSON.
    rows: number of images, the split's first ones.
    width: width of one layer's features.
    side: height and width of the images, in pixels.
    kept_in: the address of a store that `folder` is the local copy of.

  Raises:
    UserError: the folder holds features of something else, or is damaged.
  """

  def __init__(
    self,
    folder: str,
    identity: Mapping[str, Any],
    *,
    rows: int,
    width: int,
    side: int,
    kept_in: str = "",
  ):
    self.folder = folder
    self._identity = dict(identity, width=width)
    self._shapes = {"images": (rows, side, side, 3), "labels": (rows,)}
    self._rows, self._width = rows, width
    self._progress: dict[str, int] = {}
    path = os.path.join(folder, "identity.json")
    if os.path.exists(path):
      what = f"{kept_in or folder} holds features of something else"
      fix = "another config.features.cache, or remove that folder"
      files.check_same("features.cache", what, _read(path), self._identity, fix)
      self._progress = _read_progress(os.path.join(folder, "progress.json"))

  def missing(self, layers: Sequence[int]) -> tuple[int, ...]:
    """Returns the layers that aren't complete."""
    return tuple(layer for layer in layers if self._progress.get(str(layer), 0) < self._rows)

  def rows_done(self, layers: Sequence[int]) -> int:
    """Number of first rows that all of these layers have."""
    return min(self._rows, *(self._progress.get(str(layer), 0) for layer in layers))

  def begin(self, layers: Sequence[int]) -> "Writing":
    """Creates the arrays of these layers, or extends them where they are too short.

    Raises:
      UserError: the disk is full or can't be written to.
    """
    short = [name for name in self._names(layers) if self._stored_rows(name) < self._rows]
    needed = sum(int(np.prod(self._shape(name))) * self._dtype(name).itemsize for name in short)
    try:
      os.makedirs(self.folder, exist_ok=True)
      free = shutil.disk_usage(self.folder).free
      if needed > free:
        raise UserError(
          f"features.cache: {self.folder} needs {units.data_size(needed)} for {len(layers)} layers of "
          f"{self._rows:,} images, {units.data_size(free)} are free; fix: config.features.layers, "
          "config.features.cache (config.scratch, if it is in a bucket) on another disk, or config.probe.cached=False (sgd, attentive)"
        )
      for name in short:
        self._lengthen(name)
      self._write("progress.json", self._progress)
      self._write("identity.json", self._identity)
    except OSError as error:
      raise UserError(
        f"features.cache: {self.folder}: {error.strerror or error}; expected a place to write to"
      ) from error
    return Writing(self, layers)

  def layer(self, layer: int) -> np.ndarray:
    """Features [N, width], mapped from disk; zeros where the image couldn't be read."""
    return self._open(f"layer-{layer:02d}", "r")

  def images(self) -> np.ndarray:
    return self._open("images", "r")

  def labels(self) -> np.ndarray:
    """Labels int32 [N], in memory; -1 where the image couldn't be read."""
    return np.array(self._open("labels", "r"))

  def _names(self, layers: Sequence[int]) -> list[str]:
    return ["labels", "images", *(f"layer-{layer:02d}" for layer in layers)]

  def _shape(self, name: str) -> tuple[int, ...]:
    return self._shapes.get(name, (self._rows, self._width))

  def _dtype(self, name: str) -> np.dtype:
    return np.dtype({"images": np.uint8, "labels": np.int32}.get(name, np.float32))

  def _path(self, name: str) -> str:
    return os.path.join(self.folder, f"{name}.npy")

  def _stored_rows(self, name: str) -> int:
    return len(self._load(name, "r")) if os.path.exists(self._path(name)) else 0

  def _lengthen(self, name: str) -> None:
    """Writes an array of all rows that begins with those stored."""
    stored = self._stored_rows(name)
    with files.replacing(self._path(name)) as partial:
      array = np.lib.format.open_memmap(partial, "w+", self._dtype(name), self._shape(name))
      if stored:
        array[:stored] = self._load(name, "r")
      if name == "labels":
        array[stored:] = -1
      array.flush()

  def _open(self, name: str, mode: Literal["r", "r+"]) -> np.memmap:
    """The first `rows` rows, mapped from disk."""
    array = self._load(name, mode)
    if len(array) < self._rows:
      raise self._misshapen(name, array)
    return cast(np.memmap, array[: self._rows])

  def _load(self, name: str, mode: Literal["r", "r+"]) -> np.memmap:
    """All rows on disk."""
    path = self._path(name)
    try:
      array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise UserError(
        f"features: {path} can't be read ({error}); fix: remove {self.folder}"
      ) from None
    # Of a scalar, shape[1:] would equal that of [N].
    row_shape, dtype = self._shape(name)[1:], self._dtype(name)
    if not array.ndim or array.shape[1:] != row_shape or array.dtype != dtype:
      raise self._misshapen(name, array)
    return array

  def _misshapen(self, name: str, array: np.ndarray) -> UserError:
    return UserError(
      f"features: {self._path(name)} is {array.dtype} {list(array.shape)}; expected "
      f"{self._dtype(name)} {list(self._shape(name))}; fix: remove {self.folder}"
    )

  def _write(self, name: str, values: Mapping[str, Any]) -> None:
    summary.write_json(os.path.join(self.folder, name), values)

  def _done(self, layers: Sequence[int], rows: int) -> None:
    # max: a layer computed further before keeps its rows.
    for layer in map(str, layers):
      self._progress[layer] = max(rows, self._progress.get(layer, 0))
    self._write("progress.json", self._progress)


class Writing:
  """Writer of a store's rows, in the split's order. Rows counted in `progress.json` are flushed first."""

  def __init__(self, store: FeatureStore, layers: Sequence[int]):
    self._store, self._layers = store, tuple(layers)
    self._arrays = [store._open(name, "r+") for name in store._names(layers)]
    self._saved = time.monotonic()

  def add(self, rows: FeatureRows, done: int) -> None:
    """Writes a batch, with which the split's first `done` rows are complete."""
    labels, images, *layers = self._arrays
    labels[rows.index], images[rows.index] = rows.labels, rows.images
    for array, features in zip(layers, rows.features, strict=True):
      array[rows.index] = features
    if done >= self._store._rows or time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
      self.save(done)

  def save(self, done: int) -> None:
    for array in self._arrays:
      array.flush()
    self._store._done(self._layers, min(done, self._store._rows))
    self._saved = time.monotonic()


def _read(path: str) -> dict[str, Any]:
  try:
    return files.read_json(path)
  except (OSError, ValueError) as error:
    raise _unreadable(path, error) from None


def _read_progress(path: str) -> dict[str, int]:
  progress = _read(path)
  for layer, rows in progress.items():
    if type(rows) is not int or rows < 0:
      raise _unreadable(path, f"layer {layer}: {rows!r} rows")
  return progress


def _unreadable(path: str, why: object) -> UserError:
  return UserError(f"features: {path} can't be read ({why}); fix: remove {os.path.dirname(path)}")
