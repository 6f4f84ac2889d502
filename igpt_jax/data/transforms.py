"""Resizes, crops and augments a decoded image to the square uint8 image that the model sees.

The paper's resizing and cropping (section 3.2), and CIFAR's augmentation, as pure functions of one
image and, if random, of a generator; independent of data sets, batches and palettes.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from igpt_jax import errors
from igpt_jax.data import image_decoding

# The pipeline parallelises over images; OpenCV's own threads would compete with it for the cores.
cv2.setNumThreads(1)

# Increase whenever evaluation yields other pixels for the same file, so that kept results become stale.
EVALUATION_VERSION = 2

AUGMENTATIONS = ("none", "paper", "cifar", "shift", "photo")
RESAMPLINGS = ("fused", "literal")
PAPER_CROP = 224  # side of the crop, section 3.2
PAPER_SHORT_SIDE = (256, 384)  # range of the random shorter side, both ends included
_PHOTO_SHARE = 0.7  # least side of a photo's crop, of the shorter side
_PHOTO_SIDE = 2  # a photo's shorter side, of the resolution, from which crops are taken


# --- resampling ------------------------------------------------------------------------------------


def resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes uint8 [H, W, 3] to [height, width, 3]: the mean over every target pixel's area.

  Interpolates linearly if an axis grows.
  """
  if image.shape[:2] == (height, width):
    return image
  shrinks = image.shape[0] >= height and image.shape[1] >= width
  method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  return cv2.resize(image, (width, height), interpolation=method)


def _resize_box(image: np.ndarray, box: tuple[float, float, float, float], side: int) -> np.ndarray:
  """Resizes a box (left, top, right, bottom), antialiased bilinear, to uint8 [side, side, 3].

  Gives the pixels that resizing the whole image would give (the filter reaches past the box), but with
  the memory and time of the box.
  """
  left, top, right, bottom = box
  reach_x, reach_y = (math.ceil(length / side) + 1 for length in (right - left, bottom - top))
  x = max(0, math.floor(left) - reach_x)
  y = max(0, math.floor(top) - reach_y)
  part = image[y : math.ceil(bottom) + reach_y, x : math.ceil(right) + reach_x]
  # Rounding errors may put the box's end past the image's edge.
  box = left - x, top - y, min(right - x, part.shape[1]), min(bottom - y, part.shape[0])
  resized = Image.fromarray(part).resize((side, side), Image.Resampling.BILINEAR, box=box)
  return np.asarray(resized)


def scaled_to_short_side(height: int, width: int, short_side: int) -> tuple[int, int]:
  """Returns the size with the shorter side scaled to `short_side`, in the same aspect ratio."""
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
    """Returns the crop as left, top, right, bottom in whole pixels of the height × width original."""
    scale_y, scale_x = height / self.height, width / self.width
    box_height = min(height, max(1, round(PAPER_CROP * scale_y)))
    box_width = min(width, max(1, round(PAPER_CROP * scale_x)))
    top = min(round(self.top * scale_y), height - box_height)
    left = min(round(self.left * scale_x), width - box_width)
    return left, top, left + box_width, top + box_height


def draw_paper_crop(rng: np.random.Generator, height: int, width: int) -> PaperCrop:
  """Draws a crop: shorter side uniform in PAPER_SHORT_SIDE, position uniform over the valid ones."""
  short_side = int(rng.integers(PAPER_SHORT_SIDE[0], PAPER_SHORT_SIDE[1] + 1))
  new_height, new_width = scaled_to_short_side(height, width, short_side)
  top = int(rng.integers(new_height - PAPER_CROP + 1))
  left = int(rng.integers(new_width - PAPER_CROP + 1))
  return PaperCrop(new_height, new_width, top, left)


def crop_literal(image: np.ndarray, crop: PaperCrop, resolution: int) -> np.ndarray:
  """Follows the paper step by step: resizes the image, crops 224², averages to resolution².

  The paper names no filter; antialiased bilinear, then the mean over areas, are this project's choice.
  Only the crop is resized: the whole of an image of 30,000×1 would take gigabytes.
  """
  scale_y, scale_x = image.shape[0] / crop.height, image.shape[1] / crop.width
  left, top = crop.left * scale_x, crop.top * scale_y
  box = left, top, left + PAPER_CROP * scale_x, top + PAPER_CROP * scale_y
  return resize_area(_resize_box(image, box, PAPER_CROP), resolution, resolution)


