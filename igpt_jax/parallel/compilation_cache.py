"""Compiled programs on disk: a later start reads them instead of compiling them again.

jax's persistent compilation cache, whose keys are digests of program, options, flags, devices and
jaxlib's version. For a CPU they leave out which instructions it has, so each kind of CPU has a folder of
its own. What is read runs with this user's rights: nobody else should be able to write there.
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

from igpt_jax import files

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
_REQUESTS = "/jax/compilation_cache/compile_requests_use_cache"
_HITS = "/jax/compilation_cache/cache_hits"

_events: collections.Counter[str] = collections.Counter()


def _count(event: str, **unused: str | int) -> None:
  _events[event] += 1


jax.monitoring.register_event_listener(_count)


class Tally:
  """Count of the programs that were compiled, and of those that were read instead, since it was made."""

  def __init__(self):
    self._before = _events.copy()

  @property
  def all_read(self) -> bool:
    """True if there were programs, and none of them had to be compiled."""
    requests, hits = (_events[name] - self._before[name] for name in (_REQUESTS, _HITS))
    return 0 < requests == hits


def use(setting: str, workdir: str) -> None:
  """Lets jax keep compiled programs; without a usable folder it compiles them at every start.

  Args:
    setting: "user", the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another; "workdir";
      "off"; or a folder.
    workdir: the job's.
  """
  if setting == "user" and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  folder = None if setting == "off" else _usable(_root(setting, workdir))
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
  from jax.experimental.compilation_cache import compilation_cache

  compilation_cache.reset_cache()  # this process may have used another one
  if folder is not None:
    _tell_failures(folder)


def _root(setting: str, workdir: str) -> str:
  if setting == "workdir":
    return os.path.join(workdir, "compiled")
  return (
    files.user_cache("compiled")
    if setting == "user"
    else os.path.abspath(os.path.expanduser(setting))
  )


def _usable(root: str) -> str | None:
  """Returns the folder in `root` for this machine's programs; None if it can't be made."""
  folder = os.path.join(root, _machine())
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
  write again.
  """
  show = getattr(warnings.showwarning, "before", warnings.showwarning)
  told = set()

  def showwarning(message, category, filename, lineno, file=None, line=None) -> None:
    failed = _FAILED.match(str(message))
    if failed is None:
      show(message, category, filename, lineno, file, line)
      return
    for path in _programs(folder, failed[2]):
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
