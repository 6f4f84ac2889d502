"""Folders of images in buckets: copied whole to `config.scratch`, and read there.

A data set is read again and again, in another order each time, and known by the contents of all its
files. What a folder of a bucket holds is found out once in a process, for all of its splits.
"""

import functools
import logging
import os
import pathlib

import numpy as np

from igpt_jax import buckets, files, scratch
from igpt_jax.data import digests, image_files
from igpt_jax.data.folder import say_once
from igpt_jax.errors import UserError
from igpt_jax.reporting.progress import Countdown

_LOG = logging.getLogger(__name__)


@functools.cache
def copied(address: str) -> pathlib.Path:
  """Returns the local copy of a folder in a bucket, after copying what isn't there yet.

  Raises:
    UserError: there is no such folder, it can't be read, or there is no room for it.
  """
  clock: Countdown | None = None

  def beat(done: int, total: int) -> None:
    nonlocal clock
    clock = clock or Countdown(f"{address}: files copied to config.scratch", total, _LOG.warning)
    digests.beat()
    clock.tick(done)

  folder, new, total = scratch.mirror(address, _is_wanted, beat)
  if not total:
    raise _nothing_at(address)
  say_once(f"{address}: {total:,} files, {new:,} of them copied now, are read from {folder}")
  return pathlib.Path(folder)


def look(kind: str, path: str) -> str:
  """Reads one file of a data set in a bucket, and copies nothing; returns what there is, in words.

  Args:
    kind: `data.name`, folder or tokens.
    path: `data.path`, an address.

  Raises:
    UserError: there is no such data set, or it can't be read.
  """
  address = files.place("data.path", path)
  if kind == "tokens":
    file = address if files.is_file(address) else os.path.join(address, "train.npy")
    try:
      is_array = buckets.read(file, 64).startswith(np.lib.format.MAGIC_PREFIX)
    except FileNotFoundError:
      raise UserError(f"data.path {file}: no such file; expected tokens [N, T] in .npy") from None
    if not is_array:
      raise UserError(f"data.path {file}: not a .npy; expected a .npy of integers [N, T]")
    return f"{file} can be read"
  names = [name for name in buckets.first_below(address) if _is_wanted(name)]
  if not names:
    raise _nothing_at(address)
  images = (n for n in names if os.path.splitext(n)[1].lower() in image_files.IMAGE_SUFFIXES)
  if (name := next(images, None)) is None:
    return f"{address} has files, of which the first {len(names):,} are no images"
  buckets.read(os.path.join(address, name))
  return f"{address} has images, of which {name} can be read"


def _nothing_at(address: str) -> UserError:
  return UserError(
    f"data.path {address}: no files there; expected a folder of images; fix: `gcloud storage ls "
    f"{address}` shows what there is"
  )


def _is_wanted(path: str) -> bool:
  """Returns False for what stands for a folder, and for programs' own leftovers."""
  return (
    bool(path) and not path.endswith("/") and not any(map(image_files.is_leftover, path.split("/")))
  )
