"""Images for people: grids of samples, and curves."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from igpt_jax.files import replacing

HIDDEN = 200  # the grey of pixels that aren't there


def default_scale(resolution: int) -> int:
  """Image pixels per model pixel, so that a thumb-nail is about 96 pixels wide."""
  return max(1, round(96 / resolution))


def grid(rows: Sequence[Sequence[np.ndarray]], *, scale: int, gap: int = 4) -> np.ndarray:
  """Lays images out in rows, left to right.

  Args:
    rows: lists of uint8 [H, W, 3], all of one size; shorter rows end in background.
    scale: side of the square that a pixel becomes.
    gap: background pixels between images and around them.

  Returns:
    uint8 [height, width, 3].
  """
  height, width = (side * scale for side in rows[0][0].shape[:2])
  columns = max(len(row) for row in rows)
  canvas = np.full(
    (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8
  )
  for r, row in enumerate(rows):
    for c, image in enumerate(row):
      top, left = gap + r * (height + gap), gap + c * (width + gap)
      enlarged = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
      canvas[top : top + height, left : left + width] = enlarged
  return canvas


def hide(image: np.ndarray, known: np.ndarray) -> np.ndarray:
  """The image with all that isn't known greyed out; `known` broadcasts to [H, W]."""
  return np.where(known[..., None], image, np.uint8(HIDDEN))


def save_png(path: str, image: np.ndarray) -> None:
  with replacing(path) as partial:
    Image.fromarray(image).save(partial, format="PNG")


def appearing(
  images: Sequence[np.ndarray], n_given: int, *, columns: int, scale: int, frames: int = 48
) -> list[np.ndarray]:
  """Frames of images whose pixels appear one after the other, in raster order.

  Args:
    images: uint8 [H, W, 3], whole.
    n_given: pixels that are there from the beginning.
    columns: of the grid that they are laid out in.
    scale: side of the square that a pixel becomes.
    frames: at most, beside the first one.
  """
  n_pixels = images[0].shape[0] * images[0].shape[1]
  step = max(1, -(-(n_pixels - n_given) // frames))
  laid_out = []
  for shown in [*range(n_given, n_pixels, step), n_pixels]:
    partial = [each.copy() for each in images]
    for each in partial:
      each.reshape(n_pixels, 3)[shown:] = HIDDEN
    rows = [partial[start : start + columns] for start in range(0, len(partial), columns)]
    laid_out.append(grid(rows, scale=scale))
  return laid_out


def save_gif(path: str, frames: Sequence[np.ndarray], *, milliseconds: int = 80) -> None:
  """An animation that repeats; its last frame stays for two seconds."""
  # One palette for all frames, or colours would flicker: of the last one, beside the first one's grey.
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
    path: of the PNG.
    curves: name -> (xs, ys).
    title, x_label, y_label: what is written on it.
    levels: name -> y.
    spread: of a curve's points, half the length of a bar at each.
    whole_steps: x counts few things (layers): a marker on each, ticks at whole numbers alone.
    markers: on each point.
    reverse_x: falls to the right.
    x_ticks: the only ones, on a logarithmic axis.
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
