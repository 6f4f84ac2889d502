"""Finds the image files below a folder, at any depth, with a reason for every file left out.

A file is recognised by its suffix, or else by its first bytes. Programs' own leftovers are skipped
without a reason.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import unicodedata
from collections.abc import Mapping

from igpt_jax.files import printable

IMAGE_SUFFIXES = frozenset(
  ".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm .tga".split()
)

# Raw formats: TIFF files whose first image is a thumbnail.
_RAW_SUFFIXES = frozenset(".dng .nef .cr2 .arw .orf .pef .rw2 .srw".split())

# Leftovers of archives, systems and servers, besides names that begin with a dot.
_LEFTOVERS = frozenset(
  {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "lost+found",
    "system volume information",
  }
)  # fmt: skip

_REASONS = 5  # that a summary of files left out names
_START = 64  # number of bytes by which a file's format is recognised

# First bytes of formats that Pillow reads.
_STARTS = (
  b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
  b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"8BPS\0\1", b"qoif",
)  # fmt: skip
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


def canonical(name: str) -> str:
  """Returns a file's name in a form that is the same on every system that the file is copied to.

  Some systems write é as one character, others as two. Bytes that aren't UTF-8 stay, as surrogates.
  """
  if name.isascii():  # the usual case, and fast
    return name
  return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def is_leftover(name: str) -> bool:
  """Returns True if programs give this name to files and folders of their own."""
  return name.startswith(".") or name.lower() in _LEFTOVERS


def scan(folder: str) -> tuple[list[str], list[str], dict[str, str]]:
  """Returns the names in one folder: folders and images, sorted, and the reasons for files left out.

  Raises:
    OSError: the folder can't be read.
  """
  folders, images, left_out = [], [], {}
  with os.scandir(folder) as entries:
    for entry in entries:
      if is_leftover(entry.name):
        continue
      try:
        if entry.is_dir():
          folders.append(entry.name)
        elif not entry.is_file():
          exists = os.path.exists(entry.path)
          left_out[entry.name] = "a pipe or a device" if exists else "a link to nothing"
        elif reason := why_not(entry.path):
          left_out[entry.name] = reason
        else:
          images.append(entry.name)
      except OSError as error:
        left_out[entry.name] = str(error.strerror)
  return sorted(folders, key=_order), sorted(images, key=_order), left_out


def find(folder: str) -> tuple[list[str], dict[str, str]]:
  """Returns the images in a folder and below it as sorted relative paths, and reasons for files left out.

  Links to folders are followed, except to those that are read already or contain this one.
  """
  above = {os.path.abspath(folder), os.path.realpath(folder)}
  above |= {str(parent) for path in tuple(above) for parent in pathlib.Path(path).parents}
  read = {_inode(path) for path in above}
  images, left_out, waiting = [], {}, [""]
  for below in waiting:  # grows while it is iterated over
    try:
      folders, names, others = scan(os.path.join(folder, below))
    except OSError as error:
      left_out[below or "."] = str(error.strerror)
      continue
    images += [os.path.join(below, name) for name in names]
    left_out |= {os.path.join(below, name): reason for name, reason in others.items()}
    for path in (os.path.join(below, name) for name in folders):
      inode = _inode(os.path.join(folder, path))
      if inode in read:
        left_out[path] = "a link to a folder that is read already"
      else:
        read.add(inode)
        waiting.append(path)
  return sorted(images, key=_order), left_out


def holds_image(folder: str) -> bool:
  """Returns True if an image lies in a folder or below it; looks no further than the first.

  Also True of a folder that can't be read: whoever opens it says why.
  """
  seen, waiting = set(), [folder]
  while waiting:
    below = waiting.pop()
    if (inode := _inode(below)) in seen:
      continue
    seen.add(inode)
    try:
      with os.scandir(below) as entries:
        for entry in entries:
          if is_leftover(entry.name):
            continue
          if entry.is_dir():
            waiting.append(entry.path)
          elif entry.is_file() and not why_not(entry.path):
            return True
    except OSError:
      return True
  return False


def why_not(path: str) -> str | None:
  """Returns the reason why a file isn't read as an image; None if it is one, or has an image's suffix."""
  suffix = os.path.splitext(path)[1].lower()
  if suffix in IMAGE_SUFFIXES:
    return None
  if suffix in _RAW_SUFFIXES:
    return "a raw photograph, to be developed first"
  try:
    with open(path, "rb") as file:
      start = file.read(_START)
  except OSError as error:
    return str(error.strerror)
  if start[4:8] == b"ftyp":
    return _why_not_ftyp(start)
  known = (
    start.startswith(_STARTS)
    or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")
    or (start.startswith(b"BM") and start[6:10] == b"\0\0\0\0")
    or re.match(rb"P[1-6]\s+[\d#]", start)
  )
  return None if known else "no image that can be read"


def _brands(start: bytes) -> list[bytes]:
  """Returns the brands of an ISO media file (AVIF, HEIC, films), the major one first; [] for other files."""
  if start[4:8] != b"ftyp":
    return []
  end = min(int.from_bytes(start[:4], "big"), len(start))  # a header may claim 4 GiB of brands
  return [start[8:12], *(start[i : i + 4] for i in range(16, end, 4))]


def is_heic(start: bytes) -> bool:
  """Returns True if a file that starts like this is HEIC, for which Pillow needs a plugin."""
  brands = _brands(start[:_START])
  return bool(brands) and (brands[0] == b"mif1" or any(brand in _HEIC_BRANDS for brand in brands))


def _why_not_ftyp(start: bytes) -> str | None:
  brands = _brands(start)
  if b"avif" in brands or b"avis" in brands:
    from PIL import features

    return None if features.check("avif") else "AVIF, which this Pillow can't read"
  if is_heic(start):
    if importlib.util.find_spec("pillow_heif"):
      return None
    return "HEIC, for which Pillow needs a plugin: pip install pillow-heif"
  return "no image that can be read"


def in_words(left_out: Mapping[str, str]) -> str:
  """Summarises files left out: "3 files: a.txt and 1 more (no image that can be read), …", by 5 reasons."""
  by_reason: dict[str, list[str]] = {}
  for name, reason in left_out.items():
    by_reason.setdefault(reason, []).append(name)
  parts = []
  for reason, names in sorted(by_reason.items()):
    others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    parts.append(f"{printable(min(names, key=_order))}{others} ({reason})")
  if len(parts) > _REASONS:
    parts = [*parts[:_REASONS], "…"]
  return f"{len(left_out):,} file{'s' * (len(left_out) > 1)}: {', '.join(parts)}"


def _order(name: str) -> tuple[str, str]:
  return canonical(name), name


def _inode(path: str) -> tuple[int, int]:
  try:
    status = os.stat(path)
  except OSError:
    return -1, hash(path)
  return status.st_dev, status.st_ino
