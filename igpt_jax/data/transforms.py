"""Resizes, crops and augments a decoded image to the square uint8 image that the model sees.

Holds the paper's resizing and cropping (section 3.2), and CIFAR's augmentation. Pure functions of one
image and, where random, of a generator that the caller seeds; nothing here knows of data sets, batches
or palettes.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from igpt_jax import errors
from igpt_jax.data import image_decoding

# The pipeline parallelises over images; OpenCV's own pool would only fight with it for the cores.
cv2.setNumThreads(1)

# Increased whenever evaluation shows other pixels of the same file, which makes kept results stale.
EVALUATION_VERSION = 2

AUGMENTATIONS = ("none", "paper", "cifar", "shift")
RESAMPLINGS = ("fused", "literal")
PAPER_CROP = 224  # side of the crop, section 3.2
PAPER_SHORT_SIDE = (256, 384)  # range of the random shorter side, both ends included


# --- resampling ------------------------------------------------------------------------------------


def resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """uint8 [H, W, 3] to [height, width, 3]: mean over each target pixel's area.

  An axis that must grow has no area to average, and is interpolated linearly.
  """
  if image.shape[:2] == (height, width):
    return image
  shrinks = image.shape[0] >= height and image.shape[1] >= width
  method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  return cv2.resize(image, (width, height), interpolation=method)


def _resize_box(image: np.ndarray, box: tuple[float, float, float, float], side: int) -> np.ndarray:
  """Antialiased bilinear of a box (left, top, right, bottom) to side²: uint8 [side, side, 3].

  The triangle filter widens with the reduction, and reaches past the box as it would in a resize of
  the whole image, whose pixels these are; memory and time are those of the box.
  """
  left, top, right, bottom = box
  reach_x, reach_y = (math.ceil(length / side) + 1 for length in (right - left, bottom - top))
  x = max(0, math.floor(left) - reach_x)
  y = max(0, math.floor(top) - reach_y)
  part = image[y : math.ceil(bottom) + reach_y, x : math.ceil(right) + reach_x]
  # A product of floats may end a hair past the image's edge.
  box = left - x, top - y, min(right - x, part.shape[1]), min(bottom - y, part.shape[0])
  resized = Image.fromarray(part).resize((side, side), Image.Resampling.BILINEAR, box=box)
  return np.asarray(resized)


def _scaled_to_short_side(height: int, width: int, short_side: int) -> tuple[int, int]:
  """The size with the shorter side at `short_side` and the aspect ratio kept."""
  if height <= width:
    return short_side, max(short_side, round(width * short_side / height))
  return max(short_side, round(height * short_side / width)), short_side


class PaperCrop(typing.NamedTuple):
  """One draw of the paper's augmentation, in pixels of the image resized to height × width."""

  height: int
  width: int
  top: int
  left: int

  def source_box(self, height: int, width: int) -> tuple[int, int, int, int]:
    """The crop as left, top, right, bottom in whole pixels of the height × width original."""
    scale_y, scale_x = height / self.height, width / self.width
    box_height = min(height, max(1, round(PAPER_CROP * scale_y)))
    box_width = min(width, max(1, round(PAPER_CROP * scale_x)))
    top = min(round(self.top * scale_y), height - box_height)
    left = min(round(self.left * scale_x), width - box_width)
    return left, top, left + box_width, top + box_height


def draw_paper_crop(rng: np.random.Generator, height: int, width: int) -> PaperCrop:
  """Shorter side uniform in PAPER_SHORT_SIDE, position uniform over the valid ones."""
  short_side = int(rng.integers(PAPER_SHORT_SIDE[0], PAPER_SHORT_SIDE[1] + 1))
  new_height, new_width = _scaled_to_short_side(height, width, short_side)
  top = int(rng.integers(new_height - PAPER_CROP + 1))
  left = int(rng.integers(new_width - PAPER_CROP + 1))
  return PaperCrop(new_height, new_width, top, left)


def crop_literal(image: np.ndarray, crop: PaperCrop, resolution: int) -> np.ndarray:
  """The paper's words step by step: resize the image, crop 224², average to resolution².

  The paper names no filter. Antialiased bilinear, then the mean over areas, are this project's choice.
  What the crop leaves out isn't resized: of an image of 30,000×1 that would be gigabytes.
  """
  scale_y, scale_x = image.shape[0] / crop.height, image.shape[1] / crop.width
  left, top = crop.left * scale_x, crop.top * scale_y
  box = left, top, left + PAPER_CROP * scale_x, top + PAPER_CROP * scale_y
  return resize_area(_resize_box(image, box, PAPER_CROP), resolution, resolution)


def crop_fused(image: np.ndarray, crop: PaperCrop, resolution: int) -> np.ndarray:
  """The same crop in one step: a box of whole source pixels, averaged to resolution².

  The box moves by at most half a source pixel against `crop_literal`, and the blur of its first
  resize is missing.
  """
  left, top, right, bottom = crop.source_box(*image.shape[:2])
  return resize_area(image[top:bottom, left:right], resolution, resolution)


