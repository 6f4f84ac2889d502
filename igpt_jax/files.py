"""Paths, atomic writes, digests, and comparisons of JSON. Ground floor.

A path is a local file's or the address of an object in a bucket, gs://BUCKET/PATH, which `buckets` reads
and writes. `os.path.join`, `dirname` and `basename` take both.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from igpt_jax import buckets, history
from igpt_jax.errors import BucketError, UserError

# Errors of fsync on file systems that don't support it for a folder, or at all.
_NOT_FOR_THIS = {
  errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES,
  errno.EPERM, errno.EISDIR,
}  # fmt: skip


_scratch = ""  # the folder of `use_scratch`


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Returns True if a path is an address, such as gs://BUCKET/PATH, and not a local file's."""
  return "://" in os.fspath(path)


def place(name: str, path: str, used: bool = True) -> str:
  """Returns the absolute path, with ~ expanded, or the address of a bucket; `name` is the setting's.

  For a path that isn't `used` on this machine, what reads buckets needn't be installed.

  Raises:
    UserError: it is an address of another kind or without a bucket, or what reads buckets is missing.
  """
  if path.startswith(buckets.SCHEME):
    return buckets.normalised(name, path) if used else buckets.address_of(name, path)
  if is_remote(path) or re.match(r"gs:", path):
    raise UserError(
      f"{name}: {path}; expected a local path or gs://BUCKET/PATH; fix: two slashes after gs:, or, of "
      "another scheme, a mount and the path below it"
    )
  return os.path.abspath(os.path.expanduser(path))


def local(name: str, path: str) -> str:
  """Returns the absolute path, with ~ expanded; `name` is the setting's, for errors.

  Raises:
    UserError: it is a bucket's address, gs://BUCKET/….
  """
  scheme, separator, address = path.partition("://")
  if separator:
    bucket = address.split("/")[0]
    place = f"/mnt/{bucket}"
    how = f"gcsfuse --implicit-dirs {bucket} {place}" if scheme == "gs" else f"at {place}"
    raise UserError(
      f"{name}: {path}; expected a local path; fix: mount the bucket ({how}) and give the path below "
      f"{place}"
    )
  return os.path.abspath(os.path.expanduser(path))


def hub_snapshot(path: str) -> tuple[str, str] | None:
  """Returns OWNER/NAME and the commit of a model in the Hugging Face hub's cache; None: it is no such path."""
  match = re.search(
    r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$", path.replace(os.sep, "/")
  )
  return (f"{match[1]}/{match[2]}", match[3]) if match else None


