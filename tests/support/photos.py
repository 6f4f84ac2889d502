"""Folders of photos in which much is wrong."""

import shutil

import numpy as np
from PIL import Image


def photo(path, seed, size=(20, 16), **options):
  """Noise, a different one for each seed."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
  Image.fromarray(pixels).save(path, **options)


def photos(root, names, first=0):
  for seed, name in enumerate(names, first):
    photo(root / name, seed)
  return root


def make_album(tmp_path):
  """30 photos, and one of everything that happens to photos."""
  root = photos(tmp_path / "my photos", [f"2019/IMG_{i}.JPG" for i in range(30)])
  shutil.copy(root / "2019/IMG_3.JPG", root / "IMG_3 (1).jpg")
  whole = (root / "2019/IMG_4.JPG").read_bytes()
  (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  (root / "empty.jpg").write_bytes(b"")
  heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
  (root / "IMG_5.HEIC").write_bytes(heic)
  (root / "phone.jpg").write_bytes(heic)
  dark = np.random.default_rng(0).integers(0, 5, (32, 48, 3), np.uint8)
  Image.fromarray(dark).save(root / "pocket.jpg")
  for name in (".DS_Store", "Thumbs.db", "._IMG_6.JPG"):
    (root / name).write_bytes(b"\xff\xd8\xff")
  (root / "2019" / "up").symlink_to(root)
  return root
