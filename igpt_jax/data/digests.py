"""Digests of files, which identify data by contents rather than by names, times or paths.

Digests are cached in the user's cache folder under a file's size, times and inode, which change when
the file is rewritten, so that a file is read once, not at every start. If the cache is damaged, lost or
not writable, files are read again.
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

from igpt_jax import files, watchdog
from igpt_jax.reporting.progress import Countdown

UNREADABLE = "unreadable"  # in place of the digest of a file that can't be read

_LOG = logging.getLogger(__name__)
_THREADS = 16  # mostly waiting for a disk or a network
_FILES_PER_TASK = 64
_BLOCK_BYTES = 2**20
# A file system's clock may tick only every two seconds (FAT): a file read so soon after it was written
# may be written again without a change of its times.
_TICK_NS = 2 * 10**9


def of_files(paths: Sequence[str], kept_as: str, verify: bool = False) -> list[str]:
  """Computes digests of files' contents: 32 hexadecimal digits each, or UNREADABLE.

  Args:
    paths: the files.
    kept_as: name of this set of files; each set has its own index in the cache.
    verify: read every file, even if the index has its digest.
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


def of_contents(
  judge: Callable[[str], str], paths: Sequence[str], contents: Sequence[str], kept_as: str
) -> list[str]:
  """Returns `judge(path)` of every file, cached by the files' digests, which `of_files` computes.

  An answer of several words (the reason why a file can't be used, which another version may be able to
  read) isn't cached. `kept_as` names the index, and the work in progress lines.
  """
  kept = _read_index(kept_as)
  new = [i for i, content in enumerate(contents) if content not in kept]
  answers = [kept.get(content, "") for content in contents]
  clock = Countdown(kept_as, len(new), _LOG.warning)
  # Decoded images may be large, and keep the cores busy.
  threads = min(_THREADS, os.cpu_count() or 1)
  judged = _in_threads(judge, [paths[i] for i in new], clock, threads, per_task=1)
  for i, answer in zip(new, judged, strict=True):
    answers[i] = answer
  entries = dict(zip(contents, answers, strict=True))
  _write_index(kept_as, {key: word for key, word in entries.items() if " " not in word}, kept)
  return answers


def of_reading(
  read: Callable[[], str], paths: Sequence[str], kept_as: str, verify: bool = False
) -> str:
  """Returns the digest that `read` computes from these files, cached until one of them changes.

  The other arguments are those of `of_files`.
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
  """Combines many digests to one, 16 hexadecimal digits; only a part's last field may hold zero bytes."""
  whole = hashlib.sha256()
  for part in parts:
    line = "\0".join(str(field) for field in part) + "\n"
    whole.update(line.encode("utf-8", "surrogateescape"))
  return whole.hexdigest()[:16]


def beat() -> None:
  """Reports to the watchdog that computing digests, which may take long, makes progress."""
  watchdog.beat("reading data to know its contents")


def _in_threads(
  work: Callable[[str], Any],
  paths: Sequence[str],
  clock=None,
  threads: int = _THREADS,
  per_task: int = _FILES_PER_TASK,
) -> list[Any]:
  """Returns `work(path)` of every path, in the order of the paths."""
  results: list[Any] = []
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    tasks = [paths[at : at + per_task] for at in range(0, len(paths), per_task)]
    for part in pool.map(lambda task: [work(path) for path in task], tasks):
      results += part
      beat()
      if clock is not None:
        clock.tick(len(results))
  finally:
    pool.shutdown(cancel_futures=True)
  return results


class _State(NamedTuple):
  key: str  # changes whenever the file is written
  size: int  # bytes
  written: int  # newest of the file's times, in ns


def _state(file: str | int, path: str | None = None) -> _State | None:
  """Returns the state of a path, or of a descriptor that was opened by `path`; None if it has none."""
  try:
    status = os.stat(file)
  except OSError:
    return None
  fields = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, path or file)
  text = "\0".join(str(field) for field in fields)
  key = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
  return _State(key, status.st_size, max(status.st_mtime_ns, status.st_ctime_ns))


class _Reader:
  """Reads files of `total` bytes in all, with progress lines if that takes long."""

  def __init__(self, name: str, total: int):
    work = f"{name}: megabytes read, to know it by its contents"
    self._clock = Countdown(work, total // 10**6, _LOG.warning)
    self._done, self._lock = 0, threading.Lock()

  def __call__(self, path: str) -> tuple[str | None, str | None]:
    """Returns the key to cache a file's digest under (None if it may be changing), and the digest."""
    began = time.time_ns()
    whole = hashlib.sha256()
    try:
      with open(path, "rb", buffering=0) as file:
        before = _state(file.fileno(), path)
        while block := file.read(_BLOCK_BYTES):
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
  name = hashlib.sha256(os.fsencode(os.path.abspath(kept_as))).hexdigest()[:32]
  return os.path.join(files.user_cache("digests"), name)


def _read_index(kept_as: str) -> dict[str, str]:
  """Returns the cached digests by their keys; none if there is no index or it is damaged."""
  try:
    with open(_path_of_index(kept_as), "rb") as file:
      checksum, _, body = file.read().partition(b"\n")
  except OSError:
    return {}
  if checksum != hashlib.sha256(body).hexdigest().encode():
    return {}
  return dict(line.split() for line in body.decode().splitlines())


def _write_index(kept_as: str, entries: dict[str, str], kept: dict[str, str]) -> None:
  """Stores entries if they changed; if they can't be stored, the files are read again next time."""
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
      files.allow_as_usual(partial)
      os.replace(partial, path)
    except OSError:
      os.remove(partial)
      raise
