"""Where a run's wall-clock time goes: WORKDIR/goodput.json, over all the processes that a run has had.

Every second of a process belongs to one phase:

  start       until the loop: imports, data, palette, restoring
  compile     of the step
  data        the loop waits for batches
  step        the rest of the loop
  evaluation  everything that `Work.evaluate` does
  checkpoint  the loop waits for a checkpoint; what is written beside the steps costs nothing here
  profile     beginning and ending a trace

and two more are what restarts cost:

  repeated    all seconds since the checkpoint that a process goes on from: thrown away by a kill
  down        from the last word of one process of an unfinished run to the start of the next,
              by the computers' clocks; also while nobody wanted it to run

The file is replaced at most every few seconds, and with every checkpoint. What a killed process had
spent since is counted as `down`.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from igpt_jax import watchdog
from igpt_jax.parallel import hosts
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
_NAMES = {"data": "data wait", "step": "steps", "checkpoint": "checkpoints"}

_WRITE_SECONDS = 15.0  # between two writes of the file
_SNAPSHOTS = 20  # that are kept: a run goes on from one of its newest checkpoints


class Clock:
  """The time of one run, of which this process is the newest part.

  Args:
    folder: of the run; only the main process writes there.
    first_step: that this process goes on from.
    began: when it began, by time.monotonic; None: now.
  """

  def __init__(self, folder: str, first_step: int, began: float | None = None):
    self._path = os.path.join(folder, FILE)
    self._since = time.monotonic() if began is None else began
    self._first_step, self._phase = first_step, "start"
    self._batches: Any = None
    self._here = dict.fromkeys(PHASES, 0.0)
    self._starts, self._steps_again, self._ended = 1, 0, False
    self._before = dict.fromkeys((*PHASES, *LOST), 0.0)
    self._saved: dict[str, dict[str, float]] = {}
    self._stored: dict[str, Any] = {}
    self._written = 0.0
    if not hosts.is_main():
      return
    try:
      with open(self._path, encoding="utf-8") as file:
        self._go_on(json.load(file))
    except FileNotFoundError:
      pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
      say(f"{self._path}: can't be read ({error!r:.100}); times are counted from here on")
    self._write(first_step)

  def _go_on(self, found: dict[str, Any]) -> None:
    """Takes over what earlier processes have spent, and counts what was lost since."""
    seconds = {name: float(found["seconds"][name]) for name in (*PHASES, *LOST)}
    saved = {int(step): dict(each) for step, each in found["saved"].items()}
    reached, written = int(found["step"]), float(found["written"])
    self._steps_again, self._ended = int(found["steps_again"]), bool(found["ended"])
    self._starts = int(found["starts"]) + 1
    self._stored = {name: found[name] for name in ("goodput", "seconds", "starts", "steps_again")}
    self._saved = {str(step): each for step, each in saved.items() if step <= self._first_step}
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
    """Data wait is this object's `wait_seconds`."""
    self._batches = batches

  def enter(self, phase: str) -> None:
    """What comes now belongs to this phase."""
    now = time.monotonic()
    self._here[self._phase] += now - self._since
    self._phase, self._since = phase, now
    watchdog.enter(phase)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """The block belongs to phase `name`, what follows to the one before it."""
    before = self._phase
    self.enter(name)
    try:
      yield
    finally:
      self.enter(before)

  def seconds(self) -> dict[str, float]:
    """Seconds spent in every phase, all processes of the run together."""
    self.enter(self._phase)
    here = dict(self._here)
    waited = 0.0 if self._batches is None else min(self._batches.wait_seconds, here["step"])
    here["step"] -= waited
    here["data"] += waited
    return {name: self._before[name] + here.get(name, 0.0) for name in self._before}

  def note(self, step: int) -> None:
    """The run has got to `step`: written down, if it hasn't been for a while."""
    if hosts.is_main() and time.monotonic() - self._written > _WRITE_SECONDS:
      self._write(step)

  def saved(self, step: int) -> None:
    """The checkpoint of `step` was begun: what is spent so far counts, once that is whole."""
    if hosts.is_main():
      self._saved[str(step)] = {name: self.seconds()[name] for name in PHASES}
      for old in sorted(self._saved, key=int)[:-_SNAPSHOTS]:
        del self._saved[old]
      self._write(step)

  def end(self, step: int, ended: bool) -> dict[str, Any]:
    """The run has ended at `step`, or was stopped there: tells where its time has gone.

    Returns:
      "goodput": the share of all time that steps took, "seconds" by phase, "starts", "steps_again"; of
      a run that had ended before, what it was then.
    """
    if self._idle(step):
      return self._stored
    self._ended = ended
    spent = self._write(step) if hosts.is_main() else self.told()
    say(describe(spent))
    return spent

  def told(self) -> dict[str, Any]:
    """What `end` returns, so far."""
    seconds = self.seconds()
    return {
      "goodput": seconds["step"] / max(sum(seconds.values()), 1e-9),
      "seconds": {name: round(each, 3) for name, each in seconds.items()},
      "starts": self._starts,
      "steps_again": self._steps_again,
    }

  def _idle(self, step: int) -> bool:
    """The run had ended before this process, which has done nothing."""
    return self._ended and step == self._first_step

  def _write(self, step: int) -> dict[str, Any]:
    """Writes the file for a run that has got to `step`; gives what is `told` in it."""
    told = self.told()
    if self._idle(step):
      return told
    values = {
      **told,
      "step": step,
      "ended": self._ended,
      "written": time.time(),
      "saved": self._saved,
    }
    self._written = time.monotonic()
    try:
      summary.write_json(self._path, values)
    except OSError as error:  # not worth a run
      say(f"{self._path}: can't be written ({error.strerror or error}); the run goes on")
    return told


def describe(spent: dict[str, Any]) -> str:
  """One line of what `Clock.end` returns."""
  seconds = spent["seconds"]
  total = max(sum(seconds.values()), 1e-9)
  parts = [
    f"{_NAMES.get(name, name)} {seconds[name] / total:.1%}" for name in PHASES if seconds[name]
  ]
  text = f"goodput {spent['goodput']:.1%} of {format_seconds(total)}: {', '.join(parts)}"
  restarts = spent["starts"] - 1
  if restarts:
    lost = sum(seconds[name] for name in LOST)
    text += (
      f", lost to {restarts} restart{'s' * (restarts > 1)} {lost / total:.1%} (steps done again: "
      f"{spent['steps_again']:,}, time between: {format_seconds(seconds['down'])})"
    )
  return text
