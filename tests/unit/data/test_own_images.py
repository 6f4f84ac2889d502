"""A person's files: the upright pixels in sRGB that a viewer shows, in every format and mode."""

import importlib.machinery
import io
import struct
import subprocess
import sys
import types
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, features

from igpt_jax.data import image_decoding, own_images
from igpt_jax.data.image_decoding import BadRecord
from support import icc
from support.paths import ROOT

RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RGB[..., 0]
LEFT = np.arange(30) < 15  # opaque there, transparent elsewhere
DEEP = RNG.integers(0, 65536, (20, 30), np.uint16)

# How an upright image is stored for each orientation, by EXIF's words: where row 0 and column 0 are.
STORED = {
  1: lambda x: x,  # top, left
  2: lambda x: x[:, ::-1],  # top, right
  3: lambda x: x[::-1, ::-1],  # bottom, right
  4: lambda x: x[::-1],  # bottom, left
  5: lambda x: x.swapaxes(0, 1),  # left, top
  6: lambda x: x.swapaxes(0, 1)[::-1],  # right, top
  7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
  8: lambda x: x.swapaxes(0, 1)[:, ::-1],  # left, bottom
}
FORMATS = {
  "jpeg": {"quality": 95, "subsampling": 0},
  "jpeg progressive": {"quality": 95, "progressive": True},
  "mpo": {"quality": 95},
  "png": {},
  "webp": {"lossless": True},
  "webp lossy": {"quality": 95},
  "tiff": {},
  "tiff lzw": {"compression": "tiff_lzw"},
  "tiff jpeg": {"compression": "jpeg", "quality": 95},
  "avif": {"quality": 95},
}


def encoded(image, kind="png", **options):
  if not isinstance(image, Image.Image):
    image = Image.fromarray(np.ascontiguousarray(image))
  buffer = io.BytesIO()
  image.save(buffer, kind.split()[0], **options)
  return buffer.getvalue()


def exif(orientation):
  note = Image.Exif()
  note[0x0112] = orientation
  return note