def crop_fused(image: np.ndarray, crop: PaperCrop, resolution: int) -> np.ndarray:
  """Takes the same crop in one step: a box of whole source pixels, averaged to resolution².

  Compared with `crop_literal`, the box moves by at most half a source pixel, and there is no blur by a
  first resize.
  """
  left, top, right, bottom = crop.source_box(*image.shape[:2])
  return resize_area(image[top:bottom, left:right], resolution, resolution)


def fit(image: np.ndarray, resolution: int) -> np.ndarray:
  """Scales the shorter side to `resolution` and crops the centre; an image of that size stays as it is."""
  height, width = image.shape[:2]
  if (height, width) == (resolution, resolution):
    return image
  # Crop first, so that only the result is resized.
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  return resize_area(image[top : top + side, left : left + side], resolution, resolution)


# --- the recipes -----------------------------------------------------------------------------------


def paper_eval(image: np.ndarray, resolution: int) -> np.ndarray:
  """Evaluation on ImageNet: shorter side 224, centre crop 224², down to resolution².

  An image whose shorter side is `resolution` already is only cropped.
  """
  if min(image.shape[:2]) == resolution:
    return fit(image, resolution)
  height, width = scaled_to_short_side(image.shape[0], image.shape[1], PAPER_CROP)
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
  data: bytes | np.ndarray, rng: np.random.Generator, resolution: int, record_id: str = "image"
) -> np.ndarray:
  """Returns `paper_train` of the decoded image, but decodes a JPEG only down to the crop's last row."""
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
  """Fine-tuning on CIFAR: reflect-pad by 4, random crop of the image or its mirror image."""
  image = fit(image, resolution)
  top, left = (int(x) for x in rng.integers(0, 9, size=2))
  mirrored = bool(rng.integers(2))
  padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
  window = padded[top : top + resolution, left : left + resolution]
  return window[:, ::-1] if mirrored else window


def shift_train(image: np.ndarray, rng: np.random.Generator, resolution: int) -> np.ndarray:
  """Shifts half of the images by up to an eighth of their side, and fills with black.

  Not from the paper: for small sets of drawings on black, whose meaning flips would change.
  """
  image = fit(image, resolution)
  reach = max(1, resolution // 8)
  moved = rng.random() < 0.5
  top, left = rng.integers(0, 2 * reach + 1, 2) if moved else (reach, reach)
  padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)))
  return np.ascontiguousarray(padded[top : top + resolution, left : left + resolution])


def photo_begin(image: np.ndarray, resolution: int) -> np.ndarray:
  """Resizes an image so that its shorter side is at most twice the resolution; again, it does nothing."""
  height, width = image.shape[:2]
  share = _PHOTO_SIDE * resolution / min(height, width)
  if share >= 1:
    return image
  return resize_area(image, round(height * share), round(width * share))


def photo_train(image: np.ndarray, rng: np.random.Generator, resolution: int) -> np.ndarray:
  """Crops a square of 70 to 100% of the shorter side, wherever it lies, or its mirror image.

  Not from the paper: for a person's few photos. It shifts and scales without filling any edge.
  """
  image = photo_begin(image, resolution)
  height, width = image.shape[:2]
  most = min(height, width)
  side = int(rng.integers(math.ceil(_PHOTO_SHARE * most), most + 1))
  top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
  crop = resize_area(image[top : top + side, left : left + side], resolution, resolution)
  return crop[:, ::-1] if rng.integers(2) else crop


def train_transform(
  augment: str, resolution: int, resample: str = "fused"
) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
  """Returns the training recipe of that name: (uint8 [H, W, 3], generator) -> uint8 [R, R, 3]."""
  check_recipe(augment, resolution, resample)
  return {
    "paper": lambda image, rng: paper_train(image, rng, resolution, resample),
    "cifar": lambda image, rng: cifar_train(image, rng, resolution),
    "shift": lambda image, rng: shift_train(image, rng, resolution),
    "photo": lambda image, rng: photo_train(image, rng, resolution),
    "none": lambda image, rng: fit(image, resolution),
  }[augment]


def train_begin(augment: str, resolution: int) -> Callable[[np.ndarray], np.ndarray] | None:
  """Returns the recipe's part that comes before all chance, and changes nothing the second time.

  An image can be kept after it, small. None: the paper's recipe begins with a random size.
  """
  if augment == "paper":
    return None
  if augment == "photo":
    return functools.partial(photo_begin, resolution=resolution)
  return eval_transform(augment, resolution)


def eval_transform(augment: str, resolution: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the evaluation for a training recipe: uint8 [H, W, 3] -> uint8 [R, R, 3]."""
  check_recipe(augment, resolution)
  return functools.partial(paper_eval if augment == "paper" else fit, resolution=resolution)


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