def printable(text: str | os.PathLike[str]) -> str:
  """Returns a file's name, or text with one, as valid UTF-8, with other bytes as \\xNN."""
  return os.fspath(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def user_cache(name: str) -> str:
  """Returns the path of this program's folder `name` in the user's cache, which may not exist."""
  cache = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(cache):  # the XDG specification says to ignore a relative path
    cache = os.path.expanduser("~/.cache")
  return os.path.join(cache, "igpt_jax", name)


def use_scratch(folder: str) -> None:
  """Sets the local folder of `scratch`; "": this program's in the user's cache."""
  global _scratch
  _scratch = local("config.scratch", folder) if folder else ""


def scratch() -> str:
  """Returns the local folder, which may not exist, for copies of objects that must lie on a disk."""
  return _scratch or user_cache("scratch")


def exists(path: str) -> bool:
  """Returns True if there is a file or a folder."""
  return buckets.exists(path) if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
  """Returns True if there is a folder; in a bucket it has something in it."""
  return buckets.is_folder(path) if is_remote(path) else os.path.isdir(path)


def is_file(path: str) -> bool:
  """Returns True if there is a file."""
  return buckets.is_object(path) if is_remote(path) else os.path.isfile(path)


def names(folder: str) -> list[str]:
  """Returns the names in a folder, sorted; [] if there is none."""
  if is_remote(folder):
    return buckets.names(folder)
  return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def size(path: str) -> int:
  """Returns a file's size in bytes; raises FileNotFoundError if there is none."""
  return buckets.size(path) if is_remote(path) else os.path.getsize(path)


def check_reachable(name: str, path: str) -> None:
  """Raises BucketError if `path` is in a bucket that isn't there or can't be read; `name` is the setting's."""
  if is_remote(path):
    try:
      buckets.check_readable(path)
    except BucketError as error:
      raise BucketError(f"{name}: {error}", error.errno or 0) from None


def make_folder(path: str) -> None:
  """Makes a folder and those above it, if they aren't there; a bucket needs none."""
  if not is_remote(path):
    os.makedirs(path, exist_ok=True)


def remove(path: str, missing_ok: bool = False) -> None:
  """Removes a file; raises FileNotFoundError if there is none, unless `missing_ok`."""
  if is_remote(path):
    buckets.remove(path, missing_ok)
    return
  with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext():
    os.remove(path)


def remove_folder(path: str, marker: str = "") -> None:
  """Removes a folder, if it is there, with all in it; errors of a local disk are ignored.

  Args:
    path: the folder's.
    marker: name of the file that tells that a folder is whole; in a bucket, it goes first.
  """
  if is_remote(path):
    buckets.remove_folder(path, marker)
  else:
    shutil.rmtree(path, ignore_errors=True)


def move(source: str, target: str) -> None:
  """Renames a file, on one disk or in one bucket, where it is copied and then removed."""
  if is_remote(source):
    buckets.copy(source, target)
    buckets.remove(source, missing_ok=True)
  else:
    os.replace(source, target)


def copy(source: str, target: str) -> None:
  """Copies a file, all or nothing; what is there is replaced. Within a bucket its server does it."""
  if is_remote(source) and source.split("/")[:3] == target.split("/")[:3]:
    buckets.copy(source, target)
    return
  with opened(source) as old, replacing(target) as partial, open(partial, "wb") as new:
    shutil.copyfileobj(old, new)


def copy_folder(source: str, target: str, marker: str = "") -> None:
  """Copies a folder to a name that isn't taken, on one disk or in one bucket; in that, the `marker` last."""
  if is_remote(source):
    buckets.copy_folder(source, target, marker)
  else:
    shutil.copytree(source, target)


def put_folder(source: str, target: str) -> None:
  """Moves a local folder's files, at any depth, into a folder of a bucket."""
  for parent, _, inside in os.walk(source):
    for name in inside:
      path = os.path.join(parent, name)
      buckets.upload(path, os.path.join(target, os.path.relpath(path, source)))
  shutil.rmtree(source)


def append_line(path: str, line: str) -> None:
  """Appends a line to a text file and flushes it to the disk; an object is written again with it."""
  if is_remote(path):
    text = buckets.read(path) if buckets.is_object(path) else b""
    buckets.write(path, text + f"{line}\n".encode())
    return
  with open(path, "a", encoding="utf-8") as file:
    file.write(f"{line}\n")
    file.flush()
    os.fsync(file.fileno())


def move_folder(source: str, target: str, marker: str = "") -> None:
  """Renames a folder to a name that isn't taken, on one disk or in one bucket.

  In a bucket its objects are copied, the `marker` last, and then removed, the `marker` first: who looks
  for it sees a whole folder or none. After an interruption, the same call goes on.
  """
  if is_remote(source):
    buckets.copy_folder(source, target, marker)
    buckets.remove_folder(source, marker)
  else:
    os.rename(source, target)


@contextlib.contextmanager
def opened(path: str, mode: str = "rb") -> Iterator[IO[Any]]:
  """Opens a file to read, as bytes ("rb") or as text in UTF-8 ("r"); an object is read whole.

  Raises:
    OSError: it can't be read.
  """
  text = None if "b" in mode else "utf-8"
  if is_remote(path):
    contents = io.BytesIO(buckets.read(path))
    yield contents if text is None else io.TextIOWrapper(contents, text)
    return
  with open(path, mode, encoding=text) as file:
    yield file


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
  """Yields a temporary path beside `path`, which is renamed to it when the block succeeds.

  A reader sees the old file or the new one, also after a power cut; after an error the old one stays.
  What replaces an object is written to a temporary file of this machine first, and then whole.
  """
  if is_remote(path):
    with tempfile.TemporaryDirectory(prefix="igpt_jax_") as folder:
      partial = os.path.join(folder, os.path.basename(path))
      yield partial
      buckets.upload(partial, os.fspath(path))
    return
  partial = f"{os.fspath(path)}.partial"
  try:
    yield partial
    sync(partial)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
    raise
  os.replace(partial, path)
  sync(os.path.dirname(os.path.abspath(path)))


def allow_as_usual(path: str | os.PathLike[str]) -> None:
  """Gives a file the permissions of any new one (umask); a temporary file's are its owner's alone."""
  usual = f"{os.fspath(path)}.usual"
  with open(usual, "xb") as file:
    os.chmod(path, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
  os.remove(usual)


@contextlib.contextmanager
def new_folder(path: str, what: str) -> Iterator[str]:
  """Yields a temporary folder beside `path`, which is renamed to it when the block succeeds.

  In a bucket it is the folder itself, whose objects are removed if the block fails, but not if the
  process is killed: the error of the next call tells how to remove them.

  Raises:
    UserError: `path` exists or can't be written; `what` names it.
  """
  if exists(path) or os.path.lexists(path):
    killed = f", or `gcloud storage rm -r {path}` if a killed process has left it unfinished"
    raise UserError(
      f"{what}: {path} exists; fix: name another target{killed if is_remote(path) else ''}"
    )
  if is_remote(path):
    try:
      yield path
    except BaseException:
      remove_folder(path)
      raise
    return
  part = f"{path}.part-{os.getpid()}"
  try:
    os.makedirs(part)
    yield part
    os.rename(part, path)
  except OSError as error:
    why = error.strerror or error
    raise UserError(f"{what}: {path}: {why}; expected a place to write to") from error
  finally:
    shutil.rmtree(part, ignore_errors=True)


def sync(path: str | os.PathLike[str]) -> None:
  """Flushes a file's contents, or a folder's names, to the disk, where the file system can.

  An object is whole and safe as soon as it is written.

  Raises:
    OSError: the disk failed.
  """
  if is_remote(path):
    return
  try:
    handle = os.open(path, os.O_RDONLY)
  except OSError as error:
    if error.errno in _NOT_FOR_THIS:
      return
    raise
  try:
    os.fsync(handle)
  except OSError as error:
    if error.errno not in _NOT_FOR_THIS:
      raise
  finally:
    os.close(handle)


def digest(value: Any) -> str:
  """Returns 16 hexadecimal digits of a value that JSON can hold."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_file(path: str) -> str:
  """Returns 16 hexadecimal digits of a file's contents."""
  with opened(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]  # pyright: ignore[reportArgumentType]


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    OSError: it can't be read.
    ValueError: it isn't a JSON object.
  """
  with opened(os.fspath(path), "r") as file:
    values = json.load(file)
  if not isinstance(values, dict):
    raise ValueError("not a JSON object")
  return values


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the leaves of a tree of mappings, by their names joined with dots."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat.update(flatten(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat


def differing(theirs: Any, ours: Mapping[str, Any]) -> list[str]:
  """Returns a line for every value of `ours` that isn't in `theirs`, which was read from JSON.

  A field that older versions didn't have stands for its default of then.
  """
  kept = flatten(theirs) if isinstance(theirs, Mapping) else {}
  wanted = flatten(json.loads(json.dumps(ours)))
  return [
    f"  {name}: {kept.get(name, 'absent')} there, {value} here"
    for name, value in wanted.items()
    if (kept[name] != value if name in kept else not history.is_default_of_later(name, value))
  ]


def check_same(name: str, what: str, theirs: Any, ours: Mapping[str, Any], fix: str) -> None:
  """Raises UserError with the lines of `differing`, if there are any."""
  if lines := differing(theirs, ours):
    raise UserError(f"{name}: {what}:\n" + "\n".join(lines) + f"\nfix: {fix}")
