"""Colours to tokens and back: the 9-bit palette of the paper, section 3.2.

Holds the palette itself, on the host and on the device. Its fitting lives in `palette_fit`.
"""

from __future__ import annotations

import os
import pathlib
import threading
from typing import Any

import numpy as np

from igpt_jax import errors, files

MAX_SIZE = 65535  # tokens are uint16, and the table below stores token + 1
_CUBE = 16  # side of the cubes in which the table of nearest centres is filled


class Palette:
  """k colours; an image's tokens are the indices of its pixels' nearest colours.

  Nearest is exact: squared Euclidean distance, the lowest index wins ties. Where every centre is a
  whole number of 0..255 it is computed in whole numbers, so that every backend agrees; otherwise in
  float64, from the float32 centres as the original's kmeans_centers.npy holds them.

  Attributes:
    centers: float32 [k, 3], RGB in [-1, 1], the original's convention (x / 127.5 - 1).
    fitted_to: fingerprint of the images that it was fitted to in this process; "": it was read.
  """

  fitted_to = ""

  def __init__(self, centers: Any, name: str = "palette"):
    """Checks `centers`, [k, 3] in [-1, 1]; `name` is what errors call it."""
    try:
      array = np.asarray(centers)
    except ValueError as error:
      raise errors.UserError(f"{name}: {error}; expected float [k, 3] colours") from error
    hint = "fix: make one with --config.job=fit_palette, or give the original's kmeans_centers.npy"
    if array.ndim != 2 or array.shape[-1] != 3 or not 1 <= array.shape[0] <= MAX_SIZE:
      raise errors.UserError(f"{name}: shape {list(array.shape)}; expected [k, 3] colours; {hint}")
    if not np.issubdtype(array.dtype, np.floating):
      raise errors.UserError(f"{name}: dtype {array.dtype}; expected floats in [-1, 1]; {hint}")
    if not np.isfinite(array).all():
      raise errors.UserError(f"{name}: has NaN or infinite colours; expected [-1, 1]; {hint}")
    # The published palettes touch ±1; a rounding error past it is no reason to refuse one.
    if np.abs(array).max() > 1 + 1e-4:
      raise errors.UserError(
        f"{name}: colours from {array.min():.4g} to {array.max():.4g}; expected [-1, 1]; {hint}"
      )
    self.centers = np.ascontiguousarray(array, dtype=np.float32)
    self.centers.flags.writeable = False
    self._new_table()
    levels = 127.5 * (self.centers.astype(np.float64) + 1)
    self._levels = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    # float32 holds u / 127.5 - 1 to 1e-5 of a level, so whole levels can't be confused.
    self.is_uint8 = bool(np.abs(levels - np.rint(levels)).max() < 1e-4)

  @classmethod
  def from_uint8(cls, levels: np.ndarray) -> Palette:
    """The palette of uint8 [k, 3] colours."""
    return cls((np.asarray(levels, np.float64) / 127.5 - 1).astype(np.float32))

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Palette:
    """Reads a .npy file in the original's format; anything else is a UserError that names it."""
    expected = "a .npy file of float [k, 3] colours in [-1, 1]"
    try:
      with open(path, "rb") as file:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      why = getattr(error, "strerror", None) or error
      raise errors.UserError(f"palette {path}: {why}; expected {expected}") from error
    if not isinstance(array, np.ndarray):
      raise errors.UserError(f"palette {path}: an archive of arrays; expected {expected}")
    return cls(array, name=f"palette {path}")

  @classmethod
  def given(cls, path: str) -> Palette:
    """Loads the palette that `palette.path` names: a .npy file, or "default" for the project's own."""
    return cls.default() if path == "default" else cls.load(files.local("palette.path", path))

  @classmethod
  def default(cls) -> Palette:
    """Loads the project's 512 colours; assets/README.md has their origin."""
    return cls.load(pathlib.Path(__file__).parent / "assets" / "palette512.npy")

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes float32 [k, 3] in [-1, 1] as .npy; the file appears whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial, open(partial, "wb") as file:
      np.save(file, self.centers)

  @property
  def size(self) -> int:
    """Number of colours, the model's n_vocab."""
    return len(self.centers)

  @property
  def colors(self) -> np.ndarray:
    """uint8 [k, 3]: what `decode` paints, rint(127.5 (c + 1))."""
    return self._levels

  def encode(self, images: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] to uint16 [...], the index of the nearest colour.

    A table of all 2²⁴ colours (32 MB), filled in cubes as their colours are first met: no start-up
    cost, and a lookup per pixel from then on. Threads may share it.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[-1:] != (3,):
      raise ValueError(f"expected uint8 [..., 3], got {images.dtype} {images.shape}")
    codes = color_codes(images)
    tokens = self._table.take(codes)
    if not tokens.all():
      with self._filling:
        tokens = self._table.take(codes)  # another thread may have filled it meanwhile
        self._fill(codes[tokens == 0])
      tokens = self._table.take(codes)
    return (tokens - np.uint16(1)).reshape(images.shape[:-1])

  def decode(self, tokens: np.ndarray) -> np.ndarray:
    """Integer [...] in 0..k-1 to uint8 [..., 3]: rint(127.5 (c + 1)), as the original does."""
    return self._levels[np.asarray(tokens)]

  def _fill(self, codes: np.ndarray) -> None:
    """Completes the table for every cube of colours that holds one of these codes."""
    cubes = np.zeros((16, 16, 16), bool)
    cubes[codes >> 20, (codes >> 12) & 15, (codes >> 4) & 15] = True
    table = self._table.reshape(256, 256, 256)
    for blue, green, red in np.argwhere(cubes) * _CUBE:
      nearest = self._nearest_in_cube(np.array([red, green, blue]))
      table[blue : blue + _CUBE, green : green + _CUBE, red : red + _CUBE] = nearest + 1

  def _nearest_in_cube(self, corner: np.ndarray) -> np.ndarray:
    """Nearest centre of the 16³ colours from `corner` (r, g, b) on: int [blue, green, red].

    Only centres that may be nearest to some colour of the cube are compared: those no farther from
    its nearest point than another centre is from all of its points.
    """
    if self.is_uint8:
      centers, side = self._levels.astype(np.int32), corner + np.arange(_CUBE)[:, None]
    else:
      centers, side = (
        self.centers.astype(np.float64),
        (corner + np.arange(_CUBE)[:, None]) / 127.5 - 1,
      )
    inner = np.square(np.clip(centers, side[0], side[-1]) - centers).sum(-1)
    outer = np.square(np.maximum(abs(centers - side[0]), abs(centers - side[-1]))).sum(-1)
    # The slack is far above float64's rounding here, and nothing to whole numbers.
    candidates = np.flatnonzero(inner <= outer.min() + 1e-9)
    # Differences first, then squares: expanding the square would cancel digits and break ties anew.
    red, green, blue = np.square(side[:, None] - centers[candidates]).transpose(2, 0, 1)
    distance = (red + green[:, None])[None] + blue[:, None, None]
    return candidates[distance.argmin(-1)]

  def _new_table(self) -> None:
    # token + 1 of each colour, 0 where not yet asked for. Untouched pages of zeros cost nothing.
    self._table = np.zeros(2**24, np.uint16)
    self._filling = threading.Lock()

  def __getstate__(self):
    # The table is a cache; a worker process fills its own.
    return {k: v for k, v in self.__dict__.items() if k not in ("_table", "_filling")}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._new_table()

  def __eq__(self, other):
    return isinstance(other, Palette) and np.array_equal(self.centers, other.centers)

  def __hash__(self):
    return hash(self.centers.tobytes())

  def __repr__(self):
    return f"Palette(size={self.size}, uint8={self.is_uint8})"


def color_codes(images: np.ndarray) -> np.ndarray:
  """uint8 [..., 3] to int32 [n]: r + 256 g + 65536 b of every pixel, flattened."""
  quads = np.zeros((images.size // 3, 4), np.uint8)
  quads[:, :3] = images.reshape(-1, 3)
  return quads.view("<u4").reshape(-1).astype(np.int32, copy=False)


def codes_to_colors(codes: np.ndarray) -> np.ndarray:
  """The inverse of `color_codes`: int [n] to uint8 [n, 3]."""
  codes = np.ascontiguousarray(codes, dtype="<u4")
  return codes.view(np.uint8).reshape(-1, 4)[:, :3]
