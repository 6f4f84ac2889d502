"""Agreement between the processes of one program, and the one among them that prints."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpt_jax.files import printable


def on_any(here: bool) -> bool:
  """Returns True if `here` is True on any process. Collective: every process must call it."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.int32(here)).any())


def from_main(number: int) -> int:
  """Returns the main process' number on every process. Collective: every process must call it."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait_for_all(what: str) -> None:
  """Returns once all processes have called it; `what` names the barrier."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"igpt_jax: {what}")


def is_main() -> bool:
  """Returns True in the process that prints and writes."""
  return jax.process_index() == 0


def say(message: str) -> None:
  """Prints a message, in the main process alone."""
  if is_main():
    print(printable(message), flush=True)  # a file's name may have unprintable characters
