"""Changes to the whole process that orbax makes necessary, each undone when nobody needs it any more."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator


class ProcessWide(contextlib.AbstractContextManager):
  """A change made for the first of the blocks that want it, in any thread, and undone after the last."""

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

  def is_told(record: logging.LogRecord) -> bool:
    # orbax also raises what it logs with a traceback; the error is reported in one line.
    of_orbax = "orbax" in record.pathname or "orbax" in record.getMessage()
    return not (record.exc_info and of_orbax)

  def hook(unraisable) -> None:
    # Other writes that were under way when one failed find orbax' event loop closed.
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  logger.addFilter(is_told)
  sys.unraisablehook = hook
  try:
    yield
  finally:
    logger.removeFilter(is_told)
    if sys.unraisablehook is hook:
      sys.unraisablehook = before


# Needed for as long as something may be written: orbax reports failed saves from its own threads.
ignore_followup_errors = ProcessWide(_ignoring_followup_errors)
