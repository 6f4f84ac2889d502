"""A trace of some training steps by jax.profiler, to see what the device does in them."""

import contextlib
from collections.abc import Callable

import jax

from igpt_jax.config.run_fields import ProfileConfig


class Profiler:
  """Traces the window's steps; nothing where it has none. A context manager, so that a trace is whole.

  Args:
    window: of steps.
    folder: where the trace goes.
    say: how it is told where that is.
  """

  def __init__(self, window: ProfileConfig, folder: str, say: Callable[[str], None]):
    self._window, self._folder, self._say = window, folder, say
    self._first: int | None = None  # of the steps traced; None: no trace is going on
    self._next = 0
    self._left = bool(window.steps)

  @property
  def tracing(self) -> bool:
    return self._first is not None

  def due(self, step: int) -> bool:
    """Whether `turn` is to be called before this step, with nothing left to compute."""
    if not self._left or step < self._window.start:
      return False
    return self._first is None or step >= self._window.start + self._window.steps

  def turn(self, step: int) -> None:
    """Begins the trace, or ends it."""
    if self._first is None and step < self._window.start + self._window.steps:
      jax.profiler.start_trace(self._folder)
      self._first = self._next = step
    else:
      self.close()

  def named(self, step: int) -> contextlib.AbstractContextManager:
    """Names this step in the trace, while one is taken."""
    if self._first is None:
      return contextlib.nullcontext()
    self._next = step + 1
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def close(self) -> None:
    """Ends the trace, if one is going on, and all of them."""
    self._left = False
    if self._first is None:
      return
    first, self._first = self._first, None
    jax.profiler.stop_trace()
    self._say(
      f"profile: steps {first} to {self._next - 1} in {self._folder}; to look at it: xprof "
      f"--logdir={self._folder} (pip install xprof), or its trace.json.gz in https://ui.perfetto.dev"
    )

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()
