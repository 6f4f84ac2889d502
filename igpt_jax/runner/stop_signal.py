"""The request to stop a training run: SIGTERM, or Ctrl-C."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpt_jax import stopping
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say

Rows = dict[str, np.ndarray]


class EvaluationStopped(Exception):
  """The run is to stop before all images are evaluated; when it goes on, it evaluates them anew."""


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
    self._calls = 0  # of `_agreed`; the same on all processes

  def begin(self, at_step: int) -> None:
    """Takes the signals over: with the step after `at_step`, which begins now, there is something to save."""
    hosts.wait_for_all("compiled")  # a signal to all processes finds all of them training, or none
    self._last_step = at_step + 1
    self._began = True
    stopping.answer_by(self._answer)
    if jax.process_count() > 1:
      stopping.hand_over()

  def asked(self, at_step: int) -> str | None:
    """Returns the signal's name if the run is to stop at `at_step`; to be called at every step."""
    with self._lock:
      self._last_step = at_step
    self._agree()
    return self.requested

  def begins(self, at_step: int) -> bool:
    """Returns True if the step after `at_step` may begin: one process hasn't been asked meanwhile."""
    with self._lock:
      if self.requested is None:
        self._last_step = at_step + 1
      return self.requested is None

  def through(self, batches: Iterable[Rows]) -> Iterator[Rows]:
    """Passes an evaluation's batches on, the same number on all processes.

    Raises:
      EvaluationStopped: the run is to stop.
    """
    for batch in batches:
      self._agree()
      if self.requested:
        raise EvaluationStopped
      yield batch

  def next(self, batches: Any) -> Rows | None:
    """Returns the next batch of training; None: the run is to stop, and the batch hasn't come.

    Of several processes none can leave a step that others have begun: there it waits.
    """
    if jax.process_count() > 1 or not self._began:
      return next(batches)
    try:
      with stopping.interruptible():
        return next(batches)
    except stopping.Interrupted as interrupted:
      self.requested = self.requested or str(interrupted)
      return None

  def _agree(self) -> None:
    """Asks whether all of several processes are to stop at this call. Collective, without waiting."""
    serves = jax.config.jax_enable_preemption_service  # pyright: ignore[reportAttributeAccessIssue]
    if jax.process_count() == 1 or not serves or self.requested:
      return
    # They agree on a call that none of them has made yet: the next one, or that after it.
    self._calls += 1
    if multihost_utils.reached_preemption_sync_point(self._calls):
      self.requested = self._heard or stopping.SIGTERM
      say(f"stopping after step {self._last_step}: saving")

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
