"""Pretraining, as a command. Read this first, then runner/pretraining.py, then runner/loop.py.

Leaves checkpoints, metrics.jsonl and palette.npy in the workdir and, after the last step, loss.png,
training.json and summary.md. The same command goes on from the newest checkpoint.
"""

from jax.sharding import Mesh

from igpt_jax.config.fields import Settings
from igpt_jax.parallel.hosts import say
from igpt_jax.runner.pretraining import pretrain
from igpt_jax.workspace import sizing


def run(
  settings: Settings, workdir: str, mesh: Mesh | None = None, began: float | None = None
) -> None:
  """Trains until `train.steps`, or until it is asked to stop (SIGTERM, Ctrl-C)."""
  outcome = pretrain(sizing.size(settings, workdir, mesh), workdir, mesh, began)
  if outcome.stopped_by:
    say(
      f"stopped by {outcome.stopped_by} at step {outcome.step}: saved; the same command goes on "
      "from here"
    )
  else:
    say(f"done: {outcome.step} steps in {outcome.workdir}")
