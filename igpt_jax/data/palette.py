"""Palettes: convert colours to tokens and back, as the paper's 9-bit palette (section 3.2).

`palette_fit` fits them.
"""

from __future__ import annotations

import os
import pathlib
import threading
from typing import Any

import numpy as np

from igpt_jax import errors, files

MAX_SIZE = 65535  # tokens are uint16, and the lookup table stores token + 1
_CUBE = 16  # side of the cubes of colours by which the lookup table is filled


class Palette:
  """k colours; an image's tokens are the indices of its pixels' nearest colours.

  Nearest is by squared Euclidean distance, exactly; the lowest index wins ties. Distances are computed
  in integers if all centres are whole levels of 0..255, otherwise in float64 from the float32 centres.

  Attributes:
    centers: float32 [k, 3], RGB in [-1, 1], the original's convention (x / 127.5 - 1).
    is_uint8: True if all centres are whole levels of 0..255.
    fitted_to: fingerprint of the images that it was fitted to in this process; "" if it was read.
  """

  fitted_to = ""

  def __init__(self, centers: Any, name: str = "palette"):
    """Checks `centers`, float [k, 3] in [-1, 1]; `name` is the palette's name in errors."""
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
    # The published palettes touch ±1, so allow for a rounding error.
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
    """Returns the palette of uint8 [k, 3] colours."""
    return cls((np.asarray(levels, np.float64) / 127.5 - 1).astype(np.float32))

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Palette:
    """Reads a .npy file in the original's format; raises UserError for anything else."""
    expected = "a .npy file of float [k, 3] colours in [-1, 1]"
    try:
      with files.opened(os.fspath(path)) as file:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      why = getattr(error, "strerror", None) or error
      raise errors.UserError(f"palette {path}: {why}; expected {expected}") from error
    if not isinstance(array, np.ndarray):
      raise errors.UserError(f"palette {path}: an archive of arrays; expected {expected}")
    return cls(array, name=f"palette {path}")

  @classmethod
  def from_setting(cls, path: str) -> Palette:
    """Loads the palette that `palette.path` names: a .npy file, or "default" for the project's own."""
    return cls.default() if path == "default" else cls.load(files.place("palette.path", path))

  @classmethod
  def default(cls) -> Palette:
    """Loads the project's 512 colours; assets/README.md has their origin."""
    return cls.load(pathlib.Path(__file__).parent / "assets" / "palette512.npy")

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes float32 [k, 3] in [-1, 1] as .npy; the file appears whole or not at all."""
    path = files.place("palette", os.fspath(path))
    files.make_folder(os.path.dirname(path))
    with files.replacing(path) as partial, open(partial, "wb") as file:
      np.save(file, self.centers)

  @property
  def size(self) -> int:
    """Number of colours, the model's n_vocab."""
    return len(self.centers)

  @property
  def colors(self) -> np.ndarray:
    """The colours as `decode` returns them, rint(127.5 (c + 1)): uint8 [k, 3]."""
    return self._levels

  def encode(self, images: np.ndarray) -> np.ndarray:
    """Maps uint8 [..., 3] to the indices of the nearest colours, uint16 [...].

    Looks every pixel up in a table of all 2²⁴ colours (32 MB), which is filled cube by cube when a
    colour is first seen. Threads may share it.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[-1:] != (3,):
      raise ValueError(f"expected uint8 [..., 3], got {images.dtype} {images.shape}")
    codes = color_codes(images)
    tokens = self._table.take(codes)
    if not tokens.all():
      with self._filling:
        tokens = self._table.take(codes)  # another thread may have filled the cubes meanwhile
        self._fill(codes[tokens == 0])
      tokens = self._table.take(codes)
    return (tokens - np.uint16(1)).reshape(images.shape[:-1])

  def decode(self, tokens: np.ndarray) -> np.ndarray:
    """Maps integer [...] in 0..k-1 to uint8 [..., 3]: rint(127.5 (c + 1)), as the original does."""
    return self._levels[np.asarray(tokens)]

  def _fill(self, codes: np.ndarray) -> None:
    """Fills the table for every cube of colours that contains one of these codes."""
    cubes = np.zeros((16, 16, 16), bool)
    cubes[codes >> 20, (codes >> 12) & 15, (codes >> 4) & 15] = True
    table = self._table.reshape(256, 256, 256)
    for blue, green, red in np.argwhere(cubes) * _CUBE:
      nearest = self._nearest_in_cube(np.array([red, green, blue]))
      table[blue : blue + _CUBE, green : green + _CUBE, red : red + _CUBE] = nearest + 1

  def _nearest_in_cube(self, corner: np.ndarray) -> np.ndarray:
    """Returns the nearest centres of the 16³ colours from `corner` (r, g, b) on, int [blue, green, red].

    Compares only centres that can be nearest to a colour of the cube: those no farther from its
    nearest point than some centre is from all of its points.
    """
    centers: np.ndarray = self._levels.astype(np.int32)
    side = corner + np.arange(_CUBE)[:, None]
    if not self.is_uint8:
      centers, side = self.centers.astype(np.float64), side / 127.5 - 1
    inner = np.square(np.clip(centers, side[0], side[-1]) - centers).sum(-1)
    outer = np.square(np.maximum(abs(centers - side[0]), abs(centers - side[-1]))).sum(-1)
    # The slack exceeds float64's rounding errors, and makes no difference to integers.
    candidates = np.flatnonzero(inner <= outer.min() + 1e-9)
    # Square the differences: expanding the square would lose digits and change how ties are broken.
    red, green, blue = np.square(side[:, None] - centers[candidates]).transpose(2, 0, 1)
    distance = (red + green[:, None])[None] + blue[:, None, None]
    return candidates[distance.argmin(-1)]

  def _new_table(self) -> None:
    # token + 1 of every colour; 0 where it isn't computed yet. Untouched pages take no memory.
    self._table = np.zeros(2**24, np.uint16)
    self._filling = threading.Lock()

  def __getstate__(self):
    # The table is a cache; every worker process fills its own.
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
  """Maps uint8 [..., 3] to r + 256 g + 65536 b of every pixel, flattened to int32 [n]."""
  quads = np.zeros((images.size // 3, 4), np.uint8)
  quads[:, :3] = images.reshape(-1, 3)
  return quads.view("<u4").reshape(-1).astype(np.int32, copy=False)


def codes_to_colors(codes: np.ndarray) -> np.ndarray:
  """Inverts `color_codes`: int [n] to uint8 [n, 3]."""
  codes = np.ascontiguousarray(codes, dtype="<u4")
  return codes.view(np.uint8).reshape(-1, 4)[:, :3]
