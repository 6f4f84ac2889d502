"""Traces of training steps by jax.profiler, which show what the devices do in them."""

import contextlib
import os
from collections.abc import Callable

import jax

from igpt_jax import files
from igpt_jax.config.run_fields import ProfileConfig


class Profiler:
  """Profiler of a window of steps, if it has any; leaving its context ends a trace that is going on.

  Args:
    window: the steps to trace.
    folder: the folder to write the trace to.
    say: called with a message on where the trace is.
  """

  def __init__(self, window: ProfileConfig, folder: str, say: Callable[[str], None]):
    self._window, self._folder, self._say = window, folder, say
    remote = files.is_remote(folder)  # jax traces to disks alone
    self._local = os.path.join(files.scratch(), f"profile-{os.getpid()}") if remote else folder
    self._first: int | None = None  # the trace's first step; None: no trace is going on
    self._next = 0
    self._pending = bool(window.steps)

  @property
  def tracing(self) -> bool:
    return self._first is not None

  def due(self, step: int) -> bool:
    """True if `turn` must be called before this step, with nothing left to compute."""
    if not self._pending or step < self._window.start:
      return False
    return self._first is None or step >= self._window.start + self._window.steps

  def turn(self, step: int) -> None:
    """Begins the trace, or ends it."""
    if self._first is None and step < self._window.start + self._window.steps:
      jax.profiler.start_trace(self._local)
      self._first = self._next = step
    else:
      self.close()

  def named(self, step: int) -> contextlib.AbstractContextManager:
    """Returns a context that names this step in the trace, if one is going on."""
    if self._first is None:
      return contextlib.nullcontext()
    self._next = step + 1
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def close(self) -> None:
    """Ends the trace, if one is going on; no other one begins."""
    self._pending = False
    if self._first is None:
      return
    first, self._first = self._first, None
    jax.profiler.stop_trace()
    if self._local != self._folder:
      files.put_folder(self._local, self._folder)
    self._say(
      f"profile: steps {first} to {self._next - 1} in {self._folder}; to look at it: xprof "
      f"--logdir={self._folder} (pip install xprof), or its trace.json.gz in https://ui.perfetto.dev"
    )

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()
