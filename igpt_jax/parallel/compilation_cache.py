"""Compiled programs on disk: a later start reads them instead of compiling them again.

jax's persistent compilation cache, whose keys are digests of program, options, flags, devices and
jaxlib's version. For a CPU they leave out which instructions it has, so each kind of CPU has a folder of
its own. What is read runs with this user's rights: nobody else should be able to write there.

Of several processes only the first one writes, which is jax' doing: a place that all of them reach, such
as a bucket, serves all, a folder on each one's own disk the first alone. For programs over all devices
they ask by the same keys, but not on CPUs, where jax puts the process into the key and the others compile
at every start. Programs of another host's own devices alone, which are tiny, aren't kept.

On a disk what was read longest ago is removed beyond some size. A bucket tells nobody when an object was
read last: nothing is removed there, which is for the bucket's lifecycle rules (or goes with the workdir).
"""

import collections
import contextlib
import glob
import logging
import os
import platform
import re
import warnings
from collections.abc import Iterator

import jax
import numpy as np

from igpt_jax import buckets, files

_LOG = logging.getLogger(__name__)
_MOST_BYTES = 2 * 2**30  # of all programs together; those that were read longest ago go first
_LEAST_SECONDS = 0.1  # programs that compile faster aren't kept
# Fields of /proc/cpuinfo that tell what a program may be compiled to.
_OF_CPU = re.compile(
  r"(?:vendor_id|cpu family|model|model name|flags|Features|CPU implementer|CPU part)\s*:.*"
)
_FAILED = re.compile(
  r"Error (reading|writing) persistent compilation cache entry for '([\w.<>-]+)': (.*)", re.DOTALL
)
_THEIRS = "JAX_COMPILATION_CACHE_DIR"
_REQUESTS = "/jax/compilation_cache/compile_requests_use_cache"
_HITS = "/jax/compilation_cache/cache_hits"
_READING = "/jax/compilation_cache/cache_retrieval_time_sec"
_MAKING = "/jax/core/compile/backend_compile_duration"  # compiling, or reading instead

# How often an event has come in this process; of those that last, and under f"{name} s" their seconds.
_events: collections.Counter[str] = collections.Counter()


def _count(event: str, **unused: str | int) -> None:
  _events[event] += 1


def _add(event: str, duration_secs: float, **unused: str | int) -> None:
  if event in (_READING, _MAKING):
    _events[event] += 1
    _events[f"{event} s"] += duration_secs  # pyright: ignore[reportArgumentType]


jax.monitoring.register_event_listener(_count)
jax.monitoring.register_event_duration_secs_listener(_add)


class Tally:
  """Count of the programs that were compiled, and of those that were read instead, since it was made."""

  def __init__(self):
    self._before = _events.copy()

  def _since(self, name: str) -> float:
    return _events[name] - self._before[name]

  @property
  def all_read(self) -> bool:
    """True if there were programs, and none of them had to be compiled."""
    return 0 < self._since(_REQUESTS) == self._since(_HITS)

  def programs(self) -> dict[str, float]:
    """Returns how many programs were "read" and "compiled", and the seconds that took."""
    read, read_seconds = self._since(_READING), self._since(f"{_READING} s")
    made, seconds = self._since(_MAKING), self._since(f"{_MAKING} s")
    return {
      "read": read,
      "read_seconds": round(read_seconds, 3),
      "compiled": made - read,
      "compile_seconds": round(max(seconds - read_seconds, 0.0), 3),
    }


def of_hosts(from_cache: np.ndarray) -> str:
  """Returns a message where the first host has read a program that others had to compile; else "".

  Args:
    from_cache: [H], whether each host has read it. On CPUs it is as it must be.
  """
  lacking = np.flatnonzero(~np.asarray(from_cache, bool))
  if not len(lacking) or 0 in lacking or jax.default_backend() == "cpu":
    return ""
  return (
    f"config.compilation_cache: {len(lacking)} of {len(from_cache)} hosts, host {lacking[0]} first, had to "
    "compile what host 0 has read: jax keeps programs on host 0 alone; fix: "
    "--config.compilation_cache=workdir, or a folder that all hosts reach"
  )


