"""Features of a folder in a bucket: made and read in `config.scratch`, and copied whole into the bucket.

  STORE/whole.json   checksums of the store's files: written last and removed first

A store without it, or with other files, is one that somebody is writing, or has begun to: it isn't read.
Every host has its own scratch: the main process writes the bucket, and the others read that.
"""

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from igpt_jax import buckets, files, scratch, watchdog
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.probing.store import FeatureStore

_WHOLE = "whole.json"
_LAST = ("progress.json", "identity.json")  # of a copy: without them it holds nothing


def local(folder: str) -> str:
  """Returns where a folder's features are made and read: the folder itself unless it is in a bucket."""
  return scratch.path_for(folder) if files.is_remote(folder) else folder


def exists(folder: str) -> bool:
  """Returns True if there are features of this folder, in it or in scratch."""
  return files.exists(folder) or os.path.exists(local(folder))


def forget(folder: str) -> None:
  """Removes a folder's features, and their copies."""
  for each in {folder, local(folder)}:
    files.remove_folder(each)


def opened(
  store: str, computed_from: Mapping[str, Any], *, rows: int, width: int, side: int
) -> tuple[FeatureStore, bool]:
  """Opens a split's features, those of a bucket in scratch; the main process copies them there first.

  Args:
    store: the split's folder, or its address.
    computed_from: the `identity` of `FeatureStore`.
    rows: number of images, the split's first ones.
    width: width of one layer's features.
    side: height and width of the images, in pixels.

  Returns:
    The features, and on the main process whether they are all in `store`.

  Raises:
    UserError: they are of something else or damaged, or can't be copied.
  """
  if not files.is_remote(store):
    return FeatureStore(store, computed_from, rows=rows, width=width, side=side), True
  # Here by checkpoint: what another one has left on this machine is nobody's.
  split = os.path.basename(store).rpartition("-")[0]
  here = os.path.join(
    local(os.path.dirname(store)), f"{split}-{files.digest(dict(computed_from))[:8]}"
  )
  is_kept = hosts.is_main() and fetch(store, here)
  try:
    features = FeatureStore(here, computed_from, rows=rows, width=width, side=side, kept_in=store)
  except UserError:
    files.remove_folder(here)  # the next start copies it anew
    raise
  return features, is_kept


def share(features: FeatureStore, store: str, changed: bool) -> None:
  """Copies complete features into a bucket if they have `changed`, and to the other hosts. Collective.

  Raises:
    BucketError: the bucket can't be written or read.
  """
  if not files.is_remote(store):
    return
  if hosts.is_main() and changed:
    publish(features.folder, store)
  hosts.wait_for_all("features in the bucket")
  if not hosts.is_main():
    fetch(store, features.folder)


def fetch(store: str, folder: str) -> bool:
  """Copies a store from a bucket, unless it isn't whole there or has nothing that isn't here.

  Args:
    store: its address.
    folder: its local folder, whose files are replaced.

  Returns:
    True if the bucket has all that is here then.

  Raises:
    UserError: it can't be read, or there is no room.
  """
  objects = buckets.described_below(store)
  sums = _sums(store, objects)
  if sums is None:
    return False
  identity, theirs = (files.read_json(os.path.join(store, name)) for name in reversed(_LAST))
  scratch.make(os.path.dirname(folder))
  with scratch.alone(folder):  # of several jobs the first one copies, and the others find its copy
    if _read(folder, "identity.json") == identity:
      ours = _read(folder, "progress.json")
      if all(ours.get(layer, 0) >= rows for layer, rows in theirs.items()):
        return ours == theirs
    shutil.rmtree(folder, ignore_errors=True)
    scratch.make(folder)
    for names in (sums.keys() - {*_LAST}, _LAST[:1], _LAST[1:]):
      scratch.fetch({name: objects[name] for name in sorted(names)}, folder, _beat)
  say(f"features: copied from {store} to {folder}")
  return True


def publish(folder: str, store: str) -> None:
  """Copies a complete store into a bucket.

  Args:
    folder: its local folder.
    store: its address.

  Raises:
    BucketError: it can't be written.
  """
  names = [name for name in files.names(folder) if name.endswith((".npy", ".json"))]
  sums = {name: buckets.checksum(os.path.join(folder, name)) for name in names}
  objects = buckets.described_below(store)
  if _sums(store, objects) == sums:
    return
  whole = os.path.join(store, _WHOLE)
  files.remove(whole, missing_ok=True)
  for done, (name, sum_of) in enumerate(sums.items()):
    _beat(done)
    if name not in objects or objects[name]["crc32c"] != sum_of:
      buckets.upload(os.path.join(folder, name), os.path.join(store, name))
  with files.replacing(whole) as partial, open(partial, "w", encoding="utf-8") as file:
    json.dump(sums, file, indent=2)
  say(f"features: copied to {store}")


def _sums(store: str, objects: Mapping[str, Mapping[str, Any]]) -> dict[str, str] | None:
  """Returns the checksums of a store's files in a bucket; None: it isn't whole."""
  try:
    sums = files.read_json(os.path.join(store, _WHOLE)) if _WHOLE in objects else {}
  except (FileNotFoundError, ValueError):
    return None
  same = all(objects.get(name, {}).get("crc32c") == sum_of for name, sum_of in sums.items())
  return sums if same and sums.keys() >= {*_LAST} else None


def _read(folder: str, name: str) -> dict[str, Any]:
  try:
    return files.read_json(os.path.join(folder, name))
  except (OSError, ValueError):
    return {}


def _beat(done: int) -> None:
  watchdog.beat("copying features")
