"""How much one person may ask for, and how many may wait; and the line that they wait in."""

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator

from igpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the server puts up with.

  Attributes:
    samples: of one image.
    upload_bytes: of one image's file. (How many pixels it may unfold to, and
      into how much memory, data/own_images.py says.)
    upload_seconds: that sending it may take.
    waiting: requests that wait for the one that is served.
    seconds: of drawing for one request, from its first row on: not of compiling before it.
  """

  samples: int = 8
  upload_bytes: int = 10 * 2**20
  upload_seconds: float = 60.0
  waiting: int = 8
  seconds: float = 120.0

  def __post_init__(self):
    for name, least in (("samples", 1), ("upload_bytes", 1), ("waiting", 0), ("seconds", 0.001)):
      value = getattr(self, name)
      if not (math.isfinite(value) and value >= least):
        raise UserError(f"{name}: {value}; expected {least} or more")


class Full(Exception):
  """The line is as long as it may be."""


class Line:
  """Those who are served, one at a time, in order. Of one event loop.

  A place is taken before an image is sent, so that nobody sends one for nothing; the order is that
  in which images have arrived, so that nobody waits for a slow connection.
  """

  def __init__(self, waiting: int):
    self._most = waiting + 1
    self._places = 0
    self._queue: list[object] = []
    self._moved = asyncio.Event()

  def take_place(self) -> None:
    """Raises Full where there is none; otherwise `give_back_place` has to follow."""
    if self._places >= self._most:
      raise Full
    self._places += 1

  def give_back_place(self) -> None:
    self._places -= 1

  async def turn(self, me: object) -> AsyncIterator[int]:
    """Queues up; yields how many are before me whenever that changes, 0 last. Then `leave`."""
    self._queue.append(me)
    last = None
    while True:
      ahead = self._queue.index(me)
      if ahead != last:
        yield ahead
        last = ahead
      if ahead == 0:
        return
      moved = self._moved
      await moved.wait()

  def leave(self, me: object) -> None:
    """Ends my turn, or my waiting for it."""
    if me in self._queue:
      self._queue.remove(me)
      self._moved.set()
      self._moved = asyncio.Event()
