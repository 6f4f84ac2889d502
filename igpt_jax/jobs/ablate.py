"""Ablation: trains runs that differ in some settings, smallest first, and compares them.

Writes ablate.csv, ablate.md and ablate.png (validation loss against FLOPs and time). Each run with each
seed is a workdir of job pretrain, WORKDIR/runs/NAME/SEED: one that has finished there is used as it is,
another goes on. Runs are compared on validation; test and probe are measured when all have been trained.
With `ablate.workdirs` finished workdirs are compared instead.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from igpt_jax import units, watchdog
from igpt_jax.ablation import comparison, entries, measuring, outcomes
from igpt_jax.ablation.entries import Entry
from igpt_jax.ablation.outcomes import Result
from igpt_jax.config.fields import Settings
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.runner.pretraining import pretrain
from igpt_jax.training.bad_numbers import BadNumbers
from igpt_jax.workspace import devices, lock
from igpt_jax.workspace import workdir as workdir_lib


def run(settings: Settings, workdir: str, mesh: Mesh | None = None) -> None:
  """Trains what isn't trained yet, until all is or until it is asked to stop, and compares."""
  workdir_lib.open_workdir(workdir)
  with lock.held(workdir):
    mesh, notes = mesh or devices.mesh_of(settings), []
    if settings.ablate.workdirs:
      planned, notes = entries.finished(settings)
    else:
      planned = entries.planned(settings, workdir, mesh)
      say(plan(planned))
      with watchdog.Watchdog(settings.hang_seconds, "hang_seconds"):
        stopped_by = train(planned, workdir, mesh)
      if stopped_by:
        say(f"stopped by {stopped_by}: saved; the same command goes on from here")
        return
    for note in notes:
      say(f"ablate: losses aren't comparable in {note}")
    results = [outcomes.result_of(entry) for entry in planned]
    _write(workdir, results, notes)
    for i, result in enumerate(results):
      if result.finished:
        results[i] = measuring.measure(settings, workdir, result, mesh)
        _write(workdir, results, notes)
    say(comparison.markdown(comparison.runs_of(results), notes).rstrip())
    say(f"done: {os.path.join(workdir, 'ablate.md')}")


def plan(planned: Sequence[Entry]) -> str:
  """Returns a table of the runs, in the order in which they are trained."""
  changed = comparison.overrides(comparison.runs_of([outcomes.result_of(each) for each in planned]))
  first = {entry.name: entry for entry in reversed(in_order(planned))}
  scale, unit = comparison.flop_unit(max(entry.flops for entry in planned))
  rows = [
    (
      name, changed[name] or "(baseline)", f"{entry.parameters:,}", f"{entry.steps:,}",
      f"{entry.flops / scale:.4g}",
    )
    for name, entry in reversed(first.items())
  ]  # fmt: skip
  seeds = dict.fromkeys(entry.seed for entry in planned)
  table = markdown_table(
    "llrrr", ("run", "overrides", "parameters", "steps", f"{unit} a seed"), rows
  )
  return f"{table}seeds {', '.join(map(str, seeds))}: {units.counted(len(planned), 'training')}"


def in_order(planned: Sequence[Entry]) -> list[Entry]:
  """Returns the runs with the fewest FLOPs first; of equal ones, all runs' first seeds come first."""
  seeds = list(dict.fromkeys(entry.seed for entry in planned))
  return sorted(planned, key=lambda entry: (entry.flops, seeds.index(entry.seed)))


def train(planned: Sequence[Entry], workdir: str, mesh: Mesh) -> str | None:
  """Trains the runs that haven't ended; returns the signal that stopped it, None: all have ended."""
  left = [entry for entry in in_order(planned) if not outcomes.result_of(entry).ended]
  hosts.wait_for_all("runs looked at")
  if done := len(planned) - len(left):
    say(f"ablate: {done} of {units.counted(len(planned), 'training')} ended before")
  while left:
    entry = left[0]
    say(f"ablate: {entry.name}, seed {entry.seed}: {entry.folder}")
    try:
      outcome = pretrain(entry.settings, entry.folder, mesh, listener=Forecast(left))
    except BadNumbers as bad:
      outcomes.mark_diverged(entry, bad)
      say(f"ablate: {entry.name}, seed {entry.seed} has diverged, the others go on: {bad}")
      asked_by = bad.stopped_by
    else:
      if outcome.stopped_by:
        return outcome.stopped_by
      asked_by = outcome.asked_by
    left.pop(0)
    _write(workdir, [outcomes.result_of(each) for each in planned])
    if asked_by and left:
      return asked_by
  return None


class Forecast:
  """Says, when the first steps of a run have been timed, how long all training that is left will take.

  Args:
    left: the runs that are left, the one that trains now first.
  """

  def __init__(self, left: Sequence[Entry]):
    self._left, self._began, self._told = list(left), time.monotonic(), False

  def __call__(self, step: int, values: Mapping[str, Any]) -> None:
    if self._told or not values.get("images_per_second"):
      return
    self._told = True
    now, *later = self._left
    seconds = now.settings.train.batch_size / values["images_per_second"]
    speed = now.flops_per_step / seconds
    flops = now.flops_per_step * (now.steps - step) + sum(entry.flops for entry in later)
    say(
      f"ablate: {units.counted(len(self._left), 'training')} left, "
      f"{progress.format_seconds(flops / speed)} at {units.significant(speed / 1e9)} GFLOP/s as now, "
      "without compiling and evaluations"
    )


def _write(workdir: str, results: Sequence[Result], notes: Sequence[str] = ()) -> None:
  if hosts.is_main():
    comparison.write(workdir, results, notes)
