"""One run at a time in a workdir. Jobs that only read one don't ask."""

import contextlib
import os
from collections.abc import Iterator

from igpt_jax.parallel import hosts
from igpt_jax.parallel.locking import locked

FILE = ".lock"


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
  """Holds a workdir that exists; the main process does.

  Raises:
    UserError: another run holds it.
  """
  with contextlib.ExitStack() as stack:
    if hosts.is_main():
      path = os.path.join(workdir, FILE)
      stack.enter_context(locked(path, f"workdir: {workdir}", "another --workdir"))
    yield
