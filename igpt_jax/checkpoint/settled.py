"""Makes concurrent reads end before the first failure is raised.

Orbax reads arrays concurrently in an event loop that it makes for one call and closes at the first
error. Reads that are still running then find their loop closed, or fail without anybody awaiting them;
either prints a traceback later, in some thread or at garbage collection.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from igpt_jax.checkpoint.process_wide import ProcessWide

try:
  import uvloop  # required by orbax, which uses it for a loop within another one
except ImportError:  # on Windows
  uvloop = None


class _Settling(asyncio.AbstractEventLoop):  # a mixin: `super()` is a real loop
  """Event loop that, if its first task has failed, waits for the others before it closes.

  They aren't cancelled, since a cancelled read would still call back into the closed loop.
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
    return isinstance(first.exception(), Exception)  # KeyboardInterrupt isn't one: don't wait then

  async def _settle(self) -> None:
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
      await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)  # so that tasks that have just ended are garbage collected


class _Loop(_Settling, asyncio.SelectorEventLoop):
  pass


# (module, its `new_event_loop`, the replacement)
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


# In its blocks, new event loops of all threads leave no task running.
settled = ProcessWide(_settling)
