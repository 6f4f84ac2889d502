"""Google Cloud Storage, for `files`: the objects of buckets, by address gs://BUCKET/PATH. Ground floor.

An object is written whole or not at all, and read whole. It has no parts to append to or to flush, and
a folder is nothing but the first part of its objects' names. What reading and writing rely on instead:
a finished write is seen by everyone, and an object can be made only if there is none.

gcsfs is imported at the first use. The variables STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL name
another server than Google's, without credentials; the second is the first if it isn't set.
"""

import base64
import concurrent.futures
import contextlib
import errno
import functools
import logging
import os
import posixpath
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from igpt_jax import bucket_errors, extras
from igpt_jax.errors import BucketError, UserError

_LOG = logging.getLogger(__name__)
SCHEME = "gs://"
# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_AT_ONCE = 8  # requests
_CONNECT_SECONDS, _READ_SECONDS = 20, 60
_SILENT_SECONDS = 4.0  # that a process' first request may take until it is told
_TRIES = 3  # of a request whose contents arrive with another checksum
_BLOCK = 1 << 22  # bytes

_asked = threading.Event()  # set by the end of the first request


def normalised(name: str, path: str) -> str:
  """Returns an address without superfluous slashes; `name` is the setting's, for errors.

  Raises:
    UserError: it names no bucket, or gcsfs isn't installed.
  """
  address = address_of(name, path)
  _prepare(_emulator())
  return address


def address_of(name: str, path: str) -> str:
  """Returns an address as `normalised` does, where it isn't used and gcsfs needn't be installed.

  Raises:
    UserError: it names no bucket.
  """
  bucket, _, key = path.removeprefix(SCHEME).partition("/")
  if not _BUCKET.fullmatch(bucket):
    what = f"{bucket!r} isn't a bucket's name" if bucket else "there is no bucket in it"
    raise UserError(f"{name}: {path}: {what}; expected gs://BUCKET/PATH; fix: name the bucket")
  parts = [part for part in key.split("/") if part not in ("", ".")]
  if ".." in parts or not key.isprintable():
    raise UserError(
      f"{name}: {path!r}; expected gs://BUCKET/PATH of printable characters without '..'; fix: the "
      "address as `gcloud storage ls` prints it"
    )
  return SCHEME + "/".join((bucket, *parts))


def _emulator() -> str:
  return os.environ.get("STORAGE_EMULATOR_HOST", "")


def _system() -> Any:
  """Returns gcsfs' file system, signed in; the one that other libraries get behaves as it does.

  Raises:
    UserError: gcsfs isn't installed.
  """
  return _system_of(_emulator())


@functools.lru_cache(maxsize=4)
def _system_of(emulator: str) -> Any:
  return _prepare(emulator)()


@functools.lru_cache(maxsize=4)
def _prepare(emulator: str) -> Any:
  """Returns gcsfs' class, after setting it up for this process and the libraries that use it."""
  # TensorFlow's file system, which etils prefers, has other errors and retries.
  os.environ.setdefault("EPATH_USE_TF", "false")
  try:
    import aiohttp
    import fsspec.config
    import gcsfs.core
  except ImportError:
    raise UserError(f"gs://: buckets need gcsfs; fix: {extras.install('gcs')}") from None
  # Its other file system asks about every bucket over gRPC, with rights that few have.
  for name in ("gcs", "gs"):
    fsspec.register_implementation(name, gcsfs.core.GCSFileSystem, clobber=True)
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # errors are told by who meets them
  settings = fsspec.config.conf.setdefault("gcs", {})
  settings.setdefault("use_listings_cache", False)  # other hosts write, too
  timeout = aiohttp.ClientTimeout(
    total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS
  )
  settings.setdefault("requests_timeout", timeout)
  if emulator:
    settings["token"] = "anon"
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    # It looks for credentials otherwise.
    os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
  return gcsfs.core.GCSFileSystem


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
  """Turns errors of gcsfs into those of files, with `path`, or into BucketError of one line."""
  try:
    with contextlib.nullcontext() if _asked.is_set() else _first(path):
      yield
  except FileNotFoundError:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
  except FileExistsError:
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
  except (UserError, MemoryError):
    raise
  except Exception as error:
    raise bucket_errors.in_words(path, error) from error


