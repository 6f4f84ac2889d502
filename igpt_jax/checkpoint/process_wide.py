"""Changes to the whole process that orbax makes necessary, undone when they aren't needed any more."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator


class ProcessWide(contextlib.AbstractContextManager):
  """Change that the first `with` block in any thread makes, and the end of the last one undoes."""

  def __init__(self, change: Callable[[], contextlib.AbstractContextManager]):
    self._change, self._undo = change, contextlib.ExitStack()
    self._blocks, self._lock = 0, threading.Lock()

  def __enter__(self):
    with self._lock:
      if not self._blocks:
        self._undo.enter_context(self._change())
      self._blocks += 1

  def __exit__(self, *unused):
    with self._lock:
      self._blocks -= 1
      if not self._blocks:
        self._undo.close()


@contextlib.contextmanager
def _ignoring_followup_errors() -> Iterator[None]:
  before, logger = sys.unraisablehook, logging.getLogger("absl")

  def is_wanted(record: logging.LogRecord) -> bool:
    # Errors that orbax logs with a traceback it also raises, and they are reported in one line.
    from_orbax = "orbax" in record.pathname or "orbax" in record.getMessage()
    return not (record.exc_info and from_orbax)

  def hook(unraisable) -> None:
    # After a failed write, concurrent ones raise this since orbax has closed its event loop.
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  logger.addFilter(is_wanted)
  sys.unraisablehook = hook
  try:
    yield
  finally:
    logger.removeFilter(is_wanted)
    if sys.unraisablehook is hook:
      sys.unraisablehook = before


# Needed as long as something may be being written: orbax reports failed saves from its own threads.
ignore_followup_errors = ProcessWide(_ignoring_followup_errors)
