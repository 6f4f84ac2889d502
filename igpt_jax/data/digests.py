"""Digests of files, which identify data by contents rather than by names, times or paths.

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
from typing import Any, NamedTuple

from igpt_jax import watchdog
from igpt_jax.reporting.progress import Countdown

UNREADABLE = "unreadable"  # stands in place of a digest

_LOG = logging.getLogger(__name__)
_THREADS = 16  # they mostly wait for a disk or a network
_TOGETHER = 64  # files per task
_BLOCK = 2**20  # bytes that are read at a time
# A file written this shortly before it was read may be written again without a change of its times: a
# file system's clock may tick only every two seconds (FAT).
_TICK_NS = 2 * 10**9


def of_files(paths: Sequence[str], kept_as: str, verify: bool = False) -> list[str]:
  """Computes digests of files' contents: 32 hexadecimal digits each, or UNREADABLE.

  Args:
    paths: of the files.
    kept_as: names the set of files among the user's: each set has an index of its own.
    verify: read every file, whatever the index says.
  """
  kept = _read_index(kept_as)
  known = {} if verify else kept
  clock = Countdown(f"{kept_as}: files looked at", len(paths), _LOG.warning)
  states = _in_threads(_state, paths, clock)
  new = [i for i, state in enumerate(states) if state and state.key not in known]
  entries = {state.key: known[state.key] for state in states if state and state.key in known}
  digests = [entries.get(state.key) if state else None for state in states]
  reader = _Reader(kept_as, sum(states[i].size for i in new))
  for i, (key, digest) in zip(new, _in_threads(reader, [paths[i] for i in new]), strict=True):
    digests[i] = digest
    if key is not None:
      entries[key] = digest
  _write_index(kept_as, entries, kept)
  return [digest or UNREADABLE for digest in digests]


def of_reading(
  read: Callable[[], str], paths: Sequence[str], kept_as: str, verify: bool = False
) -> str:
  """The digest that `read` makes of what is in these files; kept until one of them changes.

  Arguments as of `of_files`.
  """
  kept = _read_index(kept_as)
  began = time.time_ns()
  before = [_state(path) for path in paths]
  key = combined([[state.key if state else "" for state in before]])
  if key in kept and not verify:
    return kept[key]
  digest = read()
  settled = all(state and state.written < began - _TICK_NS for state in before)
  if settled and before == [_state(path) for path in paths]:
    _write_index(kept_as, {key: digest}, kept)
  return digest


def combined(parts: Iterable[Sequence[str | int]]) -> str:
  """One digest of many, 16 hexadecimal digits. A part's fields, but for the last, hold no zero byte."""
  whole = hashlib.sha256()
  for part in parts:
    line = "\0".join(str(field) for field in part) + "\n"
    whole.update(line.encode("utf-8", "surrogateescape"))
  return whole.hexdigest()[:16]


def beat() -> None:
  """Tells the watchdog that computing digests, which may take long, makes progress."""
  watchdog.beat("reading data to know its contents")


def _in_threads(work: Callable[[str], Any], paths: Sequence[str], clock=None) -> list[Any]:
  """`work` of every path, in their order."""
  done: list[Any] = []
  pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
  try:
    starts = range(0, len(paths), _TOGETHER)
    for part in pool.map(lambda at: [work(path) for path in paths[at : at + _TOGETHER]], starts):
      done += part
      beat()
      if clock is not None:
        clock.tick(len(done))
  finally:
    pool.shutdown(cancel_futures=True)
  return done


class _State(NamedTuple):
  """State of a file: its key (a later write changes it), its size, its newest time."""

  key: str
  size: int
  written: int


def _state(file: str | int, path: str | None = None) -> _State | None:
  """The state of a path, or of an open file and the path it was opened by; None: there is none."""
  try:
    status = os.stat(file)
  except OSError:
    return None
  fields = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, path or file)
  text = "\0".join(str(field) for field in fields)
  key = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
  return _State(key, status.st_size, max(status.st_mtime_ns, status.st_ctime_ns))


class _Reader:
  """Reads files, with progress lines where that takes long."""

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
        before = _state(file.fileno(), path)
        while block := file.read(_BLOCK):
          whole.update(block)
          with self._lock:
            self._done += len(block)
            beat()
            self._clock.tick(self._done // 10**6)
        after = _state(file.fileno(), path)
    except OSError:
      return None, None
    settled = before and before == after and before.written < began - _TICK_NS
    return before.key if before and settled else None, whole.hexdigest()[:32]


def _path_of_index(kept_as: str) -> str:
  cache = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(cache):  # as its specification says
    cache = os.path.expanduser("~/.cache")
  name = hashlib.sha256(os.fsencode(os.path.abspath(kept_as))).hexdigest()[:32]
  return os.path.join(cache, "igpt_jax", "digests", name)


def _read_index(kept_as: str) -> dict[str, str]:
  """Key -> digest; nothing where there is no index, or it isn't whole."""
  try:
    with open(_path_of_index(kept_as), "rb") as file:
      checksum, _, body = file.read().partition(b"\n")
  except OSError:
    return {}
  if checksum != hashlib.sha256(body).hexdigest().encode():
    return {}
  return dict(line.split() for line in body.decode().splitlines())


def _write_index(kept_as: str, entries: dict[str, str], kept: dict[str, str]) -> None:
  """Stores entries that changed; if they can't be stored, the files are read again next time."""
  if not entries or entries == kept:
    return
  path = _path_of_index(kept_as)
  body = "".join(f"{key} {digest}\n" for key, digest in entries.items()).encode()
  with contextlib.suppress(OSError):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # A unique name: several processes may write the index, and the last one wins.
    handle, partial = tempfile.mkstemp(dir=os.path.dirname(path))
    try:
      with open(handle, "wb") as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
      os.replace(partial, path)
    except OSError:
      os.remove(partial)
      raise