def use(setting: str, workdir: str) -> None:
  """Lets jax keep compiled programs; without a usable folder it compiles them at every start.

  Args:
    setting: "user", the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another (on a disk,
      it is jax' own affair); "workdir"; "off"; or a folder, on a disk or in a bucket.
    workdir: the job's.

  Raises:
    BucketError: there is no such bucket, or no right to read it.
  """
  name, theirs = "config.compilation_cache", os.environ.get(_THEIRS, "")
  if setting == "user" and theirs:
    if not theirs.startswith(buckets.SCHEME):
      return
    name, setting = _THEIRS, theirs  # jax would read it without what `buckets` sets up
  folder = None if setting == "off" else _usable(name, _root(name, setting, workdir))
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
  from jax.experimental.compilation_cache import compilation_cache

  compilation_cache.reset_cache()  # this process may have used another one
  if folder is not None:
    _tell_failures(folder)
    if files.is_remote(folder):  # XLA's own, of GPUs, writes to disks alone
      jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _root(name: str, setting: str, workdir: str) -> str:
  if setting == "workdir":
    return os.path.join(workdir, "compiled")
  return files.user_cache("compiled") if setting == "user" else files.place(name, setting)


def _usable(name: str, root: str) -> str | None:
  """Returns the folder in `root` for this machine's programs; None if it can't be made."""
  folder = os.path.join(root, _machine())
  if files.is_remote(folder):
    files.check_reachable(name, folder)
    return folder
  try:
    os.makedirs(folder, mode=0o700, exist_ok=True)
  except OSError as error:
    _LOG.warning(
      "config.compilation_cache: %s: %s; programs are compiled at every start; fix: "
      "--config.compilation_cache=FOLDER, or off",
      files.printable(folder),
      error.strerror,
    )
    return None
  _prune(root)
  return folder


def _machine() -> str:
  """Returns a name for the kind of CPU, such as x86_64-0123456789abcdef."""
  fields = {platform.processor()}
  with (
    contextlib.suppress(OSError),
    open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file,
  ):
    fields |= {line.strip() for line in file if _OF_CPU.match(line)}
  return f"{platform.machine() or 'cpu'}-{files.digest(sorted(fields))}"


def _prune(root: str) -> None:
  """Removes the programs that were read longest ago, until all together are small enough."""
  programs = []
  for path in glob.glob(os.path.join(glob.escape(root), "*", "*-cache")):
    with contextlib.suppress(OSError):  # another process prunes too
      status = os.stat(path)
      programs.append((max(status.st_atime, status.st_mtime), status.st_size, path))
  total = 0
  for _, size, path in sorted(programs, reverse=True):
    total += size
    if total > _MOST_BYTES:
      _remove(path)


def _remove(path: str) -> None:
  with contextlib.suppress(OSError):
    os.remove(path)


def _tell_failures(folder: str) -> None:
  """Has jax's warnings about this folder told in a line; removes the program, which may be damaged.

  A disk that was full, or a process that was killed, may have left half of one, which jax would never
  write again. A bucket's objects are whole: what fails there is the way to them.
  """
  show = getattr(warnings.showwarning, "before", warnings.showwarning)
  told = set()

  def showwarning(message, category, filename, lineno, file=None, line=None) -> None:
    failed = _FAILED.match(str(message))
    if failed is None:
      show(message, category, filename, lineno, file, line)
      return
    for path in () if files.is_remote(folder) else _programs(folder, failed[2]):
      _remove(path)
    if failed[1] not in told:
      told.add(failed[1])
      _LOG.warning(
        "config.compilation_cache: %s: %s %s failed (%.200s): compiled without it",
        files.printable(folder), failed[1], failed[2], " ".join(failed[3].split()),
      )  # fmt: skip

  showwarning.before = show  # type: ignore[attr-defined]
  warnings.showwarning = showwarning


def _programs(folder: str, name: str) -> Iterator[str]:
  return glob.iglob(os.path.join(glob.escape(folder), f"{glob.escape(name)}-*-cache"))
