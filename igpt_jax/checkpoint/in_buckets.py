"""Orbax in buckets: how it removes folders, and how long it tries to read and write arrays.

Its own way removes a checkpoint's objects in any order, so that one that lacks some looks whole if the
process is killed meanwhile. And it asks for the bucket's metadata before, which the right to read and
write objects doesn't include.
"""

import os

from etils import epath
from orbax.checkpoint._src.path import gcs_utils  # no public API for these
from orbax.checkpoint._src.serialization import tensorstore_utils

from igpt_jax import files
from igpt_jax.checkpoint import folders

# A minute and a half, as gcsfs tries; TensorStore's own are a quarter of an hour.
_RETRIES = {"max_retries": 8, "initial_delay": "1s", "max_delay": "16s"}


def _rmtree(path: epath.Path, *, missing_ok: bool = False) -> None:
  """Removes a folder in a bucket, a checkpoint's last file first."""
  folder = os.fspath(path)
  if not missing_ok and not files.exists(folder):
    raise FileNotFoundError(folder)
  folders.remove(folder)


def mend() -> None:
  """Has Orbax handle buckets by this module; disks as before."""
  gcs_utils.rmtree = _rmtree
  for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    context["gcs_request_retries"] = _RETRIES
