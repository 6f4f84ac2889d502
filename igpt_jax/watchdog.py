"""What the process is at, and what ends it when it gets nowhere. Ground floor: imports nothing of the project.

Whoever works says so, by `enter` and `beat`, which cost less than a microsecond. A `Watchdog` looks on
from a thread. It can't see a hang in native code that keeps Python's lock.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

STATUS = 124  # of a process that was ended because it hung; `timeout` ends so too
# What is done for the first time is compiled first, which may take long and shows no progress.
FIRST_SECONDS = 3_600.0
_LAST_WORDS_SECONDS = 30  # that telling why may take: the place it is told to may hang, too

_beats = 0
_phase = "start"
_doing = ""
_begun: set[tuple[str, str]] = set()
_tellers: list[subprocess.Popen] = []  # of last words


def enter(phase: str) -> None:
  """The process has got somewhere, and now begins or goes on with `phase`."""
  global _phase
  beat()
  _phase = phase


def beat(doing: str = "") -> None:
  """The process has got somewhere within its phase, and is now `doing` something."""
  global _beats, _doing
  _begun.add((_phase, _doing))
  _doing = doing
  _beats += 1


class Watchdog:
  """Ends the process with `STATUS` when neither `enter` nor `beat` is called for some time.

  Before that it tells the phase and the stacks of all threads on stderr, and ends worker processes.
  What a process does for the first time gets `FIRST_SECONDS` at least. Time in which the process is
  stopped doesn't count.

  Args:
    seconds: without progress, that are too many; 0: nothing is watched.
    field: the setting they come from, to be named.
  """

  def __init__(self, seconds: float, field: str):
    self._seconds, self._field = seconds, field
    self._seen, self._idle = -1, 0.0
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self):
    if self._seconds:
      enter("start")
      self._thread.start()
    return self

  def __exit__(self, *unused):
    self._ended.set()

  def _watch(self) -> None:
    pause = min(self._seconds / 20, 5.0)
    looked = time.monotonic()
    while not self._ended.wait(pause):
      now = time.monotonic()
      # After a SIGSTOP the clock has run on, the process has not.
      if self.hangs(min(now - looked, 2 * pause)):
        self._end(self._idle)
      looked = now

  def hangs(self, seconds: float) -> bool:
    """Whether nothing has moved for too long; asked `seconds` after the last time."""
    if _beats != self._seen:
      self._seen, self._idle = _beats, 0.0
      return False
    self._idle += seconds
    first = (_phase, _doing) not in _begun
    return self._idle > (max(self._seconds, FIRST_SECONDS) if first else self._seconds)

  def _end(self, idle: float) -> None:
    late = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (STATUS,))
    late.daemon = True
    late.start()
    where = f"{_phase}, {_doing}" if _doing else _phase
    try:
      sys.stdout.flush()
      print(
        f"igpt_jax: hung: in phase {where}: no progress for {idle:.0f} s (config.{self._field}: "
        f"{self._seconds:g}); ending with status {STATUS}; the same command goes on from the newest "
        "checkpoint; where every thread is:",
        file=sys.stderr,
        flush=True,
      )
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
      _hush()
    finally:
      end_workers()  # only now: who waits for one of them would raise an error of its own
      os._exit(STATUS)


def end_workers() -> None:
  """Kills the processes that this one has started to load its data."""
  for worker in multiprocessing.active_children():
    worker.kill()


@functools.cache
def end_with_parent() -> None:
  """Ends a worker process when the one that started it is gone, however that ended."""
  parent = multiprocessing.parent_process()
  if parent is None:
    return

  def wait() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, name="end with parent", daemon=True).start()


@contextlib.contextmanager
def last_words(text: str) -> Iterator[None]:
  """Has `text` told on stderr if this process ends within the block.

  By a shell that waits for it: jax ends a process from native code, an operating system kills it.
  """
  script = 'read -r word || printf "%s\\n" "$1" >&2'
  with subprocess.Popen(["sh", "-c", script, "sh", text], stdin=subprocess.PIPE) as teller:
    _tellers.append(teller)
    try:
      yield
    finally:
      _hush()


def _hush() -> None:
  """Nothing more is to be told when this process ends."""
  while _tellers:
    with contextlib.suppress(BrokenPipeError):
      _tellers.pop().communicate(b"enough\n")


def tell_stacks() -> None:
  """Has a crash tell every thread's Python stack on stderr; and SIGUSR1, without ending the process."""
  faulthandler.enable()
  if hasattr(signal, "SIGUSR1"):
    faulthandler.register(signal.SIGUSR1, all_threads=True)
