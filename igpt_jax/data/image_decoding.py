"""Decodes the records of prepared data sets: from bytes to RGB pixels.

`own_images` reads users' own files. This module is independent of data sets, batches and palettes.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings

import numpy as np
import simplejpeg
from PIL import Image

# Pillow's warnings about files that it can read would be printed for every one of a million images.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The largest image of ImageNet has about 61 million pixels, a camera's about 108. A header that claims
# more is refused before memory is allocated; own_images.MAX_MEMORY follows from this limit.
MAX_PIXELS = 2**27
# A byte of JPEG holds at most this many pixels: one bit for each block of uniform colour.
_MAX_PIXELS_PER_JPEG_BYTE = 512


class BadRecord(Exception):
  """One record cannot be turned into an image. The message names the record and the reason."""


def decode(data: bytes | np.ndarray, record_id: str = "image") -> np.ndarray:
  """Decodes one record of a prepared data set to RGB.

  Gives the same as TensorFlow's `decode_image(channels=3)`, which TFDS uses: grey is repeated, an alpha
  channel is dropped (not composited), the high byte of 16 bits is kept, EXIF rotation is ignored, CMYK
  is multiplied out, and the content decides on the format, not the file's name.

  Args:
    data: an encoded image (JPEG, PNG, or anything Pillow reads), or an already decoded uint8 array
      [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
    record_id: name of the record in errors.

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
    record_id: name of the record in errors.
    short_side: decode at the smallest scale at which both sides are still at least this long (libjpeg
      averages while it decodes); 0: decode all pixels.

  Returns:
    uint8 [H, W, 3]; None if it must be decoded through Pillow.

  Raises:
    BadRecord: an implausible size.
  """
  try:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    check_size(int(height), int(width), record_id, jpeg_bytes=len(data))
    if colorspace not in ("RGB", "YCbCr", "Gray"):
      return None
    return simplejpeg.decode_jpeg(data, "RGB", min_height=short_side, min_width=short_side)
  except ValueError:
    # Strict decoding also refuses stray bytes between segments, which some ImageNet files have;
    # Pillow accepts those and still refuses a truncated image.
    return None


def open_image(data: bytes, record_id: str) -> Image.Image:
  """Opens a file with Pillow: reads its header and checks its size, but decodes no pixels.

  Call it within `naming`, which converts Pillow's exceptions.
  """
  if not data:
    raise ValueError("the file is empty")
  try:
    image = Image.open(io.BytesIO(data))
  except Image.DecompressionBombError as error:  # beyond Pillow's own limit, which is higher
    n_pixels = int(re.findall(r"\d+", str(error))[0])
    raise BadRecord(
      f"{record_id}: implausible size of {n_pixels:,} pixels; expected 1 to {MAX_PIXELS:,} pixels; "
      "fix: scale it down"
    ) from None
  check_format(image)
  jpeg_bytes = len(data) if image.format in ("JPEG", "MPO") else None
  check_size(image.height, image.width, record_id, jpeg_bytes=jpeg_bytes)
  return image


def check_format(image: Image.Image) -> None:
  """Raises ValueError for a program, which Pillow would have Ghostscript run."""
  if image.format == "EPS":
    raise ValueError("EPS is a program that draws; expected an image of pixels")


@contextlib.contextmanager
def naming(record_id: str):
  """Converts any exception of the block to a BadRecord of one line that names the record."""
  try:
    yield
  except BadRecord:
    raise
  except Exception as error:  # damaged bytes make Pillow's many decoders raise many kinds
    # Remove a buffer's address, which Pillow's message contains.
    reason = " ".join(re.sub(r" file <[^>]*>", "", str(error)).split()) or type(error).__name__
    raise BadRecord(f"{record_id}: unreadable image ({reason})") from error


def plain_frame(data: bytes) -> int | None:
  """Returns the offset of a JPEG's frame header; None unless it is complete, sequential and Huffman-coded."""
  if data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9", -64) < 0:
    return None
  at = 2
  while at + 9 < len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker in (0xC0, 0xC1):
      return at if data[at + 9] in (1, 3) else None  # grey or three colours
    if marker == 0xDA or (0xC0 < marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC)):
      return None
    at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
  return None


def decode_top(data: bytes, frame: int, n_rows: int) -> np.ndarray | None:
  """Decodes at least the first `n_rows` rows of the JPEG whose frame header is at `frame`; None if it can't.

  The header is changed to claim fewer rows, so that the decoder stops there. Up to 32 rows more are
  decoded: the last row's blocks, and those from which its chroma is interpolated.
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


def _pillow_to_rgb(image: Image.Image) -> np.ndarray:
  if image.mode == "CMYK":
    light = np.asarray(image).astype(np.uint16)
    # Pillow inverts every CMYK JPEG, which is right only for those that Adobe's programs wrote.
    if image.format not in ("JPEG", "MPO") or "adobe" in image.info:
      light = 255 - light
    return (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)
  if image.mode.startswith("I"):
    grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
  if image.mode == "F":
    raise ValueError("floating point images have no agreed range")
  if image.mode == "LA":
    image = image.getchannel("L")
  elif image.mode == "RGBA":
    return np.ascontiguousarray(np.asarray(image)[..., :3])
  return np.array(image.convert("RGB"))


def _array_to_rgb(array: np.ndarray, record_id: str) -> np.ndarray:
  if array.ndim == 2:
    array = array[..., None]
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
    raise BadRecord(f"{record_id}: {array.dtype} {array.shape} is no uint8 [H, W, 1, 3 or 4] image")
  check_size(array.shape[0], array.shape[1], record_id)
  if array.shape[-1] == 1:
    return np.repeat(array, 3, axis=-1)
  return np.ascontiguousarray(array[..., :3])


def check_size(height: int, width: int, record_id: str, jpeg_bytes: int | None = None) -> None:
  """Raises BadRecord for a size that no real image of so many bytes has."""
  limit = MAX_PIXELS
  if jpeg_bytes is not None:
    limit = min(limit, jpeg_bytes * _MAX_PIXELS_PER_JPEG_BYTE)
  if height < 1 or width < 1 or height * width > limit:
    raise BadRecord(
      f"{record_id}: implausible size {width}×{height}; expected 1 to {limit:,} pixels"
      + (f" in {jpeg_bytes:,} bytes of JPEG" if limit < MAX_PIXELS else "")
      + "; fix: scale it down"
    )
