"""How the processes of a run find each other, and how one of them ends."""

import os
import re
import sys
import threading
from typing import Any, NoReturn

import jax

from igpt_jax import watchdog
from igpt_jax.errors import UserError

# Of several processes one may have long work of its own at the end (fitting probes) ...
_WAIT_FOR_OTHERS_SECONDS = 7 * 86_400
# ... but when one fails, all of them usually do, for the same reason and at the same time.
_WAIT_FOR_OTHERS_TO_FAIL_SECONDS = 10

_LOST = (
  "another host was probably lost (killed, stopped, or cut off for config.host_seconds: {}) or never came{}; "
  "the lines above say more; the same command on all hosts goes on from the newest checkpoint"
)
# How a backend's error reads when the other end of a connection is gone.
_OF_OTHERS = re.compile(r"gloo|nccl|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)


def lost(host_seconds: int, or_else: str = "") -> str:
  """What to tell when another process doesn't answer any more."""
  return _LOST.format(host_seconds, or_else)


def is_of_others(error: Exception) -> bool:
  """Whether an error says that the other end of a connection is gone."""
  return bool(_OF_OTHERS.search(str(error)))


def join(host_seconds: int, trains: bool) -> None:
  """Finds the other processes: TPU pods, GKE and SLURM are recognised, else JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES and JAX_PROCESS_ID say where they are.

  Args:
    host_seconds: of silence, after which another one counts as lost.
    trains: whether this is a job that answers SIGTERM by saving.

  Raises:
    UserError: they can't be found.
  """
  # It takes SIGTERM over. Training answers that by saving; other jobs are to end by it.
  jax.config.update("jax_enable_preemption_service", trains)
  environment = os.environ
  known: dict[str, Any] = {}
  if "JAX_COORDINATOR_ADDRESS" in environment and "JAX_PROCESS_ID" in environment:
    known = {
      "num_processes": int(environment["JAX_NUM_PROCESSES"]),
      "process_id": int(environment["JAX_PROCESS_ID"]),
    }
  try:
    jax.distributed.initialize(
      **known,
      heartbeat_timeout_seconds=host_seconds,
      shutdown_timeout_seconds=_WAIT_FOR_OTHERS_SECONDS,
    )
  except (ValueError, KeyError) as error:
    raise UserError(
      f"--distributed: no cluster was recognised ({error}); expected a TPU pod, GKE, SLURM, or "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; fix: set them, or leave "
      "--distributed out on one host"
    ) from None


def leave(status: int) -> NoReturn:
  """Ends one of several processes after an error, with a status of its own.

  The interpreter's end would wait for the others, and they may be waiting for this one. So it waits
  just so long that all can say why they end; who is still at work then loses this one's heartbeat.
  """
  farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  farewell.start()
  farewell.join(_WAIT_FOR_OTHERS_TO_FAIL_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  watchdog.end_workers()
  os._exit(status)
