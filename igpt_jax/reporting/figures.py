"""Figures made of images: grids with titles and column heads, and animations."""

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from igpt_jax.files import hub_snapshot, replacing

HIDDEN = 200  # grey of hidden pixels

_CELL = 128  # pixels that a grid's images are wide at least, by default
_LONGEST = 8_192  # pixels that a grid is long at most, by default
_FONT = 14  # pixels
_NARROWEST = 200  # pixels in which a title is wrapped at least


def default_scale(resolution: int) -> int:
  """Returns the scale at which a single image is about 96 pixels wide."""
  return max(1, round(96 / resolution))


def grid_scale(resolution: int, cells: int) -> int:
  """Returns the scale at which images are 128 pixels wide or more, or `cells` of them 8,192."""
  return max(1, min(-(-_CELL // resolution), _LONGEST // (cells * resolution)))


def checkpoint_name(path: str, step: int) -> str:
  """Returns a checkpoint's name in titles: its step, else the hub's name of it, else its folder."""
  if step:
    return f"step {step:,}"
  snapshot = hub_snapshot(path)
  return snapshot[0] if snapshot else os.path.basename(os.path.abspath(path))


def grid(
  rows: Sequence[Sequence[np.ndarray]],
  *,
  scale: int = 0,
  gap: int = 4,
  title: str = "",
  heads: Sequence[tuple[str, int]] = (),
) -> np.ndarray:
  """Lays images out in rows, left to right, below a title and column heads.

  Args:
    rows: lists of uint8 [H, W, 3], all of one size; shorter rows end in background.
    scale: side of the square that each pixel becomes; 0: `grid_scale`.
    gap: background pixels between images and around them.
    title: text above everything, wrapped to the grid's width. ASCII, as heads are.
    heads: (text, number of columns it stands above), left to right. If one is too long for its
      columns, all are written as a line below the title instead.

  Returns:
    uint8 [height, width, 3]. The images are at the bottom left: the text doesn't move them.
  """
  columns = max(len(row) for row in rows)
  scale = scale or grid_scale(max(rows[0][0].shape[:2]), max(columns, len(rows)))
  height, width = (side * scale for side in rows[0][0].shape[:2])
  shape = (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
  canvas = np.full(shape, 255, np.uint8)
  for r, row in enumerate(rows):
    for c, image in enumerate(row):
      top, left = gap + r * (height + gap), gap + c * (width + gap)
      enlarged = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
      canvas[top : top + height, left : left + width] = enlarged
  return _below_text(canvas, title, heads, gap, width) if title or heads else canvas


def samples(images: np.ndarray, *, scale: int = 0, title: str = "") -> np.ndarray:
  """Lays images [N, H, W, 3] out about twice as wide as high; `scale` and `title` as in `grid`."""
  columns = math.ceil(math.sqrt(2 * len(images)))
  rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
  return grid(rows, scale=scale, title=title)


def completions(
  known: np.ndarray,
  images: Sequence[tuple[np.ndarray, Sequence[np.ndarray] | np.ndarray]],
  *,
  scale: int = 0,
  title: str = "",
) -> np.ndarray:
  """Lays completions out: in a row what is given of an image, its completions, and the original.

  Args:
    known: mask of given pixels, broadcasts to [H, W].
    images: (original, its completions), all uint8 [H, W, 3].
    scale, title: as in `grid`.
  """
  rows = [[hide(original, known), *drawn, original] for original, drawn in images]
  title = f"{title}; grey: hidden from the model" if title else "Grey: hidden from the model"
  n = max(len(drawn) for _, drawn in images)
  heads = (("given", 1), ("completions" if n > 1 else "completion", n), ("original", 1))
  return grid(rows, scale=scale, title=title, heads=heads)


def _below_text(
  canvas: np.ndarray, title: str, heads: Sequence[tuple[str, int]], gap: int, cell: int
) -> np.ndarray:
  """Puts a title and column heads above a grid whose cells are `cell` pixels wide."""
  font = ImageFont.load_default(size=_FONT)
  assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels have FreeType"
  line_height = sum(font.getmetrics()) + 2
  spans, left = [], gap
  for text, columns in heads:
    spans.append((text, left, left + columns * (cell + gap) - gap))
    left += columns * (cell + gap)
  fit = all(font.getlength(text) <= end - begin for text, begin, end in spans)
  texts = [title] if title else []
  if not fit:
    named = [text if columns == 1 else f"{columns} {text}" for text, columns in heads]
    texts.append("left to right: " + ", ".join(named))
  wide = max(canvas.shape[1] - 2 * gap, _NARROWEST)
  lines = [line for text in texts for line in _wrapped(text, font, wide)]
  top = gap + (len(lines) + (1 if fit and heads else 0)) * line_height
  right = max([canvas.shape[1], *(round(font.getlength(line)) + 2 * gap for line in lines)])
  out = np.full((top + canvas.shape[0], right, 3), 255, np.uint8)
  out[top:, : canvas.shape[1]] = canvas
  drawing = Image.fromarray(out)
  pen = ImageDraw.Draw(drawing)
  for i, line in enumerate(lines):
    pen.text((gap, gap + i * line_height), line, font=font, fill=0)
  for text, begin, end in spans if fit else ():
    centre = (begin + end) // 2, top - 3
    pen.text(centre, text, font=font, fill=(64, 64, 64), anchor="mb")
    pen.line((begin, top - 1, end - 1, top - 1), fill=(160, 160, 160), width=1)
  return np.asarray(drawing)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
  """Breaks a text into lines of at most `width` pixels, or of one word."""
  lines = [""]
  for word in text.encode("ascii", "replace").decode().split():
    longer = f"{lines[-1]} {word}".lstrip()
    if lines[-1] and font.getlength(longer) > width:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


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
    scale: as in `grid`.
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