def four_corners(height, width):
  """Red, green, blue and yellow quarters."""
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = 220 * (
    (np.arange(height) < height // 2)[:, None] == (np.arange(width) < width // 2)
  )
  image[: height // 2, width // 2 :, 1] = image[height // 2 :, width // 2 :, 1] = 200
  image[height // 2 :, : width // 2, 2] = 180
  return image


def read_close_to(data, expected, tolerance=0):
  got = own_images.read(data)
  assert got.dtype == np.uint8 and got.flags.c_contiguous
  assert got.shape == (*expected.shape[:2], 3)
  expected = expected if expected.ndim == 3 else expected[..., None]
  assert np.abs(got - expected.astype(np.float64)).max() <= tolerance


# --- orientation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 32)], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_upright_whatever_its_orientation(kind, size):
  if kind == "avif" and not features.check("avif"):
    pytest.skip("this Pillow writes no AVIF")
  image = four_corners(*size)
  for orientation, stored in STORED.items():
    data = encoded(stored(image), kind, exif=exif(orientation), **FORMATS[kind])
    got = own_images.read(data)
    assert got.shape == image.shape
    # Chroma that is stored at half the size bleeds over the middle.
    assert np.abs(got.astype(int) - image).mean() < 4, orientation
    far = np.s_[:: size[0] - 1, :: size[1] - 1]  # the four corners
    assert np.abs(got[far].astype(int) - image[far]).max() < 12, orientation
    assert own_images.as_stored(data) == (orientation == 1 and kind.split()[0] in ("jpeg", "mpo"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_orientation_in_xmp_counts_and_a_damaged_one_does_not():
  image = four_corners(10, 14)
  note = PngImagePlugin.PngInfo()
  note.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><a tiff:Orientation="6"/></x:xmpmeta>')
  read_close_to(encoded(STORED[6](image), pnginfo=note), image)
  for number in (0, 9, 77):
    read_close_to(encoded(image, exif=exif(number)), image)
  read_close_to(encoded(image, exif=b"Exif\0\0MM\0*" + b"\xff" * 40), image)


# --- transparency, palettes, bit depth -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_transparency_is_over_white(kind):
  alpha = np.where(LEFT, 255, 0).astype(np.uint8) * np.ones((20, 1), np.uint8)
  rgba = np.concatenate([RGB, alpha[..., None]], -1)
  options = {"lossless": True, "exact": True} if kind == "webp" else {}
  read_close_to(encoded(rgba, kind, **options), np.where(LEFT[:, None], RGB, 255))
  half = np.concatenate([np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 1), 128, np.uint8)], -1)
  read_close_to(encoded(half, kind, **options), np.full((4, 4), 177), 1)


def test_grey_with_transparency():
  alpha = np.where(LEFT, 255, 0).astype(np.uint8) * np.ones((20, 1), np.uint8)
  read_close_to(encoded(np.stack([GREY, alpha], -1)), np.where(LEFT, GREY, 255))


def test_palettes_and_transparent_colours():
  index = GREY // 64
  colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
  image = Image.fromarray(index).convert("P")
  image.putpalette(colours.reshape(-1).tolist())
  without = np.where((index == 2)[..., None], 255, colours[index])
  for kind in ("png", "gif"):
    read_close_to(encoded(image, kind), colours[index])
    read_close_to(encoded(image, kind, transparency=2), without)
  read_close_to(encoded(image, transparency=bytes([255, 255, 0])), without)
  read_close_to(encoded(colours[index], transparency=(0, 0, 255)), without)
  read_close_to(encoded(index * 60, transparency=120), np.where(index == 2, 255, index * 60))
  bits = GREY > 128
  read_close_to(encoded(bits), np.where(bits, 255, 0))
  read_close_to(encoded(bits, "tiff", compression="group4"), np.where(bits, 255, 0))


def test_sixteen_bits():
  high = (DEEP >> 8).astype(np.uint8)
  for kind in ("png", "tiff"):
    read_close_to(encoded(DEEP, kind), high)
  read_close_to(cv2.imencode(".pgm", DEEP)[1].tobytes(), high)
  value = int(DEEP[3, 4])
  read_close_to(encoded(DEEP, transparency=value), np.where(value == DEEP, 255, high))
  read_close_to(encoded(DEEP.astype(np.int32), "tiff"), high)  # 32 bits that hold 16
  read_close_to(encoded(DEEP, "tiff", tiffinfo={262: 0}), 255 - high)  # 0 is white
  colour = RNG.integers(0, 65536, (20, 30, 3), np.uint16)
  opaque = np.broadcast_to(np.where(LEFT, 65535, 0).astype(np.uint16), DEEP.shape)
  for suffix in (".png", ".tiff"):
    read_close_to(cv2.imencode(suffix, colour[..., ::-1])[1].tobytes(), colour >> 8)
    with_alpha = np.concatenate([colour[..., ::-1], opaque[..., None]], -1)
    expected = np.where(LEFT[:, None], colour >> 8, 255)
    read_close_to(cv2.imencode(suffix, with_alpha)[1].tobytes(), expected)


def test_floating_point_is_from_0_to_1():
  light = (DEEP / 65535).astype(np.float32)
  read_close_to(encoded(light, "tiff"), 255 * light, 0.501)
  for wrong, range_ in (
    (light * 255, "to 25[45]"),
    (light - 1, "-1|-0.99"),
    (light * np.nan, "nan"),
  ):
    with pytest.raises(
      BadRecord, match=rf"^mine: unreadable image \(values from .*{range_}.*expected 0 to 1"
    ):
      own_images.read(encoded(wrong, "tiff"), "mine")
  with pytest.raises(BadRecord, match="expected 0 to 65,535"):
    own_images.read(encoded(DEEP.astype(np.int32) * 1000, "tiff"))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "avif", "tiff"])
def test_of_an_animation_the_first_frame(kind):
  if kind == "avif" and not features.check("avif"):
    pytest.skip("this Pillow writes no AVIF")
  first, *rest = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
  data = encoded(first, kind, save_all=True, append_images=rest)
  read_close_to(data, np.full((16, 16, 3), (255, 0, 0)), 3)


# --- colour spaces ---------------------------------------------------------------------------------


SMOOTH = cv2.resize(
  RNG.integers(0, 256, (3, 4, 3), np.uint8), (64, 48), interpolation=cv2.INTER_LINEAR
)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("colorants", [icc.DISPLAY_P3, icc.ADOBE_RGB], ids=["p3", "adobe"])
def test_profiles_become_srgb(kind, colorants):
  if kind == "avif" and not features.check("avif"):
    pytest.skip("this Pillow writes no AVIF")
  expected = icc.to_srgb(SMOOTH, colorants, 2.2)
  assert np.abs(expected - SMOOTH).max() > 25  # as it was without
  data = encoded(SMOOTH, kind, icc_profile=icc.rgb_profile(colorants, 2.2), **FORMATS[kind])
  read_close_to(data, expected, 1.6 if kind in ("png", "webp", "tiff") else 32)
  assert np.abs(own_images.read(data) - expected).mean() < 3
  assert not own_images.as_stored(data)


def test_profiles_of_grey_and_of_another_kind():
  profile = icc.grey_profile(1.0)
  expected = icc.to_srgb(np.stack([GREY] * 3, -1), icc.SRGB, 1.0)
  read_close_to(encoded(GREY, icc_profile=profile), expected, 1.6)
  read_close_to(
    encoded(np.full((8, 8), 60, np.uint8), "jpeg", icc_profile=profile), np.full((8, 8), 133), 2
  )
  alpha = np.full_like(GREY, 255)
  read_close_to(encoded(np.stack([GREY, alpha], -1), icc_profile=profile), expected, 1.6)
  read_close_to(encoded(RGB, icc_profile=profile), RGB)  # not of these pixels: left out
  index = Image.fromarray(GREY // 64).convert("P")
  index.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
  adobe = icc.rgb_profile(icc.ADOBE_RGB, 2.2)
  expected = icc.to_srgb(np.asarray(index.convert("RGB")), icc.ADOBE_RGB, 2.2)
  read_close_to(encoded(index, icc_profile=adobe), expected, 1.6)


def test_srgb_and_damaged_profiles_leave_pixels_alone():
  srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  for profile in (srgb, b"nonsense" * 40, srgb[:200]):
    read_close_to(encoded(RGB, icc_profile=profile), RGB)
    data = encoded(RGB, "jpeg", icc_profile=profile)
    np.testing.assert_array_equal(own_images.read(data), image_decoding.decode(data))
    assert own_images.as_stored(data)


def test_cmyk_of_adobe_and_of_others():
  ink = Image.fromarray(SMOOTH).convert("CMYK")
  options = {"quality": 98, "subsampling": 0}
  read_close_to(encoded(ink, "tiff"), SMOOTH, 1)
  read_close_to(encoded(ink, "jpeg", **options), SMOOTH, 16)
  plain = encoded(Image.fromarray(255 - np.asarray(ink), "CMYK"), "jpeg", **options)
  start = plain.index(b"\xff\xee")
  end = start + 2 + int.from_bytes(plain[start + 2 : start + 4], "big")
  read_close_to(plain[:start] + plain[end:], SMOOTH, 16)


def test_ycck():
  """Adobe's other form: the inks' luma and chroma, and black."""
  ink = np.asarray(Image.fromarray(SMOOTH).convert("CMYK"))
  luma = np.asarray(Image.fromarray(ink[..., :3]).convert("YCbCr"))
  stored = np.concatenate([luma, 255 - ink[..., 3:]], -1)
  data = bytearray(
    encoded(Image.fromarray(255 - stored, "CMYK"), "jpeg", quality=98, subsampling=0)
  )
  place = data.index(b"Adobe") + 11
  assert data[place] == 0
  data[place] = 2
  read_close_to(bytes(data), SMOOTH, 16)


def test_lab():
  # Under D50 sRGB's red is L* 54.29, a* 80.81, b* 69.89; the steps of 8 bits are coarse.
  lab = Image.new("LAB", (8, 8), (round(54.29 * 2.55), 128 + 81, 128 + 70))
  read_close_to(encoded(lab, "tiff"), np.full((8, 8, 3), (255, 0, 0)), 6)


# --- what can't be read, and what is large ---------------------------------------------------------


def png_header(width, height):
  def chunk(kind, content):
    return (
      struct.pack(">I", len(content))
      + kind
      + content
      + struct.pack(">I", zlib.crc32(kind + content))
    )

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  pixels = zlib.compress(bytes(100))
  return (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
  )


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "the file is empty"),
    (b"hello", "cannot identify image"),
    (b"\0\0\0\x18ftypheic" + bytes(40), "cannot identify image.*HEIC.*pip install pillow-heif"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS"),
    (png_header(0, 5), ""),
    (png_header(11_600, 11_600), "implausible size 11600×11600; expected 1 to 134,217,728 pixels"),
    (png_header(60_000, 60_000), "implausible size of 3,600,000,000 pixels; expected 1 to 134"),
    (png_header(11_000, 11_000), "truncated"),
    *((encoded(RGB, kind.split()[0])[:-60], "") for kind in ("jpeg", "png", "tiff", "gif", "webp")),
  ],
  ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_cannot_be_read_is_said_in_one_line(data, reason):
  with pytest.raises(BadRecord, match=f"^mine: .*{reason}") as raised:
    own_images.read(data, "mine")
  assert "\n" not in str(raised.value) and "<_io" not in str(raised.value)


def test_heic_is_read_where_its_package_is_installed(monkeypatch):
  """By a stand-in for pillow-heif, which registers a decoder with Pillow as the package does."""

  class Decoder(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
      self._size, self._mode = (2, 1), "RGB"
      self.tile = [ImageFile._Tile("raw", (0, 0, 2, 1), 40, "RGB")]

  package = types.ModuleType("pillow_heif")
  package.__spec__ = importlib.machinery.ModuleSpec("pillow_heif", None)
  package.register_heif_opener = lambda: Image.register_open(
    "HEIF", Decoder, lambda start: start[4:12] == b"ftypheic"
  )
  monkeypatch.setitem(sys.modules, "pillow_heif", package)
  monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
  monkeypatch.setattr(Image, "ID", list(Image.ID))
  data = (b"\0\0\0\x18ftypheic" + bytes(28) + bytes(range(6))).ljust(80, b"\0")
  read_close_to(data, np.arange(6).reshape(1, 2, 3))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 2000)], ids=str)
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff"])
def test_the_smallest_and_the_thinnest(kind, size):
  image = np.full((*size, 3), 90, np.uint8)
  read_close_to(encoded(image, kind), image, 2)


