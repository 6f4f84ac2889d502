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

Flops = Callable[[Entry], float]  # what is left of a run's FLOPs when it begins


def _all_flops(entry: Entry) -> float:
  return entry.flops


def in_order(planned: Sequence[Entry]) -> list[Entry]:
  """Returns the runs with the fewest FLOPs first; of equal ones, all runs' first seeds come first."""
  seeds = list(dict.fromkeys(entry.seed for entry in planned))
  return sorted(planned, key=lambda entry: (entry.flops, seeds.index(entry.seed)))


def train(
  planned: Sequence[Entry],
  mesh: Mesh,
  job: str,
  *,
  after_each: Callable[[], None],
  begin: Callable[[Entry], None] = lambda entry: None,
  flops: Flops = _all_flops,
  later_flops: float = 0.0,
) -> str | None:
  """Trains the runs that haven't ended; returns the signal that stopped it, None: all have ended.

  Args:
    planned: the runs; those that have ended are left as they are.
    mesh: the mesh to train on.
    job: the name that messages begin with.
    after_each: called when a run has ended, to write what is known by then.
    begin: called with each run before it trains.
    flops: those that a run takes from where it begins, for the forecast of time.
    later_flops: FLOPs of what is to be trained after these runs, for the same.
  """
  left = [entry for entry in in_order(planned) if not outcomes.result_of(entry).ended]
  hosts.wait_for_all("runs looked at")
  if done := len(planned) - len(left):
    say(f"{job}: {done} of {units.counted(len(planned), 'training')} ended before")
  while left:
    entry = left[0]
    say(f"{job}: {entry.name}, seed {entry.seed}: {entry.folder}")
    begin(entry)
    listener = Forecast(left, job, flops, later_flops)
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
    if asked_by and (left or later_flops):
      return asked_by
  return None


class Forecast:
  """Says, when the first steps of a run have been timed, how long all training that is left will take.

  Args:
    left: the runs that are left, the one that trains now first.
    job: the name that the message begins with.
    flops: those that a run takes from where it begins.
    later_flops: FLOPs of what is to be trained after these runs.
  """

  def __init__(
    self, left: Sequence[Entry], job: str, flops: Flops = _all_flops, later_flops: float = 0.0
  ):
    self._left, self._job, self._later = list(left), job, later_flops
    self._flops, self._told = flops, False

  def __call__(self, step: int, values: Mapping[str, Any]) -> None:
    if self._told or not values.get("images_per_second"):
      return
    self._told = True
    now, *next_ones = self._left
    seconds = now.settings.train.batch_size / values["images_per_second"]
    speed = now.flops_per_step / seconds
    flops = now.flops_per_step * (now.steps - step) + sum(map(self._flops, next_ones)) + self._later
    more = " and those that the results will ask for" if self._later else ""
    say(
      f"{self._job}: {units.counted(len(self._left), 'training')} left{more}, "
      f"{progress.format_seconds(flops / speed)} at {units.significant(speed / 1e9)} GFLOP/s as now, "
      "without compiling and evaluations"
    )
