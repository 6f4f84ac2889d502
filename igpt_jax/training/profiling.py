"""A trace of some training steps by jax.profiler, to see what the device does in them."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax

from igpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Window:
  """The steps to trace: from `start` (0: the first) on, `steps` many; 0: none.

  Raises:
    UserError: they aren't whole numbers from 0 on.
  """

  start: int = 0
  steps: int = 0

  def __post_init__(self):
    for name in ("start", "steps"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"config.profile.{name}: {value!r}; expected a whole number, 0 or more")

  def check_within(self, total: int) -> None:
    """Raises UserError when none of them is among the run's `total` steps."""
    if self.steps and self.start >= total:
      raise UserError(
        f"config.profile.start: {self.start}; expected less than the run's {total} steps"
      )


class Profiler:
  """Traces the window's steps; nothing where it has none. A context manager, so that a trace is whole.

  Args:
    window: of steps.
    folder: where the trace goes.
    say: how it is told where that is.
  """

  def __init__(self, window: Window, folder: str, say: Callable[[str], None]):
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
