"""Wall-clock time of a run by phase, over all its processes: WORKDIR/goodput.json.

Every second of a process belongs to one phase:

  start       until the loop: imports, data, palette, restoring
  compile     compiling the step
  data        the loop waits for batches
  step        the rest of the loop
  evaluation  `Work.evaluate`
  checkpoint  the loop waits for a checkpoint; writing it in the background isn't counted
  profile     beginning and ending a trace

Restarts cost two more:

  repeated    all seconds after the checkpoint that a process resumes from: lost by a kill
  down        from the last write by one process of an unfinished run to the start of the next,
              by the hosts' clocks; also while nobody wanted it to run

The file is written at most every few seconds, into a bucket by a thread, and with every checkpoint. The
time of a killed process since its last write counts as `down`.

Beside the phases, of the newest process: `programs`, what it compiled and what it read from the
compilation cache; and `leaving`, what a run that is told to stop needs at most: `step_seconds`, of one of
its steps on the average, and `save_seconds`, of its longest checkpoint, until that was on the disk. A
launcher's grace should be more than 2 × `step_seconds` + `save_seconds`; null: not known yet.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from igpt_jax import files, units, watchdog
from igpt_jax.parallel import compilation_cache, hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import summary
from igpt_jax.reporting.progress import format_seconds

FILE = "goodput.json"
PHASES: tuple[str, ...] = (
  "start",
  "compile",
  "data",
  "step",
  "evaluation",
  "checkpoint",
  "profile",
)
LOST: tuple[str, ...] = ("repeated", "down")
_SPENT = ("goodput", "seconds", "starts", "steps_again", "programs")  # of `Clock.spent`
_NAMES = {"data": "data wait", "step": "steps", "checkpoint": "checkpoints"}

_WRITE_SECONDS = 15.0  # between two writes of the file
_SNAPSHOTS = 20  # kept, of the times at the newest checkpoints: a run resumes from one of them


class Clock:
  """The clock of a run, which adds this process's time to that of earlier ones.

  Args:
    folder: the run's folder; only the main process writes there.
    first_step: the step that this process begins at.
    began: when the process began, by time.monotonic; None: now.
    keep_steps: steps whose times are kept as long as the run: it may resume from their checkpoints.
    programs: counts this run's programs.

  Attributes:
    save_seconds: returns the longest time that a checkpoint of this process has taken; None: none is
      complete.
  """

  save_seconds: Callable[[], float | None] = staticmethod(lambda: None)

  def __init__(
    self,
    folder: str,
    first_step: int,
    began: float | None = None,
    keep_steps: Collection[int] = (),
    programs: compilation_cache.Tally | None = None,
  ):
    self._keep_steps = keep_steps
    self._programs = programs or compilation_cache.Tally()
    self._path = os.path.join(folder, FILE)
    self._since = time.monotonic() if began is None else began
    self._first_step, self._phase = first_step, "start"
    self._batches: Any = None
    self._here = dict.fromkeys(PHASES, 0.0)
    self._starts, self._steps_again, self._ended = 1, 0, False
    self._before = dict.fromkeys((*PHASES, *LOST), 0.0)
    self._saved: dict[str, dict[str, float]] = {}
    self._leaving: dict[str, float | None] = {"step_seconds": None, "save_seconds": None}
    self._stored: dict[str, Any] = {}
    self._written = 0.0
    self._uploading = threading.Thread()  # of `note`; not started yet
    if not hosts.is_main():
      return
    try:
      with files.opened(self._path, "r") as file:
        self._go_on(json.load(file))
    except FileNotFoundError:
      pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
      say(f"{self._path}: can't be read ({error!r:.100}); times are counted from here on")
    self._write(first_step)

  def _go_on(self, stored: dict[str, Any]) -> None:
    """Continues the time of earlier processes, and counts what was lost since."""
    seconds = {name: float(stored["seconds"][name]) for name in (*PHASES, *LOST)}
    saved = {int(step): dict(spent) for step, spent in stored["saved"].items()}
    reached, written = int(stored["step"]), float(stored["written"])
    self._steps_again, self._ended = int(stored["steps_again"]), bool(stored["ended"])
    self._starts = int(stored["starts"]) + 1
    self._stored = {name: stored[name] for name in _SPENT if name in stored}
    self._leaving |= {name: stored.get("leaving", {}).get(name) for name in self._leaving}
    self._saved = {str(step): spent for step, spent in saved.items() if step <= self._first_step}
    if reached > self._first_step:
      kept = saved[max(map(int, self._saved))] if self._saved else {}
      for name in PHASES:
        seconds["repeated"] += seconds[name] - kept.get(name, 0.0)
        seconds[name] = kept.get(name, 0.0)
      self._steps_again += reached - self._first_step
    if not self._ended:
      process_began_at = time.time() - (time.monotonic() - self._since)
      seconds["down"] += max(process_began_at - written, 0.0)
    self._before = seconds

  def reads(self, batches: Any) -> None:
    """Sets the batches whose `wait_seconds` are the time of phase data."""
    self._batches = batches

  def enter(self, phase: str) -> None:
    """Ends the current phase and begins `phase`."""
    now = time.monotonic()
    self._here[self._phase] += now - self._since
    self._phase, self._since = phase, now
    watchdog.enter(phase)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the block as phase `name`; the phase before it goes on afterwards."""
    before = self._phase
    self.enter(name)
    try:
      yield
    finally:
      self.enter(before)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of every phase, all processes of the run together."""
    self.enter(self._phase)
    here = dict(self._here)
    waited = 0.0 if self._batches is None else min(self._batches.wait_seconds, here["step"])
    here["step"] -= waited
    here["data"] += waited
    return {name: self._before[name] + here.get(name, 0.0) for name in self._before}

  def note(self, step: int) -> None:
    """Writes the file for a run at `step`, if the last write was a while ago; doesn't wait for a bucket."""
    if not hosts.is_main() or time.monotonic() - self._written <= _WRITE_SECONDS:
      return
    if not files.is_remote(self._path):
      self._write(step)
    elif (
      not self._idle(step) and not self._uploading.is_alive()
    ):  # one at a time, so that no older one comes last
      state = self._state(step, self.spent())
      self._uploading = threading.Thread(target=self._put, args=(state,), daemon=True)
      self._uploading.start()

  def saved(self, step: int) -> None:
    """Notes the time at the checkpoint of `step`, whose writing has begun."""
    if hosts.is_main():
      self._saved[str(step)] = {name: self.seconds()[name] for name in PHASES}
      for old in sorted(self._saved, key=int)[:-_SNAPSHOTS]:
        if int(old) not in self._keep_steps:
          del self._saved[old]
      self._write(step)

  def end(self, step: int, ended: bool) -> dict[str, Any]:
    """Ends the clock of a run that has ended, or was stopped, at `step`, and reports its time.

    Returns:
      "goodput": the share of steps in all time; "seconds" by phase; "starts"; "steps_again"; "programs".
      If the run had ended before this process, they are those of then.
    """
    if self._idle(step):
      return self._stored
    self._ended = ended
    spent = self._write(step) if hosts.is_main() else self.spent()
    say(describe(spent))
    return spent

  def spent(self) -> dict[str, Any]:
    """Returns what `end` returns, so far."""
    seconds = self.seconds()
    return {
      "goodput": seconds["step"] / max(sum(seconds.values()), 1e-9),
      "seconds": {name: round(value, 3) for name, value in seconds.items()},
      "starts": self._starts,
      "steps_again": self._steps_again,
      "programs": self._programs.programs(),
    }

  def _leaves_in(self, step: int, seconds: dict[str, float]) -> dict[str, float | None]:
    """Returns "step_seconds" and "save_seconds" as this process knows them, or as an earlier one did."""
    known = dict(self._leaving)
    if step > self._first_step:
      here = sum(seconds[name] - self._before[name] for name in ("data", "step"))
      known["step_seconds"] = round(here / (step - self._first_step), 3)
    if (longest := self.save_seconds()) is not None:
      known["save_seconds"] = round(longest, 3)
    return known

  def _idle(self, step: int) -> bool:
    """True if the run had ended before this process, which has done nothing."""
    return self._ended and step == self._first_step

  def _write(self, step: int) -> dict[str, Any]:
    """Writes the file for a run at `step`; returns the `spent` in it."""
    spent = self.spent()
    if self._idle(step):
      return spent
    if self._uploading.ident is not None:
      self._uploading.join()
    self._put(self._state(step, spent))
    return spent

  def _state(self, step: int, spent: dict[str, Any]) -> dict[str, Any]:
    """Returns what the file of a run at `step` holds."""
    self._written = time.monotonic()
    return spent | {
      "leaving": self._leaves_in(step, spent["seconds"]),
      "step": step,
      "ended": self._ended,
      "written": time.time(),
      "saved": dict(self._saved),
    }

  def _put(self, state: dict[str, Any]) -> None:
    try:
      summary.write_json(self._path, state)
    except OSError as error:  # not worth a run
      say(f"{self._path}: can't be written ({error.strerror or error}); the run goes on")


def describe(spent: dict[str, Any]) -> str:
  """Returns a line about what `Clock.end` returned."""
  seconds = spent["seconds"]
  total = max(sum(seconds.values()), 1e-9)
  parts = [
    f"{_NAMES.get(name, name)} {seconds[name] / total:.1%}" for name in PHASES if seconds[name]
  ]
  text = f"goodput {spent['goodput']:.1%} of {format_seconds(total)}: {', '.join(parts)}"
  if restarts := spent["starts"] - 1:
    lost = sum(seconds[name] for name in LOST)
    text += (
      f", lost to {restarts} restart{'s' * (restarts > 1)} {lost / total:.1%} (steps done again: "
      f"{spent['steps_again']:,}, time between: {format_seconds(seconds['down'])})"
    )
  programs = spent.get("programs")  # older runs lack them
  if programs and programs["compiled"] + programs["read"]:
    text += (
      f"; {units.counted(programs['compiled'], 'program')} compiled in "
      f"{units.seconds(programs['compile_seconds'])}, {programs['read']} read in "
      f"{units.seconds(programs['read_seconds'])}"
    )
  return text
