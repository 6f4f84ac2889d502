"""IsoFLOP study: trains models of several sizes at several budgets of compute, and tells how to spend a larger one.

Fits L(N, D) = E + A/N^α + B/D^β to the runs' losses on validation (igpt_jax/isoflop/surface.py), and writes
runs.csv, isoflop.json, isoflop.md and four pictures. A run that is held out is forecast, and then trained. With
`isoflop.budget` it also writes the config of the best run with so many FLOPs. Each run is a workdir of job
pretrain, WORKDIR/isoflop/SHAPE/SEED/BUDGET: one that has finished there is used as it is, another goes on.
"""

import os

from jax.sharding import Mesh

from igpt_jax import units, watchdog
from igpt_jax.config.fields import Settings
from igpt_jax.isoflop import report
from igpt_jax.isoflop.study import FOLDER, Study
from igpt_jax.parallel.hosts import say
from igpt_jax.workspace import devices, lock
from igpt_jax.workspace import workdir as workdir_lib


def run(settings: Settings, workdir: str, mesh: Mesh | None = None) -> None:
  """Trains what isn't trained yet, until all is or until it is asked to stop, and fits the surface."""
  workdir_lib.open_workdir(workdir)
  with lock.held(workdir):
    if mesh is None:
      devices.mesh_of(settings)  # refuses what doesn't suit the devices, before data are opened
    study = Study(settings, workdir, mesh)
    say(study.plan())
    with watchdog.Watchdog(settings.hang_seconds, "hang_seconds"):
      stopped_by = study.train()
    if stopped_by:
      say(f"stopped by {stopped_by}: saved; the same command goes on from here")
      return
    if others := study.others():
      say(
        f"isoflop: {units.counted(len(others), 'run')} of {os.path.join(workdir, FOLDER)} are no part of this plan and "
        f"aren't fitted: {', '.join(os.path.relpath(each, workdir) for each in others)}"
      )
    found = study.report()
    say(report.markdown(found).rstrip())
    say(f"done: {os.path.join(workdir, report.PAGE)}")
    if settings.isoflop.budget:
      study.write_config(settings.isoflop.budget, found)
