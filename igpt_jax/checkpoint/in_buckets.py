"""Orbax' removal of folders in buckets, replaced.

Its own removes a checkpoint's objects in any order, so that one that lacks some looks whole if the
process is killed meanwhile. And it asks for the bucket's metadata before, which the right to read and
write objects doesn't include.
"""

import os

from etils import epath
from orbax.checkpoint._src.path import gcs_utils  # no public API removes a step otherwise

from igpt_jax import files
from igpt_jax.checkpoint import folders


def _rmtree(path: epath.Path, *, missing_ok: bool = False) -> None:
  """Removes a folder in a bucket, a checkpoint's last file first."""
  folder = os.fspath(path)
  if not missing_ok and not files.exists(folder):
    raise FileNotFoundError(folder)
  folders.remove(folder)


def mend() -> None:
  """Has Orbax remove folders in buckets by this module; those on disks as before."""
  gcs_utils.rmtree = _rmtree
