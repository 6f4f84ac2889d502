"""Limits of a request, and the queue of requests."""

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator

from igpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of the server and of each request."""

  samples: int = 8  # per image
  upload_bytes: int = 10 * 2**20  # file size; data/own_images.py limits the decoded image
  upload_seconds: float = 60.0  # duration of an upload
  waiting: int = 8  # requests waiting besides the one that is served
  seconds: float = 120.0  # drawing time of a request from its first row on, without compilation

  def __post_init__(self):
    for name, least in (("samples", 1), ("upload_bytes", 1), ("waiting", 0), ("seconds", 0.001)):
      value = getattr(self, name)
      if not (math.isfinite(value) and value >= least):
        raise UserError(f"{name}: {value}; expected {least} or more")


class Full(Exception):
  """The queue has no free place."""


class Line:
  """Queue of requests, served one at a time. Belongs to one event loop.

  A place is taken before the upload, so that no upload is in vain; requests are served in the order in
  which uploads end, so that none waits for a slow connection.
  """

  def __init__(self, waiting: int):
    self._most = waiting + 1
    self._places = 0
    self._queue: list[object] = []
    self._moved = asyncio.Event()

  def take_place(self) -> None:
    """Takes a place, to be returned by `give_back_place`. Raises Full if there is none."""
    if self._places >= self._most:
      raise Full
    self._places += 1

  def give_back_place(self) -> None:
    self._places -= 1

  async def turn(self, me: object) -> AsyncIterator[int]:
    """Queues up; yields the number of requests ahead whenever it changes, 0 last. Then call `leave`."""
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
    """Leaves the queue, whether served or not."""
    if me in self._queue:
      self._queue.remove(me)
      self._moved.set()
      self._moved = asyncio.Event()
