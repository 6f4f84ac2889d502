"""Digests of files, by which data is known: their contents decide, not their names, times or places.

Each digest is kept in the user's cache, with all that a rewritten file can't have in common with what
it was (size, times, inode), so that a file is read once, not at every start. A cache that is damaged,
lost or can't be written costs the time of reading again, nothing else.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from igpt_jax.metrics import Countdown

UNREADABLE = "unreadable"  # in the place of a digest

_LOG = logging.getLogger(__name__)
_THREADS = 16  # mostly waiting: for the disk, or for another machine's
_TOGETHER = 64  # files that a thread takes at a time
_BLOCK = 2**20  # bytes that are read at a time
# A file that was written this shortly before it was read may be written once more without its times
# telling: a file system's clock ticks as seldom as every two seconds (FAT).
_TICK_NS = 2 * 10**9


def of_files(paths: Sequence[str], kept_as: str, verify: bool = False) -> list[str]:
  """The digest of each file's contents, 32 hexadecimal digits, or UNREADABLE.

  Args:
    paths: of the files.
    kept_as: names the set of files among the user's: each set has an index of its own.
    verify: read every file, whatever the index says.
  """
  index = _path_of_index(kept_as)
  kept = {} if verify or index is None else _read_index(index)
  clock = Countdown(f"{kept_as}: files looked at", len(paths), _LOG.warning)
  states = _in_threads(_state, paths, clock)
  new = [i for i, state in enumerate(states) if state is not None and state[0] not in kept]
  reader = _Reader(kept_as, sum(states[i][1] for i in new))
  found: list[str | None] = [None if state is None else kept.get(state[0]) for state in states]
  entries = {state[0]: kept[state[0]] for state in states if state and state[0] in kept}
  for i, (key, digest) in zip(new, _in_threads(reader, [paths[i] for i in new]), strict=True):
    found[i] = digest
    if key is not None:
      entries[key] = digest
  if index is not None and entries and entries != kept:
    # It is a cache: who can't keep it reads again.
    with contextlib.suppress(OSError):
      _write_index(index, entries)
  return [digest or UNREADABLE for digest in found]


def combined(parts: Iterable[Sequence[str | int]]) -> str:
  """One digest of many, 16 hexadecimal digits. A part's fields, but for the last, hold no zero byte."""
  whole = hashlib.sha256()
  for part in parts:
    line = "\0".join(str(field) for field in part) + "\n"
    whole.update(line.encode("utf-8", "surrogateescape"))
  return whole.hexdigest()[:16]


def _in_threads(work: Callable[[str], Any], paths: Sequence[str], clock=None) -> list[Any]:
  """`work` of every path, in their order."""
  done: list[Any] = []
  pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
  try:
    starts = range(0, len(paths), _TOGETHER)
    for part in pool.map(lambda at: [work(path) for path in paths[at : at + _TOGETHER]], starts):
      done += part
      if clock is not None:
        clock.tick(len(done))
  finally:
    pool.shutdown(cancel_futures=True)
  return done


def _key(path: str, status: os.stat_result) -> str:
  """A name for a file as it is now: none that is written later has it."""
  fields = (path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
  text = "\0".join(str(field) for field in fields)
  return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _state(path: str) -> tuple[str, int] | None:
  """A file's key and size; None: there's none."""
  try:
    status = os.stat(path)
  except OSError:
    return None
  return _key(path, status), status.st_size


class _Reader:
  """Reads files, and says how far it has come where that takes long."""

  def __init__(self, name: str, total: int):
    self._clock = Countdown(
      f"{name}: megabytes read, to know it by its contents", total // 10**6, _LOG.warning
    )
    self._done, self._lock = 0, threading.Lock()

  def __call__(self, path: str) -> tuple[str | None, str | None]:
    """The key to keep a file's digest by (None: it may be changing just now), and the digest."""
    began = time.time_ns()
    whole = hashlib.sha256()
    try:
      with open(path, "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        while block := file.read(_BLOCK):
          whole.update(block)
          with self._lock:
            self._done += len(block)
            self._clock.tick(self._done // 10**6)
        key = _key(path, os.fstat(file.fileno()))
    except OSError:
      return None, None
    settled = max(before.st_mtime_ns, before.st_ctime_ns) < began - _TICK_NS
    kept = settled and key == _key(path, before)
    return key if kept else None, whole.hexdigest()[:32]


def _path_of_index(kept_as: str) -> str | None:
  cache = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(cache):  # as its specification says
    cache = os.path.expanduser("~/.cache")
  name = hashlib.sha256(os.fsencode(os.path.abspath(kept_as))).hexdigest()[:32]
  return os.path.join(cache, "igpt_jax", "digests", name) if os.path.isabs(cache) else None


def _read_index(path: str) -> dict[str, str]:
  """Key -> digest; nothing where the index isn't whole."""
  try:
    with open(path, "rb") as file:
      checksum, _, body = file.read().partition(b"\n")
  except OSError:
    return {}
  if checksum.decode(errors="replace") != hashlib.sha256(body).hexdigest():
    return {}
  return dict(line.split() for line in body.decode().splitlines())


def _write_index(path: str, entries: dict[str, str]) -> None:
  body = "".join(f"{key} {digest}\n" for key, digest in entries.items()).encode()
  os.makedirs(os.path.dirname(path), exist_ok=True)
  # A name of its own: several processes may be at it, and the last one's stays.
  handle, partial = tempfile.mkstemp(dir=os.path.dirname(path))
  try:
    with open(handle, "wb") as file:
      file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    os.replace(partial, path)
  except OSError:
    os.remove(partial)
    raise
