"""Files that appear whole or not at all. Ground floor: imports nothing of the project."""

import contextlib
import errno
import os
from collections.abc import Iterator

# What file systems that have no such promise to make say of a folder, or of any file.
_NOT_FOR_THIS = {
  errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES,
  errno.EPERM, errno.EISDIR,
}  # fmt: skip


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
