"""The request to stop a training run: SIGTERM, or Ctrl-C."""

import os
import signal
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from igpt_jax import stopping
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say


class StopSignal:
  """Request to stop, by SIGTERM or Ctrl-C, which the loop asks for between two steps.

  Ctrl-C after that leaves at once. Several processes must stop at the same step: there jax' own handler
  takes SIGTERM, and agrees on a step with the others in the background; Ctrl-C is handed on as SIGTERM.

  Args:
    newest: returns the newest checkpoint's step, for the last words of a process that leaves.
    requested: the signal that has asked already; None: none has.
  """

  def __init__(self, newest: Callable[[], int | None], requested: str | None = None):
    self.requested = requested
    self._newest = newest
    self._heard, self._began = requested, False
    self._last_step, self._lock = 0, threading.Lock()

  def begin(self) -> None:
    """Takes the signals over: from now on there is something to save."""
    hosts.wait_for_all("compiled")  # a signal to all processes finds all of them training, or none
    self._began = True
    stopping.answer_by(self._answer)
    if jax.process_count() > 1:
      stopping.hand_over()

  def asked(self, at_step: int) -> str | None:
    """Returns the signal's name if the run is to stop before `at_step`; to be called at every step."""
    serves = jax.config.jax_enable_preemption_service  # pyright: ignore[reportAttributeAccessIssue]
    if jax.process_count() > 1 and serves:
      if multihost_utils.reached_preemption_sync_point(at_step):
        self.requested = self._heard or stopping.SIGTERM
        say(f"stopping after step {at_step}: saving")
      return self.requested
    with self._lock:
      self._last_step = at_step + 1
      return self.requested

  def _answer(self, name: str) -> str:
    """Answers a signal, in a thread: see `stopping.Answer`."""
    with self._lock:
      again, self._heard = self._heard is not None, self._heard or name
      if jax.process_count() == 1:
        self.requested = self._heard
    if again:
      if name != stopping.CTRL_C:
        return ""
      step, left = self._newest(), f"left at once by {name}"
      if step is None:
        return f"{left}: there is no checkpoint yet; the same command starts again"
      return (
        f"{left}: the newest checkpoint is that of step {step}; the same command goes on from it"
      )
    leave = f"{stopping.CTRL_C}{' again' if name == stopping.CTRL_C else ''} leaves at once"
    if jax.process_count() > 1:
      say(f"stopping when all processes have agreed on a step; {leave}")
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      say(f"stopping after step {self._last_step}: saving; {leave}")
    return ""

  def __enter__(self):
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
    # A process that was asked to stop is about to end: further signals change nothing.
    if self._began and (kind or self.requested is None):
      stopping.answer_by(None)
      stopping.take_back()
