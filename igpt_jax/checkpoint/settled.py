"""Concurrent reads that have all ended when the first failure is raised.

Orbax reads arrays at the same time, in event loops that it makes for a call and closes with the first
error. What is still under way then finds its loop closed, or fails unheard; either is told later, by
whichever thread or garbage collection comes upon it, in tracebacks of its own.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from igpt_jax.checkpoint.process_wide import ProcessWide

try:
  import uvloop  # of orbax' own requirements: for a loop within another one
except ImportError:  # on Windows
  uvloop = None


class _Settling(asyncio.AbstractEventLoop):  # a mixin: `super()` is a real loop
  """An event loop that, if its first task has failed, waits for the others before it closes.

  They aren't cancelled: a read that is cancelled still calls back, into the closed loop.
  """

  _first: asyncio.Task | None = None

  def create_task(self, *args, **kwargs) -> asyncio.Task:
    task = super().create_task(*args, **kwargs)  # pyright: ignore[reportAbstractUsage]
    self._first = self._first or task
    return task

  def close(self) -> None:
    if not self.is_closed() and self._failed():
      self.run_until_complete(self._settle())
    super().close()  # pyright: ignore[reportAbstractUsage]

  def _failed(self) -> bool:
    first = self._first
    if first is None or not first.done() or first.cancelled():
      return False
    return isinstance(first.exception(), Exception)  # Ctrl-C isn't, and doesn't want to wait

  async def _settle(self) -> None:
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
      await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)  # let tasks that have just ended be collected


class _Loop(_Settling, asyncio.SelectorEventLoop):
  pass


# (module, what it makes loops by, what is in its place meanwhile)
_MAKERS: list[tuple[Any, Any, Any]] = [(asyncio, asyncio.new_event_loop, _Loop)]
if uvloop is not None:

  class _UVLoop(_Settling, uvloop.Loop):
    pass

  _MAKERS.append((uvloop, uvloop.new_event_loop, _UVLoop))


@contextlib.contextmanager
def _settling() -> Iterator[None]:
  for module, _, settling in _MAKERS:
    module.new_event_loop = settling
  try:
    yield
  finally:
    for module, original, _ in _MAKERS:
      module.new_event_loop = original


# Within its blocks new event loops, in all threads, leave no task running.
settled = ProcessWide(_settling)
