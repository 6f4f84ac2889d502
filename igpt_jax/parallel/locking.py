"""Advisory locks on files, which end with the process that holds them: the kernel lets go, however that
process ends."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from typing import TextIO

from igpt_jax.errors import UserError
from igpt_jax.parallel.hosts import say

# Errors of file systems that have no such locks: some networks', buckets' mostly.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

_files: set[TextIO] = set()  # that hold a lock now


@contextlib.contextmanager
def locked(path: str, what: str, fix: str) -> Iterator[None]:
  """Holds the lock on a file, in which the holder is named; where there are no locks, that is said.

  Args:
    path: of the file; made if need be.
    what: name and value of the setting that is to be held, for messages.
    fix: another way than to wait for the holder or to end it.

  Raises:
    OSError: the file can't be opened.
    UserError: another process holds it.
  """
  with open(path, "a+", encoding="utf-8") as file:
    try:
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
  """Workers that are forked would share the locks, and may outlive this process."""
  while _files:
    _files.pop().close()


os.register_at_fork(after_in_child=_let_go_in_child)
