"""What a study's finished runs come to: the surface, the frontier, the slices, and the seeds' noise."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from igpt_jax.ablation import outcomes
from igpt_jax.ablation.entries import Entry
from igpt_jax.ablation.outcomes import Result
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.isoflop import surface
from igpt_jax.isoflop.frontier import MINIMA, Estimate, Frontier, Optimum, Parabola
from igpt_jax.isoflop.grid import Cell, Point, compact
from igpt_jax.isoflop.ladder import Costs
from igpt_jax.workspace import branches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A budget spent on a shape with one seed.

  Attributes:
    cell: budget, shape and steps.
    entry: the training.
    n: parameters without tables.
    trunk: the run of a smaller budget whose trunk it goes on from; None: it begins by itself.
    held_out: True if the surface isn't fitted to it.
  """

  cell: Cell
  entry: Entry
  n: int
  trunk: "Run | None" = None
  held_out: bool = False

  @property
  def trunk_ends(self) -> int:
    """Steps before the decay."""
    return trunk_ends(self.entry.settings)

  @property
  def flops_beyond_trunk(self) -> float:
    """FLOPs of the steps beyond the trunk that the plan has it share."""
    shared = self.trunk.trunk_ends if self.trunk else 0
    return (self.cell.steps - shared) * self.cell.flops_per_step

  @property
  def result(self) -> Result:
    """What has come of it, read from its workdir."""
    return outcomes.result_of(self.entry)


def trunk_ends(settings: Settings) -> int:
  """Returns the steps of a run, with schedule wsd, before its decay."""
  (ends,) = branches.trunk_ends(choices.optimizer_config(settings))
  return ends


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A run that is forecast by the fitted ones, and isn't fitted itself.

  Attributes:
    cell: its budget and shape.
    forecast: of its loss.
    reached: its loss; nan: it hasn't finished.
  """

  cell: Cell
  forecast: Estimate
  reached: float = math.nan

  @property
  def inside(self) -> bool:
    """True if the loss that it reached lies in the interval."""
    return self.forecast.low <= self.reached <= self.forecast.high


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
  """All that is known of a study.

  Attributes:
    settings: the study's.
    costs: parameters and FLOPs of each shape.
    images: training images.
    runs: what was planned so far, and its results.
    fit, frontier: by the finished runs; None: too few.
    optima: of the budgets, the one held out, and ten and a hundred times the largest.
    parabolas: of those budgets that have three sizes.
    exponents: a and b of N* ∝ C^a, D* ∝ C^b; None: refused.
    seed_noise: standard deviation between seeds of one cell; nan: unknown.
    held_out: the run of `isoflop.held_out`; None: there is none yet.
  """

  settings: Settings
  costs: Costs
  images: int
  runs: tuple[tuple[Run, Result], ...]
  fit: surface.Fit | None = None
  frontier: Frontier | None = None
  optima: tuple[Optimum, ...] = ()
  parabolas: tuple[Parabola, ...] = ()
  exponents: tuple[Estimate, Estimate] | None = None
  seed_noise: float = math.nan
  held_out: HeldOut | None = None

  @property
  def fitted(self) -> list[tuple[Run, Result]]:
    """The finished runs that the surface is fitted to."""
    return fitted(self.runs)

  @property
  def refusal(self) -> str:
    """Why no exponent is told, in words; "": one is."""
    if self.exponents:
      return ""
    inside = [compact(each.budget) for each in self.parabolas if each.inside]
    return (
      f"no exponent is told: the minimum lies inside the slice at {len(inside)} of "
      f"{len(self.settings.isoflop.budgets)} budgets ({', '.join(inside) or 'none'}); {MINIMA} are needed"
    )


def fitted(runs: Sequence[tuple[Run, Result]]) -> list[tuple[Run, Result]]:
  """Returns the runs that a surface is fitted to: the finished ones, but for the one held out."""
  return [(run, result) for run, result in runs if result.finished and not run.held_out]


def points_of(runs: Sequence[tuple[Run, Result]]) -> list[Point]:
  """Returns the finished runs, but for the one held out, as points of the surface."""
  return [
    Point(run.cell.budget, run.n, run.cell.tokens, result.validation_loss)
    for run, result in fitted(runs)
  ]


def find(
  settings: Settings,
  costs: Costs,
  images: int,
  runs: Sequence[Run],
  held_out: HeldOut | None = None,
) -> Findings:
  """Fits the surface to the finished runs, and computes what follows from it.

  Args:
    settings: the study's.
    costs: parameters and FLOPs of each shape.
    images: training images.
    runs: all that are planned so far.
    held_out: the run that isn't fitted, if it is known.
  """
  results = tuple((run, run.result) for run in runs)
  found = Findings(
    settings=settings, costs=costs, images=images, runs=results, held_out=held_out,
    seed_noise=seed_noise(results),
  )  # fmt: skip
  points = points_of(results)
  budgets = sorted({point.budget for point in points})
  if len(points) <= surface.PARAMETERS or len(budgets) < 2:
    return found
  n, d, losses, spent = (
    np.array([getattr(point, name) for point in points]) for name in ("n", "d", "loss", "budget")
  )
  fit = surface.fit(n, d, losses, settings.isoflop.draws)
  frontier = Frontier(fit, float(n.min()), costs.flops_per_token)
  parabolas = tuple(
    frontier.parabola(budget, n[spent == budget], losses[spent == budget])
    for budget in budgets
    if len(set(n[spent == budget])) > 2
  )
  largest, own = budgets[-1], settings.isoflop
  asked = {*budgets, own.held_out, own.budget, 10 * largest, 100 * largest} - {0.0}
  told = sum(parabola.inside for parabola in parabolas) >= MINIMA
  return dataclasses.replace(
    found, fit=fit, frontier=frontier, parabolas=parabolas,
    optima=tuple(frontier.optimum(budget) for budget in sorted(asked)),
    exponents=frontier.exponents(budgets) if told else None,
  )  # fmt: skip


def seed_noise(runs: Sequence[tuple[Run, Result]]) -> float:
  """Returns the pooled standard deviation between seeds of one cell; nan: none has two."""
  by_cell: dict[Cell, list[float]] = {}
  for run, result in fitted(runs):
    by_cell.setdefault(run.cell, []).append(result.validation_loss)
  several = [losses for losses in by_cell.values() if len(losses) > 1]
  if not several:
    return math.nan
  squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
  return math.sqrt(squares / sum(len(losses) - 1 for losses in several))
