"""From a record's bytes to the square uint8 image that the model sees.

Holds the decoding of prepared data sets (`own_images` reads a person's files), the paper's resizing
and cropping (section 3.2), and CIFAR's augmentation. Pure functions of one image and, where random,
of a generator that the caller seeds; nothing here knows of data sets, batches or palettes.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import typing
import warnings
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from igpt_jax import errors

# The pipeline parallelises over pictures; OpenCV's own pool would only fight with it for the cores.
cv2.setNumThreads(1)
# What Pillow warns of in files that it reads all the same would be said once for each of a million.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The largest image of ImageNet has about 61 million pixels, a camera's 108 or so. What promises more
# than this is refused before memory is spent on it; own_images.py says how much memory that bounds.
MAX_PIXELS = 2**27
# A byte of JPEG holds at most this many pixels: one bit for each block of an even colour.
_MAX_PIXELS_PER_JPEG_BYTE = 512

# Goes up whenever evaluation shows other pixels of the same file: what was computed of them is stale.
EVALUATION_VERSION = 2

AUGMENTATIONS = ("none", "paper", "cifar", "shift")
RESAMPLINGS = ("fused", "literal")
PAPER_CROP = 224  # side of the crop, section 3.2
PAPER_SHORT_SIDE = (256, 384)  # range of the random shorter side, both ends included


class BadRecord(Exception):
  """One record cannot be turned into a picture. The message names the record and the reason."""


# --- decoding --------------------------------------------------------------------------------------


def decode(data: bytes | np.ndarray, record_id: str = "image") -> np.ndarray:
  """Decodes one record of a prepared data set to RGB. (`own_images` reads a person's files.)

  Follows what TensorFlow's `decode_image(channels=3)` gives, which is what TFDS shows: grey is
  repeated, an alpha channel is dropped (not composited), of 16 bits the high byte stays, EXIF
  rotation is ignored, CMYK is multiplied out, and the content decides, not the file's name.

  Args:
    data: an encoded image (JPEG, PNG, or anything Pillow reads), or an already decoded uint8 array
      [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
    record_id: what errors call it.

  Returns:
    uint8 [H, W, 3].

  Raises:
    BadRecord: truncated, unreadable, empty, or larger than MAX_PIXELS.
  """
  if isinstance(data, np.ndarray):
    return _array_to_rgb(data, record_id)
  if data[:2] == b"\xff\xd8":
    image = decode_jpeg(data, record_id)
    if image is not None:
      return image
  with naming(record_id):
    image = open_image(data, record_id)
    image.load()
    return _pillow_to_rgb(image)


def decode_jpeg(data: bytes, record_id: str, short_side: int = 0) -> np.ndarray | None:
  """Decodes a grey or three-colour JPEG by libjpeg-turbo, a third cheaper than through Pillow.

  Args:
    data: the file.
    record_id: what errors call it.
    short_side: where both sides are longer, decode at the smallest scale at which they still are as
      long as this (libjpeg scales before the pixels exist, by averaging); 0: decode all pixels.

  Returns:
    uint8 [H, W, 3]; None where Pillow is to judge.

  Raises:
    BadRecord: an implausible size.
  """
  try:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(height, width, record_id, jpeg_bytes=len(data))
    if colorspace not in ("RGB", "YCbCr", "Gray"):
      return None
    return simplejpeg.decode_jpeg(data, "RGB", min_height=short_side, min_width=short_side)
  except ValueError:
    # Strict decoding also refuses harmless oddities such as stray bytes between segments, which
    # real ImageNet files have; Pillow passes those and still refuses a truncated image.
    return None


def open_image(data: bytes, record_id: str) -> Image.Image:
  """Opens a file with Pillow: its header is read and its size checked, its pixels aren't there yet.

  Call it within `naming`, for whatever Pillow raises.
  """
  if not data:
    raise ValueError("the file is empty")
  try:
    image = Image.open(io.BytesIO(data))
  except Image.DecompressionBombError as error:  # beyond Pillow's own limit, which is higher
    n_pixels = int(re.search(r"\d+", str(error))[0])
    raise BadRecord(
      f"{record_id}: implausible size of {n_pixels:,} pixels; expected 1 to {MAX_PIXELS:,} pixels; "
      "fix: scale it down"
    ) from None
  if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
    raise ValueError("EPS is a program that draws; expected an image of pixels")
  jpeg_bytes = len(data) if image.format in ("JPEG", "MPO") else None
  _check_size(image.height, image.width, record_id, jpeg_bytes=jpeg_bytes)
  return image


@contextlib.contextmanager
def naming(record_id: str):
  """Turns whatever is raised within into a BadRecord of one line that names the record."""
  try:
    yield
  except BadRecord:
    raise
  except Exception as error:  # damaged bytes make Pillow's many decoders raise many kinds
    # Pillow names the buffer it was given.
    reason = " ".join(re.sub(r" file <[^>]*>", "", str(error)).split()) or type(error).__name__
    raise BadRecord(f"{record_id}: unreadable image ({reason})") from error


def _plain_frame(data: bytes) -> int | None:
  """Where the frame header of a whole, sequential, Huffman-coded JPEG begins; None for any other."""
  if data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9", -64) < 0:
    return None
  place = 2
  while place + 9 < len(data) and data[place] == 0xFF:
    marker = data[place + 1]
    if marker in (0xC0, 0xC1):
      return place if data[place + 9] in (1, 3) else None  # grey or three colours
    if marker == 0xDA or (0xC0 < marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC)):
      return None
    place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
  return None


def _decode_top(data: bytes, frame: int, n_rows: int) -> np.ndarray | None:
  """At least the first n_rows of the JPEG whose frame header is at `frame`, or None.

  A header that promises fewer rows makes the decoder stop there; what follows is skipped unread. The
  32 rows more are for the blocks that the last row lies in and that its chroma is interpolated from.
  """
  height = int.from_bytes(data[frame + 5 : frame + 7], "big")
  rows = (n_rows // 16 + 2) * 16
  if rows >= height:
    return None
  patched = bytearray(data)
  patched[frame + 5 : frame + 7] = rows.to_bytes(2, "big")
  try:
    return simplejpeg.decode_jpeg(patched, "RGB", strict=False)
  except ValueError:
    return None


def _pillow_to_rgb(picture: Image.Image) -> np.ndarray:
  if picture.mode == "CMYK":
    ink = np.asarray(picture).astype(np.uint16)
    if picture.format in ("JPEG", "MPO") and "adobe" not in picture.info:
      ink = (
        255 - ink
      )  # Pillow inverts every CMYK JPEG as Adobe's writers need; this one isn't theirs
    light = 255 - ink
    return (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)
  if picture.mode.startswith("I"):
    grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535) >> 8
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
  if picture.mode == "F":
    raise ValueError("floating point pictures have no agreed range")
  if picture.mode == "LA":
    picture = picture.getchannel("L")
  elif picture.mode == "RGBA":
    return np.ascontiguousarray(np.asarray(picture)[..., :3])
  return np.array(picture.convert("RGB"))


def _array_to_rgb(array: np.ndarray, record_id: str) -> np.ndarray:
  if array.ndim == 2:
    array = array[..., None]
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
    raise BadRecord(
      f"{record_id}: {array.dtype} {array.shape} is no uint8 [H, W, 1, 3 or 4] picture"
    )
  _check_size(*array.shape[:2], record_id)
  if array.shape[-1] == 1:
    return np.repeat(array, 3, axis=-1)
  return np.ascontiguousarray(array[..., :3])


def _check_size(height: int, width: int, record_id: str, jpeg_bytes: int | None = None) -> None:
  """Refuses what no real image of that many bytes has, before memory or time is spent on it."""
  limit = MAX_PIXELS
  if jpeg_bytes is not None:
    limit = min(limit, jpeg_bytes * _MAX_PIXELS_PER_JPEG_BYTE)
  if height < 1 or width < 1 or height * width > limit:
    raise BadRecord(
      f"{record_id}: implausible size {width}×{height}; expected 1 to {limit:,} pixels"
      + (f" in {jpeg_bytes:,} bytes of JPEG" if limit < MAX_PIXELS else "")
      + "; fix: scale it down"
    )


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
  """One draw of the paper's augmentation, in pixels of the picture resized to height × width."""

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
  height, width = _scaled_to_short_side(*image.shape[:2], PAPER_CROP)
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
  """`paper_train` of the decoded picture, for less: a JPEG is decoded only down to the crop's end."""
  frame = _plain_frame(data) if isinstance(data, bytes) else None
  if frame is None:
    return paper_train(decode(data, record_id), rng, resolution)
  height, width = (int.from_bytes(data[i : i + 2], "big") for i in (frame + 5, frame + 7))
  _check_size(height, width, record_id, len(data))
  crop = draw_paper_crop(rng, height, width)
  left, top, right, bottom = crop.source_box(height, width)
  image = _decode_top(data, frame, bottom)
  if image is None:
    return crop_fused(decode(data, record_id), crop, resolution)
  return resize_area(image[top:bottom, left:right], resolution, resolution)


def cifar_train(image: np.ndarray, rng: np.random.Generator, resolution: int) -> np.ndarray:
  """CIFAR fine-tuning: reflect-pad 4, random crop of the picture or its mirror image."""
  image = fit(image, resolution)
  top, left = (int(x) for x in rng.integers(0, 9, size=2))
  mirrored = bool(rng.integers(2))
  padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
  window = padded[top : top + resolution, left : left + resolution]
  return window[:, ::-1] if mirrored else window


def shift_train(image: np.ndarray, rng: np.random.Generator, resolution: int) -> np.ndarray:
  """Every other picture is moved by up to an eighth of its side; what comes in is black.

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
