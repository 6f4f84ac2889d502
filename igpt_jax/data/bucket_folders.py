"""Folders of images in buckets: copied whole to `config.scratch`, and read there.

A data set is read again and again, in another order each time, and known by the contents of all its
files. What a folder of a bucket holds is found out once in a process, for all of its splits.
"""

import functools
import logging
import pathlib

from igpt_jax import scratch
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
    raise UserError(
      f"data.path {address}: no files there; expected a folder of images; fix: `gcloud storage ls "
      f"{address}` shows what there is"
    )
  say_once(f"{address}: {total:,} files, {new:,} of them copied now, are read from {folder}")
  return pathlib.Path(folder)


def _is_wanted(path: str) -> bool:
  """Returns False for what stands for a folder, and for programs' own leftovers."""
  return (
    bool(path) and not path.endswith("/") and not any(map(image_files.is_leftover, path.split("/")))
  )
