"""Reads users' own image files as an image viewer shows them: upright pixels in sRGB.

All images to train on from a folder, images to complete, masks and uploads are read here. Records of
prepared data sets are not: `image_decoding.decode` reads them as TFDS does, as for the paper.

  orientation    from EXIF, XMP or AVIF, applied once (Pillow itself turns only TIFF)
  transparency   over white
  colour space   converted to sRGB by an embedded ICC profile; without one, sRGB is assumed
  bit depth      the high byte of 16 bits; floating point from 0 to 1
  animation      the first frame

`transforms` then crops and resizes. Images of more than MAX_PIXELS (134 million) are refused by their
header. Reading an image of any format takes less than MAX_MEMORY beside the file itself.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from typing import Any, cast

import numpy as np
from PIL import Image, ImageChops, ImageCms, TiffImagePlugin, UnidentifiedImageError

from igpt_jax.data import image_decoding, image_files

# Measured at MAX_PIXELS, in GiB: WebP 2.2, TIFF 1.4, AVIF and PNG with alpha 1.2, progressive JPEG 0.8,
# baseline JPEG 0.1.
MAX_MEMORY = 5 * 2**29  # bytes, 2.5 GiB

_EXIF_ORIENTATION = 0x0112
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_TURNS = {
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: np.rot90(x, 1),
}
# An image of more pixels is averaged to a smaller one (a JPEG while it is decoded), whose shorter side
# is still at least twice the largest resolution.
_LARGE = 2**26
_LARGE_SHORT_SIDE = 2048
_SAME_COLOURS = 2  # levels by which sRGB profiles of different makers differ


def read(data: bytes, name: str = "image", short_side: int = 0) -> np.ndarray:
  """Reads a file of any raster format that Pillow knows.

  Args:
    data: the file's bytes, which decide on its format.
    name: name of the image in errors.
    short_side: a JPEG may be scaled down, in decoding, to a shorter side of at least this; 0: it isn't.

  Returns:
    uint8 [H, W, 3], sRGB, upright. Images of more than 67 million pixels are scaled down.

  Raises:
    BadRecord: empty, truncated, unreadable, larger than MAX_PIXELS, or of values without an agreed
      range.
  """
  with image_decoding.naming(name):
    image = _open(data, name)
    large = image.width * image.height > _LARGE
    jpeg = data[:2] == b"\xff\xd8"
    least = short_side or large * _LARGE_SHORT_SIDE
    pixels = image_decoding.decode_jpeg(data, name, least) if jpeg else None
    if pixels is None:
      return from_pillow(image, name)
    if _conversion(image.mode, image.info):
      pixels = np.asarray(_in_srgb(Image.fromarray(pixels).convert(image.mode), image.info))
    return _upright(pixels, image)


def from_pillow(image: Image.Image, name: str = "image") -> np.ndarray:
  """Reads an image that Pillow has opened or made, as `read` does its file.

  Raises:
    BadRecord: that of `read`.
  """
  with image_decoding.naming(name):
    image_decoding.check_format(image)
    image_decoding.check_size(image.height, image.width, name)
    image.load()  # before `_orientation`: for TIFF, Pillow applies and removes it here
    flat = _flat(image)
    if image.width * image.height > _LARGE:
      flat = flat.reduce(max(1, min(flat.size) // _LARGE_SHORT_SIDE))
    return _upright(np.asarray(_in_srgb(flat, image.info)), image)


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
  turn = _TURNS.get(_orientation(image))
  return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def as_stored(data: bytes) -> bool:
  """Returns True if a file is a JPEG whose pixels need neither rotation nor conversion.

  `transforms` may decode such a file only as far as a crop needs.
  """
  if data[:2] != b"\xff\xd8":
    return False
  try:
    with image_decoding.naming("image"):
      image = image_decoding.open_image(data, "image")
      return (
        image.mode in ("L", "RGB")
        and image.width * image.height <= _LARGE
        and _orientation(image) not in _TURNS
        and _conversion(image.mode, image.info) is None
      )
  except image_decoding.BadRecord:
    return False  # `read` raises the error


def _open(data: bytes, name: str) -> Image.Image:
  """Opens a file as `image_decoding.open_image` does, and HEIC too if pillow-heif is installed."""
  if not image_files.is_heic(data):
    return image_decoding.open_image(data, name)
  if "HEIF" not in Image.OPEN and importlib.util.find_spec("pillow_heif"):
    import pillow_heif

    pillow_heif.register_heif_opener()
  try:
    return image_decoding.open_image(data, name)
  except UnidentifiedImageError as error:
    raise ValueError(
      f"{error}: HEIC, perhaps; fix: pip install pillow-heif, or convert it to JPEG"
    ) from None


def _orientation(image: Image.Image) -> int:
  """Returns the EXIF orientation, 1 to 8; 1 if there is none or the EXIF data are damaged."""
  try:
    return image.getexif().get(_EXIF_ORIENTATION, 1)
  except Exception:  # Pillow raises errors of many kinds for damaged EXIF data
    return 1


# --- transparency and bit depth --------------------------------------------------------------------


def _flat(image: Image.Image) -> Image.Image:
  """Converts a loaded image to 8 bits a channel without transparency: mode L, RGB, CMYK or LAB."""
  mode = image.mode
  if mode == "LAB":
    return image
  if mode == "CMYK":
    # Pillow inverts every CMYK JPEG, which is right only for those that Adobe's programs wrote.
    wrong = image.format in ("JPEG", "MPO") and "adobe" not in image.info
    return ImageChops.invert(image) if wrong else image
  if mode == "F" or mode.startswith("I"):
    return Image.fromarray(_eight_bits(image))
  grey = mode in ("1", "L", "LA")
  if not image.has_transparency_data:
    return _converted(image, "L" if grey else "RGB")
  image = _converted(image, "RGBA")
  flat = Image.new("RGB", image.size, "white")
  flat.paste(image, mask=image.getchannel("A"))
  return flat.convert("L") if grey else flat


def _converted(image: Image.Image, mode: str) -> Image.Image:
  """Converts an image to `mode`, without Pillow's copy if it has that mode already."""
  return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> np.ndarray:
  """Converts grey of 16 bits, or of floating point from 0 to 1, to uint8 [H, W].

  Raises:
    ValueError: other values, since the white of 32 bits isn't standardised.
  """
  values = np.asarray(image)
  white = 1 if image.mode == "F" else 65535
  least, most = values.min(), values.max()
  if not (0 <= least and most <= white):  # also true for NaN
    raise ValueError(f"values from {least:g} to {most:g}; expected 0 to {white:,}, which is white")
  if image.mode == "F":
    levels = values * np.float32(255)
    levels = np.rint(levels, out=levels).astype(np.uint8)
  else:
    levels = (values >> 8).astype(np.uint8)
  if image.format == "TIFF":
    tags = cast(TiffImagePlugin.TiffImageFile, image).tag_v2
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
      levels = 255 - levels  # Pillow inverts other modes itself
  transparent = image.info.get("transparency")
  if transparent is not None:
    levels[values == transparent] = 255
  return levels


