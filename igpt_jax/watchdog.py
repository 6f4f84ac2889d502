"""Watchdog that ends a process which makes no progress. Ground floor: imports nothing of the project.

Working code reports progress by `enter` and `beat`, which cost less than a microsecond. A `Watchdog`
checks from a thread. It can't see a hang in native code that holds the GIL.
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
from typing import NoReturn

STATUS = 124  # exit status of a hung process, as of `timeout`
# Work that is done for the first time is compiled first, which shows no progress.
FIRST_SECONDS = 3_600.0
_LAST_WORDS_SECONDS = 30  # limit for printing the reason: stderr may hang, too

_beats = 0
_phase = "start"
_doing = ""
_begun: set[tuple[str, str]] = set()
_tellers: list[subprocess.Popen] = []  # processes of `last_words`


def enter(phase: str) -> None:
  """Reports progress, and that `phase` begins or goes on."""
  global _phase
  beat()
  _phase = phase


def beat(doing: str = "") -> None:
  """Reports progress within the phase, and that `doing` begins."""
  global _beats, _doing
  _begun.add((_phase, _doing))
  _doing = doing
  _beats += 1


class Watchdog:
  """Ends the process with `STATUS` if neither `enter` nor `beat` is called for some time.

  Before that it prints the phase and the stacks of all threads to stderr, and ends worker processes.
  Work done for the first time gets `FIRST_SECONDS` at least. Time while the process is stopped
  (SIGSTOP) doesn't count.

  Args:
    seconds: the limit without progress; 0: nothing is watched.
    field: the setting of the limit, for the message.
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
      # The clock goes on during a SIGSTOP, the process doesn't.
      if self.hangs(min(now - looked, 2 * pause)):
        self._end(self._idle)
      looked = now

  def hangs(self, seconds: float) -> bool:
    """True if there was no progress for too long; called `seconds` after the last call."""
    if _beats != self._seen:
      self._seen, self._idle = _beats, 0.0
      return False
    self._idle += seconds
    first = (_phase, _doing) not in _begun
    return self._idle > (max(self._seconds, FIRST_SECONDS) if first else self._seconds)

  def _end(self, idle: float) -> None:
    where = f"{_phase}, {_doing}" if _doing else _phase
    end(
      STATUS,
      f"igpt_jax: hung: in phase {where}: no progress for {idle:.0f} s (config.{self._field}: "
      f"{self._seconds:g}); ending with status {STATUS}; the same command goes on from the newest "
      "checkpoint; where every thread is:",
      stacks=True,
    )


def end(status: int, message: str, stacks: bool = False) -> NoReturn:
  """Ends this process and its workers at once, whatever other threads do.

  Args:
    status: the exit status.
    message: printed to stderr before.
    stacks: True to print the stacks of all threads, too.
  """
  late = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (status,))
  late.daemon = True
  late.start()
  try:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if stacks:
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    _hush()
  finally:
    end_workers()  # only now: threads that wait for them would raise errors of their own
    os._exit(status)


def end_workers() -> None:
  """Kills this process's data loading workers."""
  for worker in multiprocessing.active_children():
    worker.kill()


@functools.cache
def end_with_parent() -> None:
  """Ends this worker process when its parent ends, however that happens; Ctrl-C is the parent's to answer."""
  parent = multiprocessing.parent_process()
  if parent is None:
    return
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)

  def wait() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, name="end with parent", daemon=True).start()


@contextlib.contextmanager
def last_words(text: str) -> Iterator[None]:
  """Prints `text` to stderr if this process ends within the block.

  A shell process does it, since jax may end this one from native code, or the system may kill it.
  """
  script = 'read -r word || printf "%s\\n" "$1" >&2'
  with subprocess.Popen(["sh", "-c", script, "sh", text], stdin=subprocess.PIPE) as teller:
    _tellers.append(teller)
    try:
      yield
    finally:
      _hush()


def _hush() -> None:
  """Cancels `last_words`."""
  while _tellers:
    with contextlib.suppress(BrokenPipeError):
      _tellers.pop().communicate(b"enough\n")


def tell_stacks() -> None:
  """Prints all threads' Python stacks to stderr at a crash, and at SIGUSR1, which doesn't end the process."""
  faulthandler.enable()
  if hasattr(signal, "SIGUSR1"):
    faulthandler.register(signal.SIGUSR1, all_threads=True)
