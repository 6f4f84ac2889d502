"""Paths, atomic writes, digests, and comparisons of JSON. Ground floor."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from igpt_jax import history
from igpt_jax.errors import UserError

# Errors of fsync on file systems that don't support it for a folder, or at all.
_NOT_FOR_THIS = {
  errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES,
  errno.EPERM, errno.EISDIR,
}  # fmt: skip


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


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
  """Yields a temporary path beside `path`, which is renamed to it when the block succeeds.

  A reader sees the old file or the new one, also after a power cut; after an error the old one stays.
  """
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

  Raises:
    UserError: `path` exists or can't be written; `what` names it.
  """
  if os.path.lexists(path):
    raise UserError(f"{what}: {path} exists; fix: name another target")
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

  Raises:
    OSError: the disk failed.
  """
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
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    OSError: it can't be read.
    ValueError: it isn't a JSON object.
  """
  with open(path, encoding="utf-8") as file:
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
