"""The grid of a study: which shapes each budget trains, and for how many steps.

A budget trains the shapes of the ladder around the size that is expected to be best: at the first budget
by the tokens for each parameter that the settings expect, then by what has been trained.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.errors import UserError
from igpt_jax.isoflop import surface
from igpt_jax.isoflop.frontier import Frontier, vertex_curve, vertex_of
from igpt_jax.isoflop.ladder import LADDER, Costs, Shape

TOLERANCE = 0.01  # by which a run's FLOPs may miss the budget


@dataclasses.dataclass(frozen=True)
class Cell:
  """A budget spent on a shape.

  Attributes:
    budget: FLOPs.
    shape: the model's.
    steps: of the whole run.
    flops_per_step: of the model on a batch, and of the optimizer.
    tokens: that the run is trained on.
    epochs: passes over the training images.
  """

  budget: float
  shape: Shape
  steps: int
  flops_per_step: float
  tokens: int
  epochs: float

  @property
  def flops(self) -> float:
    return self.steps * self.flops_per_step


@dataclasses.dataclass(frozen=True)
class Point:
  """A finished run: the budget, N, D and the loss in nats per token."""

  budget: float
  n: float
  d: float
  loss: float


def compact(value: float) -> str:
  """Formats 3e11 as "3e11", in up to six digits."""
  mantissa, exponent = f"{value:.5e}".split("e")
  return f"{float(mantissa):g}e{int(exponent)}"


def window(rungs: Sequence[Shape], costs: Costs, size: float, count: int) -> list[Shape]:
  """Returns `count` shapes around the one whose N is nearest to a size; fewer below at the ladder's ends.

  Raises:
    UserError: there are fewer shapes.
  """
  if len(rungs) < count:
    raise UserError(
      f"config.isoflop.shapes: {len(rungs)}; expected isoflop.per_budget = {count} or more to choose from"
    )
  middle = nearest(rungs, costs, size)
  first = min(max(middle - (count - 1) // 2, 0), len(rungs) - count)
  return list(rungs[first : first + count])


def middle(cells: Sequence[Cell]) -> Cell:
  """Returns the cell of a budget's middle shape, the one that is trained with all seeds."""
  return cells[(len(cells) - 1) // 2]


def nearest(rungs: Sequence[Shape], costs: Costs, size: float) -> int:
  """Returns the index of the shape whose N is nearest to a size, by its logarithm."""
  return min(range(len(rungs)), key=lambda i: abs(math.log(costs.size(rungs[i]) / size)))


def best_shape(costs: Costs, size: float) -> Shape:
  """Returns the shape of the whole ladder whose N is nearest to a size."""
  return LADDER[nearest(LADDER, costs, size)]


def expected_size(budget: float, points: Sequence[Point], costs: Costs, ratio: float) -> float:
  """Returns the N that is expected to be best at a budget.

  Without runs: that with `ratio` tokens for each parameter. After one budget: the minimum of its parabola,
  growing as √C. After more: by the surface so far. Either within what the budget before has trained, scaled
  likewise: a slice goes no further than its neighbour's ends, however few runs there are.
  """
  if not points:
    sizes = np.exp(np.linspace(math.log(1e2), math.log(1e10), 4_000))
    spent = costs.flops_per_token(sizes) * ratio * sizes
    return float(sizes[np.argmin(abs(np.log(spent / budget)))])
  last = max(point.budget for point in points)
  n = np.array([point.n for point in points])
  d = np.array([point.d for point in points])
  losses = np.array([point.loss for point in points])
  of_last = np.array([point.budget == last for point in points])
  growth = math.sqrt(budget / last)
  low, high = n[of_last].min() * growth, n[of_last].max() * growth
  if len({point.budget for point in points}) > 1 and len(points) > surface.PARAMETERS:
    frontier = Frontier(surface.fit(n, d, losses), n.min(), costs.flops_per_token)
    size = frontier.best_size(budget)
  elif len(set(n[of_last])) > 2:
    size = vertex_of(vertex_curve(n[of_last], losses[of_last])) * growth
  else:
    size = math.nan
  if math.isnan(size):  # no minimum: where the loss is lowest
    size = n[of_last][losses[of_last].argmin()] * growth
  return float(min(max(size, low), high))


def cell(
  settings: Settings,
  costs: Costs,
  shape: Shape,
  budget: float,
  images: int,
  name: str = "isoflop.budgets",
) -> Cell:
  """Returns a budget spent on a shape, by what really runs.

  Args:
    settings: the study's.
    costs: FLOPs of each shape.
    shape: the model's.
    budget: FLOPs.
    images: training images, without those that are held out.
    name: the setting that the budget is from.

  Raises:
    UserError: the budget is less than a batch, can't be met to TOLERANCE, is too small for the schedule, or
      takes more epochs than are allowed.
  """
  per_step, batch = costs.flops_per_step(shape), settings.train.batch_size
  what = f"config.{name}: {compact(budget)} on {shape.name}"
  if budget < per_step:
    raise UserError(
      f"{what}: less than one batch of {batch} images, {per_step:.3g} FLOPs; expected "
      f"{per_step / 2 / TOLERANCE:.2g} or more; fix: larger budgets, or smaller train.batch_size"
    )
  steps = round(budget / per_step)
  if abs(steps * per_step / budget - 1) > TOLERANCE:
    raise UserError(
      f"{what}: {steps} steps of {per_step:.3g} FLOPs miss it by {steps * per_step / budget - 1:+.1%}; expected "
      f"{TOLERANCE:.0%} at most; fix: larger budgets, or smaller train.batch_size"
    )
  try:
    choices.optimizer_config(costs.settings(shape, steps, 0))
  except UserError as error:
    raise UserError(
      f"{what}: {re.sub('; fix: .*', '', str(error))}; fix: larger budgets, or fewer train.warmup_steps or "
      "train.decay_steps"
    ) from None
  epochs = steps * batch / images
  limit = settings.isoflop.max_epochs
  if epochs > limit and settings.isoflop.beyond == "refuse":
    raise UserError(
      f"{what}: {epochs:.1f} epochs of {images:,} images; expected isoflop.max_epochs = {limit:g} at most; "
      "fix: more images, smaller budgets, larger isoflop.shapes, or isoflop.beyond=warn"
    )
  return Cell(budget, shape, steps, per_step, steps * costs.tokens_per_step, epochs)
