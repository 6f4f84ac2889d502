"""Saving with retries: a save that fails is tried again, at growing intervals, for
`train.save_retry_seconds`.

Training waits meanwhile, so that nothing computed is lost. Older checkpoints are kept, since none is
deleted before a newer one is complete. Several processes retry together: a failure at the beginning of
a save is known to all at once, one in the background when the others wait for that save.
"""

import errno
import os
import re
import time
from collections.abc import Callable

from igpt_jax import checkpoint, watchdog
from igpt_jax.checkpoint import SAVE_ERRORS, Checkpoints
from igpt_jax.errors import BucketError, SaveFailed
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.training.state import TrainState

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries
_ELSEWHERE = "it failed on another process"


class Saver:
  """Saves states, with retries.

  Args:
    checkpoints: the run's checkpoints.
    begin: (state, step) -> None; begins to write the state.
    retry_seconds: the time for retries after a failure; 0: none.

  Attributes:
    seconds: the longest time from the beginning of a save until it was on the disk; None: none was yet.
  """

  seconds: float | None = None

  def __init__(
    self, checkpoints: Checkpoints, begin: Callable[[TrainState, int], None], retry_seconds: float
  ):
    self._checkpoints, self._begin, self._seconds = checkpoints, begin, retry_seconds
    self._before: Callable[[], None] = lambda: None
    self._began: float | None = None  # when the save under way did

  def __call__(
    self, state: TrainState, step: int, before: Callable[[], None] = lambda: None
  ) -> None:
    """Begins to save `state`; after a failure, of this save or the last, returns when it is saved.

    Args:
      state, step: the arguments of `begin`.
      before: called before every try, to flush what must be on the disk before the checkpoint.

    Raises:
      SaveFailed: the retries' time is over.
    """
    self._before = before
    error = _caught(self._checkpoints.wait)
    self._take_time()
    if not hosts.on_any(error is not None, "the end of the last save"):
      self._began = time.monotonic()
      error = self._prepared() or _caught(lambda: self._begin(state, step))
      if not hosts.on_any(error is not None, "the beginning of a save"):
        return
    self._try_again(state, step, error)

  def failed(self) -> bool:
    """True if the last save is known to have failed; never with several processes. Doesn't block."""
    self._take_time()
    return self._checkpoints.failed()

  def newest(self) -> int | None:
    """Returns the step of the newest complete checkpoint; None: there is none. For any thread."""
    return checkpoint.latest_step(self._checkpoints.folder)

  def settle(self) -> None:
    """Waits for a save under way to succeed or fail."""
    error = _caught(self._checkpoints.close)
    if error is not None:
      say(f"checkpoint: the last one wasn't saved: {_in_words(error)}")

  def finish(self, state: TrainState, step: int) -> None:
    """Returns when `state`, whose save has begun, is saved.

    Raises:
      SaveFailed: the retries' time is over.
    """
    error = _caught(self._checkpoints.wait)
    self._take_time()
    if hosts.on_any(error is not None, "the end of the last save"):
      self._try_again(state, step, error)

  def _prepared(self) -> Exception | None:
    """Returns the error of what must be on the disk before, on every process if one has it. Collective."""
    error = _caught(self._before)
    failed = hosts.on_any(error is not None, "what is flushed before a save")
    return error or (OSError(errno.EIO, _ELSEWHERE) if failed else None)

  def _take_time(self) -> None:
    """Notes how long the save under way has taken, once it is known to have ended."""
    if self._began is not None and not self._checkpoints.is_saving():
      self.seconds = max(self.seconds or 0.0, time.monotonic() - self._began)
      self._began = None

  def _try_again(self, state: TrainState, step: int, error: Exception | None) -> None:
    began, pause, tries = time.monotonic(), _FIRST_PAUSE, 1
    deadline = began + self._seconds

    def whole() -> None:
      self._checkpoints.reopen()
      self._begin(state, step)
      self._checkpoints.wait()

    while True:
      why = _in_words(error)
      left = deadline - time.monotonic()
      if hosts.on_any(left <= 0, "the next try to save"):
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
      error = self._prepared() or _caught(whole)
      if not hosts.on_any(error is not None, "a save that is tried again"):
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
    return _ELSEWHERE
  if isinstance(error, BucketError):
    return str(error)
  first: BaseException = error
  while cause := first.__cause__ or first.__context__:
    first = cause
  if isinstance(first, OSError) and first.strerror:
    return first.strerror
  if "DEADLINE_EXCEEDED" in str(first):
    return "another process didn't come to the end of its part"
  if code := re.search(r"os_error_code='(\d+)'", str(first)):  # tensorstore's message
    return os.strerror(int(code[1]))
  return f"{type(first).__name__}: {str(first)[:300]}"
