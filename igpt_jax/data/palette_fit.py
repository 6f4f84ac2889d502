"""Fits a palette to images: one pass into a colour histogram, then weighted k-means.

The cost of clustering doesn't depend on the number of pixels, so that data sets of any size are read
once and completely.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from igpt_jax import errors
from igpt_jax.data import palette as palette_lib

_FLUSH = 2**24  # number of pixels that are collected before they are counted
_COARSE_BITS = 5  # bits per channel of the bins on which the centres are first placed
_N_HEAVY = 2**17  # number of fine bins that aren't pooled
_STEPS = 20  # Lloyd steps, on coarse points and again on fine ones
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class ColorHistogram:
  """Counts of all 2²⁴ colours: 128 MB for any number of images."""

  def __init__(self):
    self.n_pixels = 0
    self._counts = np.zeros(2**24, np.int64)
    self._waiting: list[np.ndarray] = []
    self._n_waiting = 0

  def add(self, images: np.ndarray) -> None:
    """Counts the pixels of images, uint8 [..., 3]."""
    codes = palette_lib.color_codes(images)
    self._waiting.append(codes)
    self._n_waiting += codes.size
    self.n_pixels += codes.size
    if self._n_waiting >= _FLUSH:
      self._flush()

  def _flush(self) -> None:
    if self._waiting:
      self._counts += np.bincount(np.concatenate(self._waiting), minlength=2**24)
      self._waiting, self._n_waiting = [], 0

  def colors(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct colours, uint8 [n, 3], and their counts, int64 [n]."""
    self._flush()
    codes = np.flatnonzero(self._counts)
    return palette_lib.codes_to_colors(codes), self._counts[codes]


@dataclasses.dataclass(frozen=True)
class PaletteError:
  """Error of encoding with a palette. `mse` is per channel, in levels² of 0..255; `psnr` in dB."""

  mse: float
  psnr: float
  n_pixels: int


def palette_error(palette: palette_lib.Palette, images: Iterable[np.ndarray]) -> PaletteError:
  """Measures the error of encoding and decoding images, uint8 [..., 3]."""
  total, n_values = 0, 0
  for batch in images:
    difference = batch.astype(np.int32) - palette.decode(palette.encode(batch))
    total += int(np.square(difference, dtype=np.int64).sum())
    n_values += batch.size
  if not n_values:
    raise errors.UserError("palette: no held-out images to measure its error; expected one or more")
  mse = total / n_values
  psnr = 10 * math.log10(255**2 / mse) if mse else math.inf
  return PaletteError(mse, psnr, n_values // 3)


def fit_palette(
  images: Iterable[np.ndarray] | ColorHistogram, k: int = 512, *, seed: int = 0
) -> palette_lib.Palette:
  """Clusters the colours of images.

  Images with at most k distinct colours get exactly those colours, so the palette may be smaller
  than k. Fit on images at the model's resolution: reduction narrows the distribution of colours.

  Args:
    images: uint8 [..., 3] arrays, read once; or their histogram.
    k: number of colours.
    seed: seed of k-means++.

  Returns:
    The palette, its colours ordered by luminance. Rounding them to whole levels costs about 0.006 dB.
  """
  if not 1 <= k <= palette_lib.MAX_SIZE:
    raise errors.UserError(f"palette size: {k}; expected 1 to {palette_lib.MAX_SIZE}")
  if isinstance(images, ColorHistogram):
    histogram = images
  else:
    histogram = ColorHistogram()
    for batch in images:
      histogram.add(batch)
  colors, counts = histogram.colors()
  if not len(colors):
    raise errors.UserError("palette: no images to fit it to; expected at least one")
  if len(colors) <= k:
    return palette_lib.Palette.from_uint8(_by_luminance(colors))
  centers = _cluster(colors, counts, k, seed)
  levels = _distinct(np.rint(centers).clip(0, 255).astype(np.uint8), colors, counts)
  return palette_lib.Palette.from_uint8(_by_luminance(levels))


def _cluster(colors: np.ndarray, counts: np.ndarray, k: int, seed: int) -> np.ndarray:
  """Runs k-means++ and weighted Lloyd steps on coarse bins, then on fine ones: float [k, 3] in levels.

  Uses one thread: several would sum in varying order, but all hosts and runs must get the same palette.
  """
  import threadpoolctl
  from sklearn import cluster

  coarse, fine = _binned(colors, counts, _COARSE_BITS), _points(colors, counts)
  if len(coarse[0]) < 4 * k:  # too few bins to choose the centres from
    coarse = fine
  with threadpoolctl.threadpool_limits(1):
    points, weights = coarse
    centers, _ = cluster.kmeans_plusplus(points, k, sample_weight=weights, random_state=seed)
    for points, weights in (coarse, fine):
      # Typed Any: scikit-learn's annotations know only the defaults' types.
      options: dict[str, Any] = {"init": centers, "n_init": 1, "max_iter": _STEPS, "tol": 0}
      kmeans = cluster.KMeans(k, **options)
      centers = kmeans.fit(points, sample_weight=weights).cluster_centers_
  return centers


def _points(colors: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Reduces colours to fewer weighted points: float32 [n, 3] and their numbers of pixels [n].

  Bins are fine where there are many pixels, elsewhere coarse: nearly the error of all colours (24.4
  instead of 24.2 on CIFAR-10's 1.7 million) at a tenth of the cost.
  """
  if len(colors) <= _N_HEAVY:
    return colors.astype(np.float32), counts.astype(np.float64)
  points, weights = _binned(colors, counts, 7)
  order = np.argsort(-weights, kind="stable")
  heavy, light = np.sort(order[:_N_HEAVY]), np.sort(order[_N_HEAVY:])
  pooled = _binned(points[light], weights[light], 6)
  return np.concatenate([points[heavy], pooled[0]]), np.concatenate([weights[heavy], pooled[1]])


def _binned(colors: np.ndarray, counts: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
  """Pools colours into 2^bits bins a channel: mean colours, float32 [n, 3], and numbers of pixels [n]."""
  bins = colors.astype(np.int32) >> (8 - bits)
  codes = (bins[:, 0] << 2 * bits) | (bins[:, 1] << bits) | bins[:, 2]
  n = 2 ** (3 * bits)
  weights = np.bincount(codes, counts, n)
  used = np.flatnonzero(weights)
  sums = [np.bincount(codes, counts * colors[:, c].astype(np.float64), n)[used] for c in range(3)]
  return (np.stack(sums, -1) / weights[used, None]).astype(np.float32), weights[used]


def _distinct(levels: np.ndarray, colors: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Replaces centres that rounding made equal by the colours of largest error, so that k remain."""
  k = len(levels)
  levels = np.unique(levels, axis=0)
  if len(levels) < k:
    palette = palette_lib.Palette.from_uint8(levels)
    nearest = palette.decode(palette.encode(colors)).astype(np.int64)
    cost = np.square(colors - nearest).sum(-1) * counts
    levels = np.concatenate([levels, colors[np.argsort(-cost, kind="stable")[: k - len(levels)]]])
  return levels


def _by_luminance(colors: np.ndarray) -> np.ndarray:
  """Sorts colours from dark to bright; those of equal luminance by red, green, blue."""
  values = colors.astype(np.float64)
  order = np.lexsort((values[:, 2], values[:, 1], values[:, 0], values @ _LUMINANCE))
  return colors[order]
