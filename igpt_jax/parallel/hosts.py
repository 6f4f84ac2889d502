"""Agreement between the processes of one program, and the one among them that prints.

Every wait for other processes goes through here: one of more than a minute is told, in the log of each
process that waits, with the processes that haven't come.
"""

import contextlib
import itertools
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpt_jax.files import printable

_LOG = logging.getLogger(__name__)
_TOLD_SECONDS = 60.0  # of a wait, after which it is told, and again after twice as many
_NOTED_SECONDS = 2.0  # of a wait, after which the others can know of it
_NAMED = 8  # processes in a message
_NOTES = "igpt_jax/waits"  # folder of the coordinator's store: process -> number of its wait

_numbers = itertools.count(1)  # of waits; all processes have the same ones, in the same order


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
  """Tells of the block, in which all processes wait for each other, if it takes minutes.

  Args:
    what: what they wait for, as in "host 1 has waited 60 s for WHAT".
  """
  if jax.process_count() == 1:
    yield
    return
  ended, number = threading.Event(), next(_numbers)
  threading.Thread(target=_tell, args=(what, number, ended), name="waiting", daemon=True).start()
  try:
    yield
  finally:
    ended.set()


def _tell(what: str, number: int, ended: threading.Event) -> None:
  began, since = time.monotonic(), time.strftime("%H:%M:%S")
  if ended.wait(_NOTED_SECONDS):
    return
  _note(number)
  for doublings in itertools.count():  # one may wait for hours, as for a run's next checkpoint
    if ended.wait(began + _TOLD_SECONDS * 2**doublings - time.monotonic()):
      return
    _LOG.warning(
      "hosts: host %d has waited %.0f s, since %s, for %s%s",
      jax.process_index(), time.monotonic() - began, since, what, _missing(number),
    )  # fmt: skip


def _store() -> Any:
  """Returns jax' client of the coordinator's store; None where this jax has none that we know."""
  distributed = sys.modules.get("jax._src.distributed")
  return getattr(getattr(distributed, "global_state", None), "client", None)


def _note(number: int) -> None:
  """Lets the other processes know that this one waits."""
  with contextlib.suppress(
    RuntimeError, AttributeError
  ):  # the coordinator is gone: that is told later
    _store().key_value_set(f"{_NOTES}/{jax.process_index()}", str(number), allow_overwrite=True)


def _missing(number: int) -> str:
  """Returns which processes haven't come to this wait, in words; "" if the coordinator can't tell."""
  try:
    notes = dict(_store().key_value_dir_get(_NOTES))
  except (RuntimeError, AttributeError):
    return "; the coordinator, on host 0, doesn't answer"
  come = {int(key.rpartition("/")[2]) for key, value in notes.items() if int(value) >= number}
  missing = [str(i) for i in range(jax.process_count()) if i not in come]
  if not missing:
    return "; all are there: what it computes or sends takes long"
  more = f" and {len(missing) - _NAMED} more" * (len(missing) > _NAMED)
  return f"; not there: host{'s' * (len(missing) > 1)} {', '.join(missing[:_NAMED])}{more}"


def gathered(here: Any, what: str) -> np.ndarray:
  """Returns every process' array, [H, …]. Collective: every process must call it; `what` names it."""
  if jax.process_count() == 1:
    return np.asarray(here)[None]
  with waiting(what):
    return np.asarray(multihost_utils.process_allgather(here))


def on_any(here: bool, what: str = "an agreement") -> bool:
  """Returns True if `here` is True on any process. Collective: every process must call it."""
  return bool(gathered(np.int32(here), what).any())


def from_main(number: int, what: str = "the first host's word") -> int:
  """Returns the main process' number on every process. Collective: every process must call it."""
  return int(array_from_main(np.int32(number), what))


def array_from_main(array: Any, what: str) -> Any:
  """Returns the main process' array on every process. Collective: every process must call it."""
  if jax.process_count() == 1:
    return array
  with waiting(what):
    return multihost_utils.broadcast_one_to_all(array)


def wait_for_all(what: str) -> None:
  """Returns once all processes have called it; `what` names the barrier."""
  if jax.process_count() > 1:
    with waiting(f"the barrier {what!r}"):
      multihost_utils.sync_global_devices(f"igpt_jax: {what}")


def is_main() -> bool:
  """Returns True in the process that prints and writes."""
  return jax.process_index() == 0


def say(message: str) -> None:
  """Prints a message, in the main process alone."""
  if is_main():
    print(printable(message), flush=True)  # a file's name may have unprintable characters
