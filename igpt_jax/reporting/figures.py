"""Figures: grids of images, animations and plots."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from igpt_jax.files import replacing

HIDDEN = 200  # grey of hidden pixels


def default_scale(resolution: int) -> int:
  """Scale at which an image is about 96 pixels wide."""
  return max(1, round(96 / resolution))


def grid(rows: Sequence[Sequence[np.ndarray]], *, scale: int, gap: int = 4) -> np.ndarray:
  """Lays images out in rows, left to right.

  Args:
    rows: lists of uint8 [H, W, 3], all of one size; shorter rows end in background.
    scale: side of the square that each pixel becomes.
    gap: background pixels between images and around them.

  Returns:
    uint8 [height, width, 3].
  """
  height, width = (side * scale for side in rows[0][0].shape[:2])
  columns = max(len(row) for row in rows)
  shape = (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
  canvas = np.full(shape, 255, np.uint8)
  for r, row in enumerate(rows):
    for c, image in enumerate(row):
      top, left = gap + r * (height + gap), gap + c * (width + gap)
      enlarged = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
      canvas[top : top + height, left : left + width] = enlarged
  return canvas


def hide(image: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Greys out unknown pixels; `known` broadcasts to [H, W]."""
  return np.where(known[..., None], image, np.uint8(HIDDEN))


def save_png(path: str, image: np.ndarray) -> None:
  with replacing(path) as partial:
    Image.fromarray(image).save(partial, format="PNG")


def appearing(
  images: Sequence[np.ndarray], n_given: int, *, columns: int, scale: int, frames: int = 48
) -> list[np.ndarray]:
  """Returns frames of a grid of images whose pixels appear in raster order.

  Args:
    images: complete images, uint8 [H, W, 3].
    n_given: pixels shown from the first frame on.
    columns: columns of the grid.
    scale: side of the square that each pixel becomes.
    frames: number of frames at most, besides the first one.
  """
  n_pixels = images[0].shape[0] * images[0].shape[1]
  step = max(1, -(-(n_pixels - n_given) // frames))
  laid_out = []
  for shown in [*range(n_given, n_pixels, step), n_pixels]:
    partial = [image.copy() for image in images]
    for image in partial:
      image.reshape(n_pixels, 3)[shown:] = HIDDEN
    rows = [partial[start : start + columns] for start in range(0, len(partial), columns)]
    laid_out.append(grid(rows, scale=scale))
  return laid_out


def save_gif(path: str, frames: Sequence[np.ndarray], *, milliseconds: int = 80) -> None:
  """Saves a looping animation whose last frame stays for two seconds."""
  # One palette for all frames, so that colours don't flicker: that of the first and last frames.
  both = Image.fromarray(np.concatenate([frames[0], frames[-1]]))
  palette = both.quantize(256, dither=Image.Dither.NONE)
  images = [
    Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames
  ]
  duration = [milliseconds] * (len(images) - 1) + [2_000]
  with replacing(path) as partial:
    images[0].save(
      partial, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0
    )


def plot(
  path: str,
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str,
  x_label: str,
  y_label: str,
  levels: Mapping[str, float] | None = None,
  spread: Mapping[str, Sequence[float]] | None = None,
  whole_steps: bool = False,
  markers: bool = False,
  reverse_x: bool = False,
  x_ticks: Sequence[float] = (),
) -> None:
  """Draws curves, and dashed horizontal levels, into a PNG.

  Args:
    path: path of the PNG.
    curves: name -> (xs, ys).
    title, x_label, y_label: texts of the figure.
    levels: name -> y.
    spread: name of a curve -> half the length of the error bar at each point.
    whole_steps: True if x is a small integer (a layer): markers on points, ticks at integers only.
    markers: True for markers on points.
    reverse_x: True if x decreases to the right.
    x_ticks: all ticks of a logarithmic x axis; (): the axis is linear.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot, ticker

  figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
  for name, (xs, ys) in curves.items():
    marker = "o" if whole_steps or markers or spread else None
    bars = (spread or {}).get(name)
    axes.errorbar(
      xs, ys, yerr=bars, label=name, marker=marker, markersize=5, linewidth=1.5, capsize=3
    )
  for (name, level), colour in zip((levels or {}).items(), ("0.35", "0.6", "0.75"), strict=False):
    axes.axhline(level, linestyle="--", color=colour, label=name, linewidth=1.2)
  axes.set(title=title, xlabel=x_label, ylabel=y_label)
  if whole_steps:
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  if reverse_x:
    axes.invert_xaxis()
  if x_ticks:
    axes.set_xscale("log")
    axes.set_xticks(x_ticks, labels=[f"{x:g}" for x in x_ticks])
    axes.minorticks_off()
  axes.grid(alpha=0.3)
  axes.legend()
  with replacing(path) as partial:
    figure.savefig(partial, dpi=130, format="png")
  pyplot.close(figure)
