"""Start and end of a run's several processes: how they find each other, and leave."""

import os
import re
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from igpt_jax import cpu_compiler, stopping, watchdog
from igpt_jax.errors import UserError

# Hosts of one run start at different times. After this one gives up, and its launcher starts it again.
_JOIN_SECONDS = 300
_TOLD_SECONDS = 60  # between two words of a host that waits for the others
_GRACE_SECONDS = 30  # of jax' own limit, which aborts the process without a word, after ours
_PROBE_SECONDS = 5

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
  cpu_compiler.keep_collectives_in_order(devices=2)  # or more: one or more of each process
  joined = threading.Event()
  threading.Thread(target=_tell_of_joining, args=(joined,), name="joining", daemon=True).start()
  try:
    jax.distributed.initialize(
      **settings,
      initialization_timeout=_JOIN_SECONDS + _GRACE_SECONDS,
      heartbeat_timeout_seconds=host_seconds,
      shutdown_timeout_seconds=_WAIT_FOR_OTHERS_SECONDS,
    )
  except (ValueError, KeyError) as error:
    raise UserError(
      f"--distributed: no cluster was recognised ({error}); expected a TPU pod, GKE, SLURM, or "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; fix: set them, or leave "
      "--distributed out on one host"
    ) from None
  finally:
    joined.set()
  if trains:
    stopping.take_back()


def _tell_of_joining(joined: threading.Event) -> None:
  """Tells what a host that isn't joined yet waits for; ends it, to be started again, after a while."""
  began, since = time.monotonic(), time.strftime("%H:%M:%S")
  while not joined.wait(min(_TOLD_SECONDS, began + _JOIN_SECONDS - time.monotonic())):
    waited = time.monotonic() - began
    text = f"igpt_jax: {_who()} has waited {waited:.0f} s, since {since}, for {_what_is_missing()}"
    if joined.is_set():
      return
    if waited >= _JOIN_SECONDS:
      watchdog.end(
        1,
        f"{text}; it ends with status 1; fix: start the same command on all hosts, within "
        f"{_JOIN_SECONDS / 60:g} minutes, with the address that the first host has now",
      )
    print(f"{text}; it waits {_JOIN_SECONDS - waited:.0f} s more", file=sys.stderr, flush=True)


def _joining() -> Any:
  """Returns what jax knows of this process and the coordinator, or nothing yet."""
  return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)


def _who() -> str:
  number = os.environ.get("JAX_PROCESS_ID") or getattr(_joining(), "process_id", "")
  return f"host {number}"


def _what_is_missing() -> str:
  """Returns what a host that isn't joined waits for, in words."""
  address = getattr(_joining(), "coordinator_address", None) or os.environ.get(
    "JAX_COORDINATOR_ADDRESS"
  )
  if not address:
    return "the address of the first host, which the cluster hasn't told yet"
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), _PROBE_SECONDS).close()
  except (OSError, ValueError) as error:
    why = getattr(error, "strerror", None) or error
    return (
      f"the first host at {address}, where nothing answers ({why}): it hasn't started yet, or has another "
      "address since it was started again"
    )
  return f"the other hosts: the first one, at {address}, answers, but not all have come"


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
