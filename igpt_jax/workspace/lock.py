"""Lock of a workdir, for one run at a time. Jobs that only read a workdir don't take it.

On a disk the kernel holds it, as long as the process lives. In a bucket it is an object, WORKDIR/.lock,
which is made only if there is none, and names its owner. A killed process leaves it there. Who may take
it over, at once:

  every process with the same IGPT_OWNER in its environment: launchers give it to all starts of one run
  without that, on one machine, any process once the one that left it is gone

Anybody else is refused, with the command that frees it. A run whose lock was taken over saves no
checkpoint any more, and moves none.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

from igpt_jax import buckets, files
from igpt_jax.errors import BucketError, UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.parallel.locking import locked

FILE = ".lock"
OWNER = "IGPT_OWNER"  # environment variable


_HELD, _LOST, _UNKNOWN = range(3)


class Lock:
  """The lock of a workdir that this run holds, by its main process."""

  def __init__(self, workdir: str):
    self._workdir = workdir

  def check(self) -> None:
    """Looks whether the lock is still this run's. Collective.

    Raises:
      UserError: another start has taken it over. (Not on a disk: the kernel lets nobody have it.)
      BucketError: the bucket doesn't say.
    """
    if not files.is_remote(self._workdir):
      return
    error = None
    try:
      state = self._state()
    except BucketError as caught:
      state, error = _UNKNOWN, caught
    state = hosts.from_main(state, "a look at the run's lock")
    if state == _UNKNOWN:
      why = "the first host can't read the run's lock"
      raise error or BucketError(f"workdir: {self._workdir}: {why}", errno.EIO)
    if state == _LOST:
      raise UserError(
        f"workdir: {self._workdir}: another start has taken this run's lock over, or it was removed; nothing "
        "more is saved here; fix: end the other one, and start again"
      )

  def _state(self) -> int:
    """Returns what the main process sees; others take its word."""
    return _HELD


class _BucketLock(Lock):
  """Lock of a workdir in a bucket, held by the main process.

  Args:
    workdir: the workdir's address.

  Raises:
    UserError: another run holds it.
  """

  def __init__(self, workdir: str):
    super().__init__(workdir)
    self._path = os.path.join(workdir, FILE)
    self._mine = {**_identity(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    self._contents = (json.dumps(self._mine | {"token": secrets.token_hex(8)}) + "\n").encode()
    while not buckets.create(self._path, self._contents):
      if (left := self._read()) is None:
        continue
      theirs, generation = left
      if not _may_take_over(theirs, self._mine):
        raise UserError(
          f"workdir: {workdir} is in use by another run ({_in_words(theirs)}); expected one at a time; fix: "
          f"wait until that has ended, or, if it was killed, free it: gcloud storage rm {self._path}"
        )
      say(f"workdir: {workdir}: taking over the lock of {_in_words(theirs)}")
      buckets.remove_generation(self._path, generation)  # unless another start was faster

  def _read(self) -> tuple[dict[str, Any], str] | None:
    """Returns who holds the lock, {} if it doesn't say, and the object's generation; None: it is gone."""
    try:
      generation = str(buckets.described(self._path)["generation"])
      theirs = json.loads(buckets.read(self._path))
    except FileNotFoundError:
      return None
    except ValueError:
      return {}, ""
    return (theirs if isinstance(theirs, dict) else {}), generation

  def _state(self) -> int:
    try:
      return _HELD if buckets.read(self._path) == self._contents else _LOST
    except FileNotFoundError:
      return _LOST

  def release(self) -> None:
    """Removes the object, if it is still this process'."""
    try:
      generation = str(buckets.described(self._path)["generation"])
      if buckets.read(self._path) == self._contents:
        buckets.remove_generation(self._path, generation)
    except FileNotFoundError:
      return
    except BucketError as error:
      say(f"workdir: the lock isn't removed ({error}); fix: gcloud storage rm {self._path}")


def _identity() -> dict[str, Any]:
  """Returns who this process is: its owner, and where a process of its number can be looked for."""
  place = ""
  with contextlib.suppress(OSError):
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
      place = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
  owner = os.environ.get(OWNER, "")
  return {"owner": owner, "host": socket.gethostname(), "process": os.getpid(), "place": place}


def _may_take_over(theirs: dict[str, Any], mine: dict[str, Any]) -> bool:
  """Returns True if a lock is left over by an earlier start of the run, or by a process that is gone."""
  if mine["owner"] or theirs.get("owner"):
    return theirs.get("owner") == mine["owner"]
  same = mine["place"] and all(theirs.get(name) == mine[name] for name in ("host", "place"))
  return bool(same) and not os.path.exists(f"/proc/{theirs.get('process')}")


def _in_words(theirs: dict[str, Any]) -> str:
  if not theirs:
    return "unknown"
  owner = f"owner {theirs['owner']}, " if theirs.get("owner") else ""
  return f"{owner}host {theirs.get('host')}, process {theirs.get('process')}, since {theirs.get('since')}"


@contextlib.contextmanager
def held(workdir: str) -> Iterator[Lock]:
  """Locks an existing workdir, on the main process.

  Raises:
    UserError: another run has locked it.
  """
  if not hosts.is_main():
    yield Lock(workdir)
  elif files.is_remote(workdir):
    lock = _BucketLock(workdir)
    try:
      yield lock
    finally:
      lock.release()
  else:
    path = os.path.join(workdir, FILE)
    with locked(path, f"workdir: {workdir}", "another --workdir"):
      yield Lock(workdir)