def fit(image: np.ndarray, resolution: int) -> np.ndarray:
  """Shorter side to `resolution`, centre crop; an image of that size is returned as it is."""
  height, width = image.shape[:2]
  if (height, width) == (resolution, resolution):
    return image
  # Cropping first spares the resize of what would be thrown away; the box is centred to the pixel.
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  return resize_area(image[top : top + side, left : left + side], resolution, resolution)


# --- the recipes -----------------------------------------------------------------------------------


def paper_eval(image: np.ndarray, resolution: int) -> np.ndarray:
  """Evaluation on ImageNet: shorter side 224, centre crop 224², down to resolution².

  An image whose shorter side is the model's own is cropped alone: no resize, no blur.
  """
  if min(image.shape[:2]) == resolution:
    return fit(image, resolution)
  height, width = _scaled_to_short_side(image.shape[0], image.shape[1], PAPER_CROP)
  centre = PaperCrop(height, width, (height - PAPER_CROP) // 2, (width - PAPER_CROP) // 2)
  return crop_literal(image, centre, resolution)


def paper_train(
  image: np.ndarray, rng: np.random.Generator, resolution: int, resample: str = "fused"
) -> np.ndarray:
  """Training on ImageNet: shorter side random in [256, 384], random 224² crop, down to resolution²."""
  crop = draw_paper_crop(rng, *image.shape[:2])
  function = crop_fused if resample == "fused" else crop_literal
  return function(image, crop, resolution)


def paper_train_encoded(
  data: bytes | np.ndarray, rng: np.random.Generator, resolution: int, record_id: str = "picture"
) -> np.ndarray:
  """`paper_train` of the decoded image, for less: a JPEG is decoded only down to the crop's end."""
  if not isinstance(data, bytes) or (frame := image_decoding.plain_frame(data)) is None:
    return paper_train(image_decoding.decode(data, record_id), rng, resolution)
  height, width = (int.from_bytes(data[i : i + 2], "big") for i in (frame + 5, frame + 7))
  image_decoding.check_size(height, width, record_id, len(data))
  crop = draw_paper_crop(rng, height, width)
  left, top, right, bottom = crop.source_box(height, width)
  image = image_decoding.decode_top(data, frame, bottom)
  if image is None:
    return crop_fused(image_decoding.decode(data, record_id), crop, resolution)
  return resize_area(image[top:bottom, left:right], resolution, resolution)


def cifar_train(image: np.ndarray, rng: np.random.Generator, resolution: int) -> np.ndarray:
  """CIFAR fine-tuning: reflect-pad 4, random crop of the image or its mirror image."""
  image = fit(image, resolution)
  top, left = (int(x) for x in rng.integers(0, 9, size=2))
  mirrored = bool(rng.integers(2))
  padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
  window = padded[top : top + resolution, left : left + resolution]
  return window[:, ::-1] if mirrored else window


def shift_train(image: np.ndarray, rng: np.random.Generator, resolution: int) -> np.ndarray:
  """Every other image is moved by up to an eighth of its side; what comes in is black.

  Not the paper's: for small sets of drawings on black, where flips would change the meaning.
  """
  image = fit(image, resolution)
  reach = max(1, resolution // 8)
  moved = rng.random() < 0.5
  top, left = rng.integers(0, 2 * reach + 1, 2) if moved else (reach, reach)
  padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)))
  return np.ascontiguousarray(padded[top : top + resolution, left : left + resolution])


def train_transform(
  augment: str, resolution: int, resample: str = "fused"
) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
  """The training recipe of that name: (uint8 [H, W, 3], generator) -> uint8 [R, R, 3]."""
  check_recipe(augment, resolution, resample)
  if augment == "paper":
    return lambda image, rng: paper_train(image, rng, resolution, resample)
  if augment == "cifar":
    return lambda image, rng: cifar_train(image, rng, resolution)
  if augment == "shift":
    return lambda image, rng: shift_train(image, rng, resolution)
  return lambda image, rng: fit(image, resolution)


def eval_transform(augment: str, resolution: int) -> Callable[[np.ndarray], np.ndarray]:
  """The evaluation that goes with a training recipe: uint8 [H, W, 3] -> uint8 [R, R, 3]."""
  check_recipe(augment, resolution)
  if augment == "paper":
    return lambda image: paper_eval(image, resolution)
  return lambda image: fit(image, resolution)


def check_recipe(augment: str, resolution: int, resample: str = "fused") -> None:
  """Raises UserError for a recipe that doesn't exist."""
  if augment not in AUGMENTATIONS:
    raise errors.UserError(f"data.augment: {augment!r}; expected one of {', '.join(AUGMENTATIONS)}")
  if resample not in RESAMPLINGS:
    raise errors.UserError(f"data.resample: {resample!r}; expected one of {', '.join(RESAMPLINGS)}")
  limit = PAPER_CROP if augment == "paper" else 1024
  if not 1 <= resolution <= limit:
    raise errors.UserError(f"data.resolution: {resolution}; expected 1 to {limit}")
  if augment == "cifar" and resolution < 5:
    raise errors.UserError(f"data.resolution: {resolution}; expected 5 or more to reflect 4 pixels")