@contextlib.contextmanager
def _first(path: str) -> Iterator[None]:
  """Tells, beside the block, that it takes long, as a first request does where there is no network."""
  message = "%s: no answer from the bucket yet; it is asked again for about a minute"
  timer = threading.Timer(_SILENT_SECONDS, _LOG.warning, (message, path))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    _asked.set()


def _info(path: str) -> dict[str, Any] | None:
  """Returns the description of an object or a folder; None: there is neither."""
  if "/" not in path.removeprefix(SCHEME):  # to describe a bucket needs a right that few have
    return {"type": "directory", "size": 0} if names(path) else None
  try:
    with _told(path):
      return _system().info(path)
  except FileNotFoundError:
    return None


def exists(path: str) -> bool:
  """Returns True if there is an object of this name, or a folder."""
  return _info(path) is not None


def is_folder(path: str) -> bool:
  """Returns True if there are objects below this name."""
  info = _info(path)
  return info is not None and info["type"] == "directory"


def is_object(path: str) -> bool:
  """Returns True if there is an object of this name."""
  info = _info(path)
  return info is not None and info["type"] != "directory"


def size(path: str) -> int:
  """Returns an object's size in bytes; raises FileNotFoundError if there is none."""
  return int(described(path)["size"])


def described(path: str) -> dict[str, Any]:
  """Returns an object's metadata: "size", "generation", "crc32c" (base64) and others.

  Raises:
    FileNotFoundError: there is no such object.
  """
  info = _info(path)
  if info is None or info["type"] == "directory":
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
  return info


def names(folder: str) -> list[str]:
  """Returns the names of the objects and folders in a folder, sorted; [] if there are none."""
  own = folder.removeprefix(SCHEME)
  try:
    with _told(folder):
      entries = _system().ls(folder, detail=False)
  except FileNotFoundError:
    return []
  paths = (entry.rstrip("/") for entry in entries)
  return sorted({posixpath.basename(path) for path in paths if path.startswith(f"{own}/")})


def described_below(folder: str) -> dict[str, dict[str, Any]]:
  """Returns all objects in a folder and its folders, path below it -> as `described`, and "address"."""
  with _told(folder):
    found = _system().find(folder, detail=True)
  own = f"{folder.removeprefix(SCHEME).rstrip('/')}/"
  return {
    path.removeprefix(own): {**info, "address": SCHEME + path}
    for path, info in sorted(found.items())
    if path.startswith(own)
  }


def below(folder: str) -> list[str]:
  """Returns the addresses of all objects in a folder and its folders, sorted; [] if there are none."""
  return [info["address"] for info in described_below(folder).values()]


def first_below(folder: str) -> list[str]:
  """Returns the paths below a folder of its first objects, at most 1000: one request's."""
  prefix = folder.removeprefix(SCHEME).partition("/")[2]
  prefix = f"{prefix}/" if prefix else ""
  return [name.removeprefix(prefix) for name in _first_names(folder, prefix, 1000)]


def _first_names(path: str, prefix: str, most: int) -> list[str]:
  """Returns the first names with a prefix in the bucket of `path`: one request's."""
  bucket = path.removeprefix(SCHEME).partition("/")[0]
  with _told(path):
    answer = _system().call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=most, json_out=True)
  return [item["name"] for item in answer.get("items", [])]


def read(path: str, n_bytes: int | None = None) -> bytes:
  """Returns an object's contents, or its first bytes; raises FileNotFoundError if there is none."""
  with _told(path):
    return _system().cat_file(path, end=n_bytes)


def download(path: str, target: str, info: Mapping[str, Any]) -> None:
  """Copies an object into a local file.

  Args:
    path: the object's address.
    target: the local file's path.
    info: the object as `described` has told it.

  Raises:
    FileNotFoundError: there is no such object.
    BucketError: it can't be read, or is another one by now.
  """
  for _ in range(_TRIES):
    with _told(path):
      _system().get_file(path, target)
    if checksum(target) == info["crc32c"]:
      return
  raise BucketError(
    f"{path}: what arrives isn't what its checksum says, after several attempts; fix: is it being rewritten?",
    errno.EIO,
  )