LARGE = """
import io, resource, sys
import numpy as np
from PIL import Image
from igpt_jax.data import image_decoding, own_images, transforms

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
with open(sys.argv[1], "rb") as file:
  image = own_images.read(file.read(), "large")
for recipe in ("paper", "none"):
  square = transforms.eval_transform(recipe, 32)(image)
  print(*square[4, 4], *square[4, -4], *square[-4, 4], *square[-4, -4])
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_108_megapixels_within_bounded_memory(kind, tmp_path):
  image = Image.fromarray(STORED[6](four_corners(9_000, 12_000)))
  options = {"compress_level": 1} if kind == "png" else {}
  image.save(tmp_path / "large", kind, exif=exif(6), **options)
  run = subprocess.run(
    [sys.executable, "-c", LARGE, tmp_path / "large"], cwd=ROOT, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr
  *corners, grown = run.stdout.splitlines()
  for line in corners:
    expected = four_corners(2, 2).reshape(-1).astype(int)
    assert np.abs(np.array(line.split(), int) - expected).max() <= 3
  assert int(grown) < own_images.MAX_MEMORY


THIN = """
import resource, sys
import numpy as np
from igpt_jax.data import image_decoding, transforms

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng = np.random.default_rng(0)
for shape in ((1, 8_000), (30_000, 1), (1, 1), (65_500, 2)):
  image = rng.integers(0, 256, (*shape, 3), np.uint8)
  for augment in transforms.AUGMENTATIONS:
    for resample in transforms.RESAMPLINGS:
      square = transforms.train_transform(augment, 32, resample)(image, rng)
      assert square.shape == (32, 32, 3) and square.dtype == np.uint8
    assert transforms.eval_transform(augment, 32)(image).shape == (32, 32, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_thin_images_take_no_memory():
  run = subprocess.run([sys.executable, "-c", THIN], cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  assert int(run.stdout) < 64 * 1024  # KiB
