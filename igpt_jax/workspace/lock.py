"""Lock of a workdir, for one run at a time. Jobs that only read a workdir don't take it."""

import contextlib
import os
from collections.abc import Iterator

from igpt_jax.parallel import hosts
from igpt_jax.parallel.locking import locked

FILE = ".lock"


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
  """Locks an existing workdir, on the main process.

  Raises:
    UserError: another run has locked it.
  """
  if not hosts.is_main():
    yield
    return
  path = os.path.join(workdir, FILE)
  with locked(path, f"workdir: {workdir}", "another --workdir"):
    yield
