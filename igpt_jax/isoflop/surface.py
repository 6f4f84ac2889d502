"""The loss as a function of parameters and tokens, L(N, D) = E + A/N^α + B/D^β, and how sure it is.

The form is that of the third approach of Hoffmann et al. 2022 (arXiv 2203.15556), who search over all five
numbers. For given α and β the surface is linear in E, A and B, which non-negative least squares finds; what is
left here is a search over two. Runs that lie far off count less, by Huber's weights.

Intervals are those of a parametric bootstrap: losses are drawn around the surface with normal noise, and the
surface is fitted to them again. The noise's variance is the residuals' (of all runs, those that differ in
the seed alone among them: it holds the seeds' noise and what the surface doesn't describe), drawn for
every fit from its own distribution, so that few runs give wider intervals. Chosen before any result: to draw
runs anew, instead, leaves slices without their ends, from which α and β can't be told; and a profile
likelihood has one interval a number, where the draws have those of everything that is computed from the surface.
How often they hold a known truth: tests/unit/isoflop/test_surface.py.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import optimize

PARAMETERS = 5
LEVEL = 0.9  # of all intervals
_HUBER = (
  1.345  # standard deviations up to which a residual counts whole: 95% efficient without outliers
)
_REWEIGHTED = 2  # fits with Huber's weights after the first
_EXPONENTS = (0.02, 3.0)  # bounds of α and β
_STARTS = np.geomspace(0.05, 2.0, 10)  # of both, for the first fit


@dataclasses.dataclass(frozen=True)
class Surface:
  """L(N, D) = e + a/N^alpha + b/D^beta, nats per token; of several surfaces arrays [k, 1]."""

  e: Any
  a: Any
  b: Any
  alpha: Any
  beta: Any

  def loss(self, n: Any, d: Any) -> Any:
    """Returns the losses of models with n parameters after d tokens; [k, m] of arrays [m]."""
    return self.e + self.a * n**-self.alpha + self.b * d**-self.beta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """A fitted surface.

  Attributes:
    surface: the best.
    draws: k surfaces of the bootstrap, arrays [k, 1].
    sigma: standard deviation of a run's loss from the surface, nats per token.
    sigmas: its draws, [k, 1].
    residuals: loss minus the surface's, of each run, [m].
    largest: parameters of the largest model that it is fitted to.
  """

  surface: Surface
  draws: Surface
  sigma: float
  sigmas: np.ndarray
  residuals: np.ndarray
  largest: float

  def forecast(self, n: float, d: float, seed: int = 0) -> tuple[float, float, float]:
    """Returns the loss that a run with n parameters and d tokens is to reach, and its interval's ends."""
    rng = np.random.default_rng((seed, 1))  # another stream than that of the surfaces' draws
    noise = rng.standard_normal(self.sigmas.shape)
    low, high = interval(self.draws.loss(n, d) + self.sigmas * noise)
    return float(self.surface.loss(n, d)), low, high


def interval(draws: np.ndarray) -> tuple[float, float]:
  """Returns the ends of the central interval of LEVEL."""
  # By ranks of k + 1: one more draw would lie within with probability LEVEL, however few there are.
  low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="weibull")
  return float(low), float(high)


def fit(n: np.ndarray, d: np.ndarray, losses: np.ndarray, draws: int = 0, seed: int = 0) -> Fit:
  """Fits the surface to runs.

  Args:
    n: parameters of each run, [m].
    d: tokens that each was trained on, [m].
    losses: nats per token, [m].
    draws: surfaces of the bootstrap; 0: none.
    seed: of the bootstrap.

  Raises:
    ValueError: there are no more runs than parameters of the surface.
  """
  n, d, losses = (np.asarray(values, np.float64) for values in (n, d, losses))
  left = len(losses) - PARAMETERS
  if left < 1:
    raise ValueError(f"{len(losses)} runs for a surface of {PARAMETERS} parameters")
  runs = _Runs(n, d)
  best = runs.fit(losses, runs.start(losses))
  expected = best.loss(n, d)
  residuals = losses - expected
  sigma = float(np.sqrt(np.sum(residuals**2) / left))
  rng = np.random.default_rng(seed)
  sigmas = sigma * np.sqrt(left / rng.chisquare(left, size=(draws, 1)))
  noise = rng.standard_normal((draws, len(losses)))
  start = np.log([best.alpha, best.beta])
  drawn = [runs.fit(expected + each, start) for each in sigmas * noise]
  fields = [field.name for field in dataclasses.fields(Surface)]
  columns = (np.array([[getattr(each, name)] for each in drawn]) for name in fields)
  return Fit(
    surface=best, draws=Surface(*columns), sigma=sigma, sigmas=sigmas, residuals=residuals,
    largest=float(n.max()),
  )  # fmt: skip


class _Runs:
  """The runs that surfaces are fitted to, scaled so that the three terms are of one size."""

  def __init__(self, n: np.ndarray, d: np.ndarray):
    self._n0, self._d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    self._log_n, self._log_d = np.log(n / self._n0), np.log(d / self._d0)

  def start(self, losses: np.ndarray) -> np.ndarray:
    """Returns the logarithms of α and β at the best point of a coarse grid."""
    grid = [np.log([alpha, beta]) for alpha in _STARTS for beta in _STARTS]
    weights = np.ones_like(losses)
    return min(grid, key=lambda at: float(np.sum(self._linear(at, losses, weights)[1] ** 2)))

  def fit(self, losses: np.ndarray, start: np.ndarray) -> Surface:
    """Returns the surface of losses [m]; the search begins at `start`, logarithms of α and β."""
    weights, at, left = np.ones_like(losses), start, max(len(losses) - PARAMETERS, 1)
    for again in range(_REWEIGHTED + 1):
      # MINPACK itself: `least_squares` takes six times as long for what is done thousands of times here.
      at, _ = optimize.leastsq(self._residuals, at, args=(losses, weights))
      if again < _REWEIGHTED:
        residuals = np.abs(self._linear(at, losses, weights)[1])
        scale = 1.4826 * np.median(residuals) * np.sqrt(len(losses) / left)
        far = residuals > _HUBER * scale
        weights = np.where(far, _HUBER * scale / np.where(far, residuals, 1.0), 1.0)
        if not weights.all():  # no noise at all
          break
    (e, a, b), _ = self._linear(at, losses, weights)
    alpha, beta = _exponents(at)
    return Surface(float(e), float(a * self._n0**alpha), float(b * self._d0**beta), alpha, beta)

  def _residuals(self, at: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return self._linear(at, losses, weights)[1] * np.sqrt(weights)

  def _linear(
    self, at: np.ndarray, losses: np.ndarray, weights: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (E, A, B), scaled, for the logarithms `at` of α and β, and the residuals [m]."""
    alpha, beta = _exponents(at)
    terms = np.ones((len(losses), 3))
    np.exp(-alpha * self._log_n, out=terms[:, 1])
    np.exp(-beta * self._log_d, out=terms[:, 2])
    root = np.sqrt(weights)
    found, _ = optimize.nnls(terms * root[:, None], losses * root)
    return found, terms @ found - losses


def _exponents(at: np.ndarray) -> tuple[float, float]:
  """Returns α and β within their bounds, from their logarithms."""
  low, high = _EXPONENTS
  alpha, beta = (min(max(math.exp(min(x, 10.0)), low), high) for x in at)
  return alpha, beta
