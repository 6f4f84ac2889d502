"""A save that fails doesn't end a run at once: another try, and another, each later and said, until
`train.save_retry_seconds` are over.

Training waits meanwhile: what it computed would be lost with it. Older checkpoints stay as they are,
for none is deleted before a newer one is whole. Several processes try together: one that fails at the
beginning of a save tells the others at once; for one that fails in the background they wait as long
again before they know.
"""

import os
import re
import time
from collections.abc import Callable

from igpt_jax import watchdog
from igpt_jax.checkpoint import SAVE_ERRORS, Checkpoints
from igpt_jax.errors import SaveFailed
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.training.state import TrainState

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries


class Saver:
  """Saves states as a job does, again where that fails.

  Args:
    checkpoints: where to.
    begin: (state, step) -> None; begins to write the state there.
    retry_seconds: after the first failure, in which to try again; 0: not at all.
  """

  def __init__(
    self, checkpoints: Checkpoints, begin: Callable[[TrainState, int], None], retry_seconds: float
  ):
    self._checkpoints, self._begin, self._seconds = checkpoints, begin, retry_seconds
    self._before: Callable[[], None] = lambda: None

  def __call__(
    self, state: TrainState, step: int, before: Callable[[], None] = lambda: None
  ) -> None:
    """Begins to save `state`; after a failure, the last save's too, returns when it is saved.

    Args:
      state, step: what `begin` takes.
      before: what must be on the disk before: told so before every try.

    Raises:
      SaveFailed: it couldn't be.
    """
    self._before = before
    error = _caught(self._checkpoints.wait)
    if not hosts.on_any(error is not None):
      error = _caught(lambda: (before(), self._begin(state, step)))
      if not hosts.on_any(error is not None):
        return
    self._try_again(state, step, error)

  def failed(self) -> bool:
    """Whether the last save has failed, as far as this is known already: then save now.

    Of several processes it is known at the next save.
    """
    return self._checkpoints.failed()

  def settle(self) -> None:
    """Returns when nothing is being written any more, be it whole or not."""
    error = _caught(self._checkpoints.close)
    if error is not None:
      say(f"checkpoint: the last one wasn't saved: {_in_words(error)}")

  def finish(self, state: TrainState, step: int) -> None:
    """Returns when `state`, whose save was begun, is saved.

    Raises:
      SaveFailed: it couldn't be.
    """
    error = _caught(self._checkpoints.wait)
    if hosts.on_any(error is not None):
      self._try_again(state, step, error)

  def _try_again(self, state: TrainState, step: int, error: Exception | None) -> None:
    began, pause, tries = time.monotonic(), _FIRST_PAUSE, 1
    deadline = began + self._seconds

    def whole() -> None:
      self._before()
      self._checkpoints.reopen()
      self._begin(state, step)
      self._checkpoints.wait()

    while True:
      why = _in_words(error)
      left = deadline - time.monotonic()
      if hosts.on_any(left <= 0):
        raise SaveFailed(
          f"checkpoint: step {step} can't be written to {self._checkpoints.folder} ({why}); tried "
          f"{tries} times in {time.monotonic() - began:.0f} s (config.train.save_retry_seconds: "
          f"{self._seconds:g}); {self._checkpoints.kept()}; fix: make room there or mend it; the "
          "same command goes on from the newest"
        ) from error
      say(
        f"checkpoint: NOT SAVED at step {step}: {why}; training waits; older checkpoints are "
        f"untouched; trying again in {min(pause, left):.0f} s, for {left:.0f} s more"
      )
      watchdog.beat("waiting to save again")
      time.sleep(min(pause, left))
      pause, tries = min(2 * pause, _LONGEST_PAUSE), tries + 1
      error = _caught(whole)
      if not hosts.on_any(error is not None):
        say(f"checkpoint: step {step} is saved, at try {tries}")
        return


def _caught(function: Callable[[], object]) -> Exception | None:
  try:
    function()
  except SAVE_ERRORS as error:
    return error
  return None


def _in_words(error: Exception | None) -> str:
  if error is None:
    return "it failed on another process"
  first: BaseException = error
  while cause := first.__cause__ or first.__context__:
    first = cause
  if isinstance(first, OSError) and first.strerror:
    return first.strerror
  if "DEADLINE_EXCEEDED" in str(first):
    return "another process didn't come to the end of its part"
  said = re.search(r"os_error_code='(\d+)'", str(first))  # in tensorstore's many words
  if said:
    return os.strerror(int(said[1]))
  return f"{type(first).__name__}: {str(first)[:300]}"
