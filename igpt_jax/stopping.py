"""Answers to SIGTERM and Ctrl-C (SIGINT). Ground floor: imports nothing but the watchdog.

A thread gives them, because Python's own handlers wait while the main thread is in native code, such as
a compiler. A process leaves at once, with 128 + the signal's number, unless somebody has something to
save and takes the signals over (`answer_by`).
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from igpt_jax import watchdog

CTRL_C, SIGTERM = "Ctrl-C", "SIGTERM"
_NAMES = {signal.SIGINT: CTRL_C, signal.SIGTERM: SIGTERM}

# The name of a signal -> last words of a process that leaves at once; "": it goes on.
Answer = Callable[[str], str]


def _leave(name: str) -> str:
  return f"stopped by {name}: there is nothing to save; the same command starts again"


class Interrupted(BaseException):
  """A signal has come during `interruptible`; its name is the argument.

  No Exception, so that a library that it passes through doesn't take it for an error of its own.
  """


_answer: Answer = _leave
_listens = False
_heard: str | None = None  # the newest signal
_interrupts = False  # True during `interruptible`
_left_a_wait = False  # True once that was ended
_handler_of_another: int | None = None  # address of the handler that `take_back` replaced


def answer_by(answer: Answer | None) -> None:
  """Answers the signals by this function, which a thread calls; None: by leaving at once."""
  global _answer, _heard
  _answer, _heard = answer or _leave, None


def listen() -> None:
  """Answers the signals from now on. Called by the main thread of a program; again, it does nothing.

  A signal that is ignored, as by a shell's `&` or nohup, stays ignored.
  """
  global _listens
  if _listens:
    return
  _listens = True
  reading, writing = os.pipe()
  if hasattr(os, "set_blocking"):  # Windows: from Python 3.12 on
    os.set_blocking(writing, False)
  threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  for number in _NAMES:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _wake)
  if hasattr(os, "register_at_fork"):  # Windows doesn't fork
    os.register_at_fork(after_in_child=_leave_to_parent)


def _wake(number, frame) -> None:
  """Ends a wait of the main thread, if it may be ended; the answer is the thread's to give."""
  global _heard, _interrupts, _left_a_wait
  _heard = _NAMES[number]
  if _interrupts:
    _interrupts, _left_a_wait = False, True
    raise Interrupted(_heard)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Lets a signal end the block, in which the main thread waits for what may never come.

  Raises:
    Interrupted: a signal comes, or has come since `answer_by`.
  """
  global _interrupts
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  _interrupts = True
  try:
    if _heard is not None:
      raise Interrupted(_heard)
    yield
  finally:
    _interrupts = False


def end_if_a_wait_was_left(status: int) -> None:
  """Ends the process if a signal has ended a wait: its threads may wait on, and the interpreter for them."""
  if _left_a_wait:
    sys.stdout.flush()
    sys.stderr.flush()
    watchdog.end_workers()
    os._exit(status)


def _watch(reading: int) -> None:
  while True:
    for number in os.read(reading, 64):
      if number in _NAMES and (words := _answer(_NAMES[signal.Signals(number)])):
        watchdog.end(128 + number, f"igpt_jax: {words}")


def _leave_to_parent() -> None:
  """Makes a forked worker deaf to Ctrl-C, which its parent gets too and answers for both."""
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)


def take_back() -> None:
  """Answers SIGTERM again, after a library has set its own handler in native code."""
  global _handler_of_another
  # Windows has neither the library of the C functions under that name, nor jobs of several processes.
  if os.name == "posix" and signal.getsignal(signal.SIGTERM) is _wake:
    _handler_of_another = _set_native(signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _wake)


def hand_over() -> None:
  """Leaves SIGTERM to the handler that `take_back` replaced, if it did."""
  if _handler_of_another is not None:
    _set_native(_handler_of_another)


def _set_native(handler: int) -> int | None:
  """Sets the handler of SIGTERM in native code, by its address; returns the one before."""
  set_handler = ctypes.CDLL(None).signal
  set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  return set_handler(signal.SIGTERM, int(handler))