# --- colour space ----------------------------------------------------------------------------------


def _in_srgb(image: Image.Image, info: dict) -> Image.Image:
  """Converts an image of mode L, RGB, CMYK or LAB to sRGB, by its profile if it has one."""
  conversion = _conversion(image.mode, info)
  if conversion is None:
    return _converted(image, "RGB")
  mode, transform = conversion
  return cast(Image.Image, ImageCms.applyTransform(_converted(image, mode), transform))


def _conversion(mode: str, info: dict) -> tuple[str, ImageCms.ImageCmsTransform] | None:
  """Returns the mode of an image's profile and the transform to sRGB; None if it is sRGB already."""
  if mode == "LAB":
    return _to_srgb(None)
  profile = info.get("icc_profile")
  conversion = _to_srgb(profile) if profile else None
  fits = conversion and (conversion[0] == mode or (conversion[0], mode) == ("RGB", "L"))
  return conversion if fits else None


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes | None) -> tuple[str, ImageCms.ImageCmsTransform] | None:
  """Returns the `_conversion` of a profile (None: of L*a*b*); a damaged profile counts as none."""
  try:
    source: Any = ImageCms.createProfile("LAB")
    if profile is not None:
      source = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}[source.xcolor_space.strip()]
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":
      flags |= ImageCms.Flags.NOOPTIMIZE  # the optimised table is too coarse for a steep curve
    profiles = ImageCms.ImageCmsProfile(source), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(*profiles, mode, "RGB", intent, flags)
  except (OSError, KeyError, ImageCms.PyCMSError):
    return None
  if mode in ("L", "RGB"):
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    samples = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    samples = Image.fromarray(samples if mode == "RGB" else samples[..., 0])
    converted = np.asarray(ImageCms.applyTransform(samples, transform), np.int16)
    if np.abs(converted - np.asarray(samples.convert("RGB"))).max() <= _SAME_COLOURS:
      return None  # the profile is sRGB itself, so that pixels stay as stored
  return mode, transform