def checksum(path: str) -> str:
  """Returns a local file's CRC32C as `described` tells an object's."""
  import google_crc32c

  sum_of = google_crc32c.Checksum()
  with open(path, "rb") as file:
    for _ in sum_of.consume(file, _BLOCK):
      pass
  return base64.b64encode(sum_of.digest()).decode()


def write(path: str, contents: bytes) -> None:
  """Writes an object, all or nothing; what was there is replaced."""
  _write(path, lambda system: system.pipe_file(path, contents, consistency="md5"))


def upload(source: str, path: str) -> None:
  """Copies a local file into an object, all or nothing; what was there is replaced."""
  _write(path, lambda system: system.put_file(source, path, consistency="md5"))


def _write(path: str, request: Callable[[Any], object]) -> None:
  from gcsfs.retry import ChecksumError

  with _told(path):
    for attempt in range(_TRIES):
      try:
        request(_system())
        return
      except ChecksumError:  # something else arrived
        if attempt + 1 == _TRIES:
          raise


def create(path: str, contents: bytes) -> bool:
  """Makes an object; returns False if there is one with other contents, which stays.

  A request whose answer was lost is sent again: then it is the contents that tell whose the object is.
  """
  try:
    with _told(path):
      _system().pipe_file(path, contents, mode="create")
    return True
  except FileExistsError:
    try:
      return read(path) == contents
    except FileNotFoundError:  # removed meanwhile
      return False


def remove(path: str, missing_ok: bool = False) -> None:
  """Removes an object; raises FileNotFoundError if there is none, unless `missing_ok`."""
  try:
    with _told(path):
      _system().rm_file(path)
  except FileNotFoundError:
    if not missing_ok:
      raise


def remove_generation(path: str, generation: str) -> None:
  """Removes an object if it is still the one of this generation; else does nothing."""
  bucket, _, key = path.removeprefix(SCHEME).partition("/")
  with contextlib.suppress(FileNotFoundError, FileExistsError), _told(path):
    # An answer of 412, precondition failed, comes as FileExistsError.
    _system().call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)


def remove_folder(folder: str, marker: str = "") -> None:
  """Removes all objects of a folder, that of the name `marker` before the others."""
  paths = below(folder)
  first = posixpath.join(folder, marker)
  if first in paths:
    remove(first, missing_ok=True)
  _at_once(functools.partial(remove, missing_ok=True), (path for path in paths if path != first))


def copy(source: str, target: str) -> None:
  """Copies an object within its bucket, all or nothing; what was there is replaced."""
  with _told(source):
    _system().cp_file(source, target)


def copy_folder(source: str, target: str, marker: str = "") -> None:
  """Copies all objects of a folder, that of the name `marker` after the others."""
  paths = below(source)
  last = posixpath.join(source, marker)

  def copied(path: str) -> None:
    copy(path, target + path.removeprefix(source))

  _at_once(copied, (path for path in paths if path != last))
  if last in paths:
    copied(last)


def _at_once(do: Callable[[str], object], paths: Iterable[str]) -> None:
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as threads:
    for _ in threads.map(do, paths):
      pass


def check_writable(folder: str) -> float:
  """Writes an object into a folder and removes it; returns the seconds that this host's clock is ahead.

  Raises:
    BucketError: there is no such bucket, or no right to read, write and remove.
  """
  path = posixpath.join(folder, f".writable.{secrets.token_hex(8)}")
  check_readable(folder)
  with _told(folder):
    system, began = _system(), time.time()
    system.pipe_file(path, b"")
    ended, made = time.time(), system.info(path)["ctime"]
    with contextlib.suppress(FileNotFoundError):  # an answer was lost, and it was removed twice
      system.rm_file(path)
  return (began + ended) / 2 - made.timestamp()


def check_readable(path: str) -> None:
  """Raises BucketError if there is no such bucket, or no right to read in it."""
  bucket, _, key = path.removeprefix(SCHEME).partition("/")
  try:
    _first_names(path, key, 1)
  except FileNotFoundError:
    raise BucketError(
      f"{path}: there is no bucket {bucket}; fix: its name as `gcloud storage ls` prints it, or "
      f"`gcloud storage buckets create gs://{bucket}`",
      errno.ENOENT,
    ) from None
