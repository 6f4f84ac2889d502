"""One run at a time in a workdir: an advisory lock that ends with the process that holds it.

It is the main process that takes it, on WORKDIR/.lock; the kernel lets go of it however that process
ends. Jobs that only read a workdir don't ask.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from typing import TextIO

import jax

from igpt_jax.errors import UserError
from igpt_jax.parallel.hosts import say

FILE = ".lock"

# What is said where file systems have no such locks: some networks', buckets' mostly.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

_files: set[TextIO] = set()  # that hold a lock now


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
  """Holds a workdir that exists.

  Raises:
    UserError: another run holds it.
  """
  if jax.process_index() != 0:
    yield
    return
  path = os.path.join(workdir, FILE)
  with open(path, "a+", encoding="utf-8") as file:
    _take(file, workdir)
    _files.add(file)
    try:
      yield
    finally:
      _files.discard(file)


def _take(file: TextIO, workdir: str) -> None:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    raise UserError(
      f"workdir: {workdir} is in use by another run ({file.read().strip() or 'unknown'}); expected "
      "one at a time; fix: wait until that has ended, end it, or another --workdir"
    ) from None
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    say(
      f"workdir: {workdir} can't be locked ({error.strerror}): take care that no other run uses it"
    )
    return
  file.truncate(0)
  file.write(
    f"host {socket.gethostname()}, process {os.getpid()}, since "
    f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}\n"
  )
  file.flush()


def _let_go_in_child() -> None:
  """Workers that are forked would share the lock, and may outlive this process."""
  while _files:
    _files.pop().close()


os.register_at_fork(after_in_child=_let_go_in_child)
