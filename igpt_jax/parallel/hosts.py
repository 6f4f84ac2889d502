"""What the processes of one program agree on; a single process agrees with itself."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpt_jax.files import printable


def on_any(here: bool) -> bool:
  """Whether it is so on any process; all must ask together."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.int32(here)).any())


def from_main(number: int) -> int:
  """The main process' number, on every process; all must ask together."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait_for_all(what: str) -> None:
  """Returns when all processes have come here; `what` names the place."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"igpt_jax: {what}")


def is_main() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def say(message: str) -> None:
  if is_main():
    print(printable(message), flush=True)  # it may name a file
