"""Training of several runs one after another: those with the fewest FLOPs first, finished ones skipped."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from igpt_jax import units
from igpt_jax.ablation import outcomes
from igpt_jax.ablation.entries import Entry
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress
from igpt_jax.runner.pretraining import pretrain
from igpt_jax.training.bad_numbers import BadNumbers

Later = Callable[
  [Sequence[Entry]], float
]  # the runs after the present one -> seconds until all is trained


def in_order(planned: Sequence[Entry]) -> list[Entry]:
  """Returns the runs with the fewest FLOPs first; of equal ones, all runs' first seeds come first."""
  seeds = list(dict.fromkeys(entry.seed for entry in planned))
  return sorted(planned, key=lambda entry: (entry.flops, seeds.index(entry.seed)))


def train(
  planned: Sequence[Entry],
  mesh: Mesh | None,
  job: str,
  *,
  after_each: Callable[[], None],
  begin: Callable[[Entry], None] = lambda entry: None,
  later: Later | None = None,
  more: bool = False,
) -> str | None:
  """Trains the runs that haven't ended; returns the signal that stopped it, None: all have ended.

  Args:
    planned: the runs; those that have ended are left as they are.
    mesh: the mesh to train on; None: each run's own.
    job: the name that messages begin with.
    after_each: called when a run has ended, to write what is known by then.
    begin: called with each run before it trains.
    later: forecasts the time of what is trained after a run; None: by the run's own speed.
    more: True if other runs are trained after these.
  """
  left = [entry for entry in in_order(planned) if not outcomes.result_of(entry).ended]
  hosts.wait_for_all("runs looked at")
  if done := len(planned) - len(left):
    say(f"{job}: {done} of {units.counted(len(planned), 'training')} ended before")
  while left:
    entry = left[0]
    say(f"{job}: {entry.name}, seed {entry.seed}: {entry.folder}")
    begin(entry)
    listener = Forecast(left, job, later, more)
    try:
      outcome = pretrain(entry.settings, entry.folder, mesh, listener=listener)
    except BadNumbers as bad:
      outcomes.mark_diverged(entry, bad)
      say(f"{job}: {entry.name}, seed {entry.seed} has diverged, the others go on: {bad}")
      asked_by = bad.stopped_by
    else:
      if outcome.stopped_by:
        return outcome.stopped_by
      asked_by = outcome.asked_by
    left.pop(0)
    after_each()
    if asked_by and (left or more):
      return asked_by
  return None


class Forecast:
  """Says, when the first steps of a run have been timed, how long all training that is left will take.

  Args:
    left: the runs that are left, the one that trains now first.
    job: the name that the message begins with.
    later: forecasts the time of what is trained after the first; None: by its speed.
    more: True if other runs are trained after these.
  """

  def __init__(
    self, left: Sequence[Entry], job: str, later: Later | None = None, more: bool = False
  ):
    self._left, self._job = list(left), job
    self._later, self._more, self._told = later, more, False

  def __call__(self, step: int, values: Mapping[str, Any]) -> None:
    if self._told or not values.get("images_per_second"):
      return
    self._told = True
    now, *others = self._left
    step_seconds = now.settings.train.batch_size / values["images_per_second"]
    speed = now.flops_per_step / step_seconds
    if self._later is None:
      later = sum(entry.flops for entry in others) / speed
    else:
      later = self._later(others)
    seconds = step_seconds * (now.steps - step) + later
    say(
      f"{self._job}: {units.counted(len(self._left), 'training')} left"
      f"{' and those that follow' if self._more else ''}, {progress.format_seconds(seconds)}"
      f"{' at' if self._later is None else ', this one at'} {units.significant(speed / 1e9)} GFLOP/s"
      f"{' as now' if self._later is None else ''}, without compiling and evaluations"
    )
