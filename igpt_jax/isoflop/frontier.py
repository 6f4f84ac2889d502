"""Where a budget is spent best: parameters N*(C) and tokens D*(C) of the lowest loss, by a fitted surface.

The budget C = c(N)·D has the true FLOPs of a token c(N), with attention, head and optimizer: at small sizes
they are far from 6·N, and exponents of C = 6·N·D would be those of another question.

Beside it parabolas in log N through the slices, one for each budget (Hoffmann et al. 2022, second
approach). Their minima are biased: a slice is no parabola, and so the vertex moves with how wide it is and how
far off the optimum its middle lies. The bias is told by fitting the parabola to the surface itself at the slice's
sizes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from igpt_jax.isoflop.surface import Fit, Surface, interval

BEYOND = 10.0  # times the largest N fitted, or a part of the smallest: no number is told beyond
_MOST_BELOW, _MOST_ABOVE = 100.0, 100.0  # of the fitted sizes: bounds of the search
_POINTS = 800  # of the search, refined by a parabola
MINIMA = 3  # budgets whose minimum must lie inside the slice, for an exponent to be told

Cost = Callable[[np.ndarray], np.ndarray]  # parameters -> FLOPs of training on a token


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number with the ends of its interval; nan: an end is out of range."""

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The best way to spend a budget.

  Attributes:
    budget: FLOPs.
    n: parameters, without tables; None: out of range.
    d: tokens; None: as `n`.
    loss: nats per token that a run there is expected to reach; None: as `n`.
  """

  budget: float
  n: Estimate | None
  d: Estimate | None
  loss: Estimate | None


@dataclasses.dataclass(frozen=True)
class Parabola:
  """A parabola in log N through one budget's runs.

  Attributes:
    budget: FLOPs.
    curve: loss = curve[0]·x² + curve[1]·x + curve[2], x = ln N.
    n: parameters at its vertex; nan: it has no minimum.
    inside: True if that lies between the smallest and the largest model of the slice.
    bias: the vertex of the parabola through the surface at the same sizes, over the surface's own optimum.
  """

  budget: float
  curve: tuple[float, ...]
  n: float
  inside: bool
  bias: float


class Frontier:
  """N*(C) and D*(C) by a fit.

  Args:
    fit: the surface, with its draws.
    smallest: parameters of the smallest model that it is fitted to.
    cost: FLOPs of training a model of n parameters on a token.

  Attributes:
    range: the smallest and the largest N* that are told.
  """

  def __init__(self, fit: Fit, smallest: float, cost: Cost):
    self._fit, self._cost = fit, cost
    self.range = smallest / BEYOND, fit.largest * BEYOND  # of the N that are told
    self._log_n = np.linspace(
      np.log(smallest / _MOST_BELOW), np.log(fit.largest * _MOST_ABOVE), _POINTS
    )
    self._n = np.exp(self._log_n)

  def sizes(self, surface: Surface, budget: float) -> np.ndarray:
    """Returns the N of the lowest loss for each surface, [k], or [] of one."""
    losses = np.atleast_2d(surface.loss(self._n, budget / self._cost(self._n)))
    at = np.clip(losses.argmin(axis=1), 1, len(self._n) - 2)
    rows, step = np.arange(len(losses)), self._log_n[1] - self._log_n[0]
    left, middle, right = (losses[rows, at + i] for i in (-1, 0, 1))
    bend = np.maximum(left - 2 * middle + right, 1e-300)
    shift = np.clip((left - right) / (2 * bend), -1, 1)
    return np.exp(self._log_n[at] + step * shift)

  def best_size(self, budget: float) -> float:
    """Returns N*(C) of the best surface, however far off."""
    return float(self.sizes(self._fit.surface, budget)[0])

  def optimum(self, budget: float) -> Optimum:
    """Returns the best way to spend a budget; no numbers where N* is out of range."""
    n = self.best_size(budget)
    if not self.range[0] <= n <= self.range[1]:
      return Optimum(budget, None, None, None)
    low, high = (
      end if self.range[0] <= end <= self.range[1] else math.nan
      for end in interval(self.sizes(self._fit.draws, budget))
    )
    # The more parameters, the fewer tokens: the ends change places.
    d, fewest, most = (budget / self._cost(np.array([n, high, low]))).tolist()
    return Optimum(
      budget, Estimate(n, low, high), Estimate(d, fewest, most),
      Estimate(*self._fit.forecast(n, d)),
    )  # fmt: skip

  def exponents(self, budgets: Sequence[float]) -> tuple[Estimate, Estimate]:
    """Returns a and b of N* ∝ C^a and D* ∝ C^b, between the smallest and the largest of the budgets."""
    ends = min(budgets), max(budgets)
    span = math.log(ends[1] / ends[0])

    def slopes(surface: Surface) -> tuple[np.ndarray, np.ndarray]:
      n = [self.sizes(surface, end) for end in ends]
      d = [end / self._cost(each) for end, each in zip(ends, n, strict=True)]
      return np.log(n[1] / n[0]) / span, np.log(d[1] / d[0]) / span

    best, drawn = slopes(self._fit.surface), slopes(self._fit.draws)
    a, b = (
      Estimate(float(value[0]), *interval(draws)) for value, draws in zip(best, drawn, strict=True)
    )
    return a, b

  def parabola(self, budget: float, n: np.ndarray, losses: np.ndarray) -> Parabola:
    """Fits a parabola to one budget's runs, [m] each; three sizes at least."""
    curve = vertex_curve(n, losses)
    vertex = vertex_of(curve)
    # At the runs' own sizes: the one that has several seeds weighs as much here as there.
    ideal = vertex_of(vertex_curve(n, self._fit.surface.loss(n, budget / self._cost(n))))
    inside = bool(n.min() < vertex < n.max())
    return Parabola(budget, curve, vertex, inside, ideal / self.best_size(budget))


def vertex_curve(n: np.ndarray, losses: np.ndarray) -> tuple[float, ...]:
  """Returns the coefficients of the parabola in ln N through losses, by least squares."""
  return tuple(float(each) for each in np.polyfit(np.log(n), losses, 2))


def vertex_of(curve: Sequence[float]) -> float:
  """Returns the N of a parabola's minimum; nan if it has none."""
  at = -curve[1] / (2 * curve[0]) if curve[0] > 0 else math.nan
  return math.exp(max(min(at, 99.0), -99.0)) if at == at else math.nan
