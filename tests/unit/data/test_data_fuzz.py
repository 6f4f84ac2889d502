"""Damaged bytes: each record is decoded or refused by name, within bounded memory and time."""

import subprocess
import sys

from support.paths import ROOT

SCRIPT = """
import io, resource
import numpy as np
from PIL import Image, ImageCms
from igpt_jax.data import image_decoding, own_images, transforms

rng = np.random.default_rng(0)

def encode(size, kind="jpeg", mode="RGB", **options):
  noise = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
  image = Image.fromarray(noise).resize((size[1], size[0]), Image.Resampling.BICUBIC).convert(mode)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()

originals = [
  encode((375, 500), quality=92, subsampling=0),
  encode((500, 333), quality=85, subsampling=2),
  encode((240, 320), quality=90, progressive=True),
  encode((256, 256), mode="L"),
  encode((128, 160), mode="CMYK"),
  encode((96, 120), "png"),
]
exif = Image.Exif()
exif[0x0112] = 6
profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
notes = {"exif": exif, "icc_profile": profile}
files = [
  encode((240, 320), **notes),
  encode((128, 160), mode="CMYK", **notes),
  encode((96, 120), "png", mode="RGBA", **notes),
  encode((96, 120), "png", mode="P"),
  encode((96, 120), "webp", **notes),
  encode((96, 120), "tiff", compression="tiff_lzw", **notes),
  encode((96, 120), "tiff", mode="L", **notes),
  encode((96, 120), "gif"),
]

def frame_of(data):
  return next((data.find(m) for m in (b"\\xff\\xc0", b"\\xff\\xc2") if m in data), -1)

def damage(data):
  data, kind = bytearray(data), rng.integers(8)
  if kind == 0:  # cut short
    del data[rng.integers(len(data)):]
  elif kind == 1:  # flipped bits
    for _ in range(rng.integers(1, 50)):
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  elif kind == 2:  # a wrong beginning
    n = rng.integers(1, 64)
    data[:n] = rng.bytes(n)
  elif kind == 3 and frame_of(data) >= 0:  # absurd sizes
    frame = frame_of(data)
    sides = rng.choice([0, 1, 7, 500, 8000, 40000, 65500, 65535], 2)
    data[frame + 5 : frame + 9] = b"".join(int(s).to_bytes(2, "big") for s in sides)
  elif kind == 4:  # a hole
    start = rng.integers(len(data))
    del data[start : start + rng.integers(1, 4000)]
  elif kind == 5:  # a stretch of another file
    start, n = rng.integers(len(data)), rng.integers(1, 2000)
    data[start : start + n] = rng.bytes(n)
  elif kind == 6:  # wrong segment lengths and components
    for place in [i for i in range(len(data) - 4) if data[i] == 0xFF and 0xC0 <= data[i + 1] < 0xF0][:8]:
      if rng.random() < 0.5:
        data[place + 2 + rng.integers(8)] = rng.integers(256)
  else:  # the tail twice, and more
    data += data[rng.integers(len(data)):] + rng.bytes(100)
  return bytes(data)

for data in originals:  # all code is loaded and warm before memory is compared
  image_decoding.decode(data)
  transforms.paper_train_encoded(data, rng, 32)
for data in files:
  own_images.read(data)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
decoded = refused = 0
for i in range(500):
  data, name = damage(originals[i % len(originals)]), f"record {i}"
  try:
    image = image_decoding.decode(data, name)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3, image.shape
    decoded += 1
  except image_decoding.BadRecord as error:
    assert str(error).startswith(name + ": "), error
    refused += 1
  try:
    out = transforms.paper_train_encoded(data, np.random.default_rng(i), 32, name)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8
  except image_decoding.BadRecord as error:
    assert str(error).startswith(name + ": "), error
for i in range(1200):
  data, name = damage(files[i % len(files)]), f"file {i}"
  try:
    image = own_images.read(data, name)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3, image.shape
    decoded += 1
  except image_decoding.BadRecord as error:
    assert str(error).startswith(name + ": ") and "\\n" not in str(error), error
    refused += 1
  own_images.as_stored(data)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(decoded, refused, grown)
"""


def test_damaged_records_and_files():
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300
  )
  assert run.returncode == 0, run.stderr
  decoded, refused, grown_mb = map(int, run.stdout.split())
  assert decoded + refused == 1700
  assert decoded > 200 and refused > 200  # both happen
  assert grown_mb < 700  # MAX_PIXELS as Pillow holds them and as an array
