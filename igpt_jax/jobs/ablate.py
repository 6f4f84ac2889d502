"""Ablation: trains runs that differ in some settings, smallest first, and compares them.

Writes ablate.csv, ablate.md and ablate.png (validation loss against FLOPs and time). Each run with each
seed is a workdir of job pretrain, WORKDIR/runs/NAME/SEED: one that has finished there is used as it is,
another goes on. Runs are compared on validation; test and probe are measured when all have been trained.
With `ablate.workdirs` finished workdirs are compared instead.
"""

import os
from collections.abc import Sequence

from jax.sharding import Mesh

from igpt_jax import units, watchdog
from igpt_jax.ablation import comparison, entries, measuring, outcomes, sequence, workdirs
from igpt_jax.ablation import results as results_lib
from igpt_jax.ablation.entries import Entry
from igpt_jax.ablation.outcomes import Result
from igpt_jax.config.fields import Settings
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.workspace import devices, lock
from igpt_jax.workspace import workdir as workdir_lib


def run(settings: Settings, workdir: str, mesh: Mesh | None = None) -> None:
  """Trains what isn't trained yet, until all is or until it is asked to stop, and compares."""
  workdir_lib.open_workdir(workdir)
  with lock.held(workdir):
    notes = []
    if mesh is None:
      devices.mesh_of(settings)  # refuses what doesn't suit the devices, before data are opened
    if settings.ablate.workdirs:
      planned, notes = workdirs.finished(settings)
    else:
      planned = entries.planned(settings, workdir, mesh)
      say(plan(planned))
      with watchdog.Watchdog(settings.hang_seconds, "hang_seconds"):
        stopped_by = sequence.train(
          planned, mesh, "ablate", after_each=lambda: _write(workdir, _results(planned))
        )
      if stopped_by:
        say(f"stopped by {stopped_by}: saved; the same command goes on from here")
        return
    for note in notes:
      say(f"ablate: losses aren't comparable in {note}")
    results = _results(planned)
    _write(workdir, results, notes)
    for i, result in enumerate(results):
      if result.finished:
        results[i] = measuring.measure(settings, workdir, result, mesh)
        _write(workdir, results, notes)
    say(comparison.markdown(comparison.runs_of(results), notes).rstrip())
    say(f"done: {os.path.join(workdir, 'ablate.md')}")


def plan(planned: Sequence[Entry]) -> str:
  """Returns a table of the runs, in the order in which they are trained."""
  changed = comparison.overrides(comparison.runs_of(_results(planned)))
  first = {entry.name: entry for entry in reversed(sequence.in_order(planned))}
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


def _results(planned: Sequence[Entry]) -> list[Result]:
  return [outcomes.result_of(entry) for entry in planned]


def _write(workdir: str, results: Sequence[Result], notes: Sequence[str] = ()) -> None:
  if hosts.is_main():
    results_lib.write(workdir, results, notes)
