"""Start and end of a run's several processes: how they find each other, and leave."""

import os
import re
import sys
import threading
from typing import Any, NoReturn

import jax

from igpt_jax import stopping, watchdog
from igpt_jax.errors import UserError

# At the end one process may have long work of its own (fitting probes) ...
_WAIT_FOR_OTHERS_SECONDS = 7 * 86_400
# ... but when one fails, all of them usually do, for the same reason and at the same time.
_WAIT_FOR_OTHERS_TO_FAIL_SECONDS = 10

_LOST = (
  "another host was probably lost (killed, stopped, or cut off for config.host_seconds: {}) or never came{}; "
  "the lines above say more; the same command on all hosts goes on from the newest checkpoint"
)
# Words of a backend's error when the other end of a connection is gone.
_OF_OTHERS = re.compile(r"gloo|nccl|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)


def lost(host_seconds: int, or_else: str = "") -> str:
  """Returns the message for when another process no longer answers."""
  return _LOST.format(host_seconds, or_else)


def is_of_others(error: Exception) -> bool:
  """Returns True if an error means that the other end of a connection is gone."""
  return bool(_OF_OTHERS.search(str(error)))


def join(host_seconds: int, trains: bool) -> None:
  """Connects this process with the others.

  TPU pods, GKE and SLURM are recognised; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID are read.

  Args:
    host_seconds: seconds of silence after which another process counts as lost.
    trains: True for a job that answers SIGTERM by saving.

  Raises:
    UserError: no cluster was recognised.
  """
  # The service agrees on a step to save at. It wants SIGTERM for that, and gets it while a loop trains.
  jax.config.update("jax_enable_preemption_service", trains)
  environment = os.environ
  settings: dict[str, Any] = {}
  if "JAX_COORDINATOR_ADDRESS" in environment and "JAX_PROCESS_ID" in environment:
    settings = {
      "num_processes": int(environment["JAX_NUM_PROCESSES"]),
      "process_id": int(environment["JAX_PROCESS_ID"]),
    }
  try:
    jax.distributed.initialize(
      **settings,
      heartbeat_timeout_seconds=host_seconds,
      shutdown_timeout_seconds=_WAIT_FOR_OTHERS_SECONDS,
    )
  except (ValueError, KeyError) as error:
    raise UserError(
      f"--distributed: no cluster was recognised ({error}); expected a TPU pod, GKE, SLURM, or "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; fix: set them, or leave "
      "--distributed out on one host"
    ) from None
  if trains:
    stopping.take_back()


def leave(status: int) -> NoReturn:
  """Ends one of several processes after an error, with its own exit status.

  The interpreter's normal exit would wait for the others, which may be waiting for this one. This
  waits just long enough for all of them to report their error; those still running after that notice
  by the missing heartbeat.
  """
  farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  farewell.start()
  farewell.join(_WAIT_FOR_OTHERS_TO_FAIL_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  watchdog.end_workers()
  os._exit(status)
