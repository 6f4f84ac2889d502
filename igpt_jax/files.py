"""Where files lie, how they appear whole or not at all, and whether what is kept is what is meant.

Ground floor.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from igpt_jax import history
from igpt_jax.errors import UserError

# What file systems that have no such promise to make say of a folder, or of any file.
_NOT_FOR_THIS = {
  errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES,
  errno.EPERM, errno.EISDIR,
}  # fmt: skip


def local(name: str, path: str) -> str:
  """The absolute path that a person means, ~ and all; `name` is of the setting.

  Raises:
    UserError: it is a bucket's address, gs://BUCKET/….
  """
  scheme, separator, address = path.partition("://")
  if separator:
    bucket = address.split("/")[0]
    raise UserError(
      f"{name}: {path}; expected a local path; fix: mount the bucket ("
      + (
        f"gcsfuse --implicit-dirs {bucket} /mnt/{bucket}" if scheme == "gs" else f"at /mnt/{bucket}"
      )
      + f") and give the path below /mnt/{bucket}"
    )
  return os.path.abspath(os.path.expanduser(path))


def printable(text: str | os.PathLike[str]) -> str:
  """A file's name, or text that holds one, as it can be printed and written: other bytes as \\xNN."""
  return os.fspath(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
  """Gives a path to write to, beside `path`, and moves it there when the block ends well.

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


@contextlib.contextmanager
def new_folder(path: str, what: str) -> Iterator[str]:
  """Gives a folder to fill, beside `path`, and gives it that name when the block ends well.

  Raises:
    UserError: something is there already, or it can't be written; `what` is named.
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
  """Returns when a file's contents, or a folder's names, are on the disk; where there is such a promise.

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
  """16 hexadecimal digits of a value that JSON can hold."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_file(path: str) -> str:
  """16 hexadecimal digits of a file's contents."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """A JSON object that was kept.

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
  """The leaves of a tree of mappings, by their names joined with dots."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat.update(flatten(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat


def differing(theirs: Any, mine: Mapping[str, Any]) -> list[str]:
  """A line for each value of `mine` that `theirs`, which was read from JSON, hasn't got.

  A field that came later is absent from what older versions kept, which stands for its default then.
  """
  kept = flatten(theirs) if isinstance(theirs, Mapping) else {}
  wanted = flatten(json.loads(json.dumps(mine)))
  return [
    f"  {name}: {kept.get(name, 'absent')} there, {value} here"
    for name, value in wanted.items()
    if (kept[name] != value if name in kept else not history.is_default_of_later(name, value))
  ]


def check_same(name: str, what: str, theirs: Any, mine: Mapping[str, Any], fix: str) -> None:
  """Raises UserError with the lines of `differing`, if any: what is there in place of what is meant."""
  lines = differing(theirs, mine)
  if lines:
    raise UserError(f"{name}: {what}:\n" + "\n".join(lines) + f"\nfix: {fix}")
