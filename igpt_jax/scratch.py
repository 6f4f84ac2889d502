"""Copies, on this machine's disk, of folders in buckets, and of what is made for them. Ground floor."""

import concurrent.futures
import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from igpt_jax import buckets, files, units
from igpt_jax.errors import UserError

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

_THREADS = 16  # mostly waiting for the network


def path_for(address: str) -> str:
  """Returns the path of the local folder of what must be on a disk and belongs to an address."""
  name = os.path.basename(address.rstrip("/"))
  return os.path.join(files.scratch(), "of", files.digest(address), name)


def make(folder: str) -> str:
  """Makes a folder of `path_for`, if it isn't there, and returns it.

  Raises:
    UserError: it can't be made.
  """
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError as error:
    raise _no_place(folder, error) from None
  return folder


def fetch(
  objects: Mapping[str, dict[str, Any]], folder: str, beat: Callable[[int], object]
) -> None:
  """Copies objects into a local folder; each file appears whole or not at all.

  Args:
    objects: path below the folder -> the object as `buckets.described` tells it, with its address.
    folder: the local folder.
    beat: called with the number of objects that are copied.

  Raises:
    UserError: an object can't be read, or there is no room.
  """
  size = sum(int(info["size"]) for info in objects.values())
  free = shutil.disk_usage(folder).free
  if size > free:
    raise UserError(
      f"config.scratch: {folder} needs {units.data_size(size)} for copies from a bucket, "
      f"{units.data_size(free)} are free; fix: config.scratch on another disk, or mount the bucket "
      "(gcsfuse --implicit-dirs BUCKET FOLDER) and give the path there"
    )

  def copied(name: str) -> None:
    target = os.path.join(folder, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".copying-") as own:
      buckets.download(objects[name]["address"], part := os.path.join(own, "part"), objects[name])
      files.sync(part)
      os.replace(part, target)

  pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
  try:
    for done, _ in enumerate(pool.map(copied, objects), 1):
      beat(done)
  except FileNotFoundError as error:
    raise UserError(
      f"{error.filename}: it was removed while it was copied; fix: the same command"
    ) from None
  except UserError:
    raise
  except OSError as error:
    raise _no_place(folder, error) from None
  finally:
    pool.shutdown(cancel_futures=True)


def local_copy(path: str) -> str:
  """Returns the path itself if it is local, or that of a whole copy of the object.

  A copy is used again while the object is the same, by its generation and checksum. Of a folder, the
  files in it are copied, but not its folders.

  Raises:
    OSError: the object can't be read.
    UserError: the copy can't be written.
  """
  if not files.is_remote(path):
    return path
  if files.is_folder(path):
    return mirror(path, lambda name: "/" not in name, lambda done, of: None)[0]
  info = buckets.described(path)
  folder = os.path.join(files.scratch(), "objects", files.digest(path))
  version = files.digest([path, str(info["generation"]), info["crc32c"]])
  name, own = os.path.basename(path), make(os.path.join(folder, version))
  copy = os.path.join(own, name)
  if not os.path.exists(copy):
    fetch({name: {**info, "address": path}}, own, lambda done: None)
    for before in files.names(folder):  # of older objects of the name; who has one open keeps it
      if before != version:
        shutil.rmtree(os.path.join(folder, before), ignore_errors=True)
  return copy


def mirror(
  address: str, wanted: Callable[[str], bool], beat: Callable[[int, int], object]
) -> tuple[str, int, int]:
  """Makes a local folder hold what a folder of a bucket does; what is there already stays.

  Args:
    address: the folder's.
    wanted: tells of a path below the folder if it is to be copied.
    beat: called with the number of objects that are copied, and of those to copy.

  Returns:
    The local folder, the number of files that were copied now, and of all that are there.

  Raises:
    UserError: it can't be read, or there is no room, or an object's name can't be a file's.
  """
  folder = make(path_for(address))
  with alone(folder):
    objects = {
      name: info for name, info in buckets.described_below(address).items() if wanted(name)
    }
    for name in objects:
      if os.path.normpath(name) != name or name.startswith(("/", "..")) or "\0" in name:
        raise UserError(
          f"{address}: {name!r} can't be a file's name; expected names without empty parts and dots; "
          "fix: rename that object"
        )
    index = f"{folder}.json"
    try:
      kept = files.read_json(index)
    except (OSError, ValueError):
      kept = {}
    there = {
      name: info
      for name, info in objects.items()
      if kept.get(name) == str(info["generation"])
      and _size(os.path.join(folder, name)) == int(info["size"])
    }
    for name in kept.keys() - there.keys():
      with contextlib.suppress(OSError):
        os.remove(os.path.join(folder, name))
    missing = {name: info for name, info in objects.items() if name not in there}
    # Written before: what is copied and isn't in it is copied again.
    _write_index(index, there)
    if missing:
      beat(0, len(missing))
      fetch(missing, folder, lambda done: beat(done, len(missing)))
      _write_index(index, objects)
  return folder, len(missing), len(objects)


def _write_index(path: str, objects: Mapping[str, Mapping[str, Any]]) -> None:
  generations = {name: str(info["generation"]) for name, info in objects.items()}
  with files.replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
    json.dump(generations, file)


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
  """Waits until no other process of this machine copies into a folder."""
  with open(f"{folder}.lock", "a") as file:
    if fcntl is not None:
      with contextlib.suppress(OSError):  # no such locks there: what is copied twice is the same
        fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _size(path: str) -> int:
  try:
    return os.path.getsize(path)
  except OSError:
    return -1


def _no_place(folder: str, error: OSError) -> UserError:
  why = os.strerror(error.errno) if error.errno else str(error)
  room = "; fix: config.scratch on another disk" if error.errno == errno.ENOSPC else ""
  return UserError(
    f"config.scratch: {folder}: {why}; expected a local place to write to"
    + (room or "; fix: --config.scratch=FOLDER")
  )
