"""Advisory locks on files; the kernel releases them, however the process that holds them ends."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from typing import TextIO

from igpt_jax.errors import UserError
from igpt_jax.parallel.hosts import say

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

# Errors of file systems without such locks: some network file systems, most mounted buckets.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

_files: set[TextIO] = set()  # open files on which this process holds a lock


@contextlib.contextmanager
def locked(path: str, what: str, fix: str) -> Iterator[None]:
  """Holds the lock on a file, and writes the holder into it; without lock support it warns instead.

  Args:
    path: the file, created if need be.
    what: name and value of the setting that the lock protects, for messages.
    fix: an alternative to waiting for the holder or ending it, for messages.

  Raises:
    OSError: the file can't be opened.
    UserError: another process holds it.
  """
  with open(path, "a+", encoding="utf-8") as file:
    try:
      if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no such locks")
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise UserError(
        f"{what} is in use by another run ({file.read().strip() or 'unknown'}); expected one at a "
        f"time; fix: wait until that has ended, end it, or {fix}"
      ) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      say(f"{what} can't be locked ({error.strerror}): take care that no other run uses it")
    else:
      file.truncate(0)
      since = time.strftime("%Y-%m-%d %H:%M:%S %z")
      file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {since}\n")
      file.flush()
    _files.add(file)
    try:
      yield
    finally:
      _files.discard(file)


def _let_go_in_child() -> None:
  """Releases the locks in forked workers, which would share them and may outlive this process."""
  while _files:
    _files.pop().close()


if hasattr(os, "register_at_fork"):  # Windows doesn't fork
  os.register_at_fork(after_in_child=_let_go_in_child)
