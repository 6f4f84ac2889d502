"""The fitted surface and the frontier: known surfaces are found, and intervals hold the truth as often as they say."""

import dataclasses

import numpy as np
import pytest

from igpt_jax.isoflop import surface
from igpt_jax.isoflop.frontier import Frontier, vertex_curve, vertex_of
from igpt_jax.isoflop.surface import Surface

TRUTH = Surface(1.7, 9.0, 45.0, 0.28, 0.30)
SIZES = 2_500 * 1.6 ** np.arange(14)
BUDGETS = (3e11, 1e12, 3e12, 1e13)
NOISE = 0.007
HELD_OUT = 3e13


def cost(n):
  """FLOPs of a token: 6·N, and of attention a share that falls with the size."""
  return 6 * n * (1 + 60 * n**-0.45)


def best(truth, budget):
  n = np.geomspace(1e2, 1e8, 400_000)
  losses = truth.loss(n, budget / cost(n))
  return n[losses.argmin()], losses.min()


def grid(below=(2, 2, 2, 2), above=(2, 2, 2, 2), off=(0, 0, 0, 0)):
  """N and D of a study's runs: of each budget so many rungs below and above its middle, which has three seeds.

  The middle is the rung nearest to the optimum, moved by `off` rungs.
  """
  n, d = [], []
  for budget, low, high, moved in zip(BUDGETS, below, above, off, strict=True):
    middle = int(np.abs(np.log(SIZES / best(TRUTH, budget)[0])).argmin()) + moved
    for i in range(middle - low, middle + high + 1):
      n += [SIZES[i]] * (3 if i == middle else 1)
  n = np.array(n)
  counts = [low + high + 3 for low, high in zip(below, above, strict=True)]
  d = np.repeat(BUDGETS, counts) / cost(n)
  return n, d


# Chosen before any was run: around the optima, all above them, and lopsided ones that drift away from them.
GRIDS = {
  "centred": {},
  "off-centre": {"off": (1, 1, 1, 1)},
  "asymmetric": {"below": (1, 2, 2, 3), "above": (3, 2, 3, 1), "off": (1, 0, 0, -1)},
}


def frontier_of(fit, n):
  return Frontier(fit, n.min(), cost)


def test_a_surface_without_noise_is_found():
  n, d = grid()
  fit = surface.fit(n, d, TRUTH.loss(n, d), draws=3)
  for name in ("e", "a", "b", "alpha", "beta"):
    assert getattr(fit.surface, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4)
    assert getattr(fit.draws, name).shape == (3, 1)
  assert fit.sigma < 1e-8 and fit.largest == n.max()
  frontier = frontier_of(fit, n)
  for budget in (*BUDGETS, HELD_OUT):
    assert frontier.best_size(budget) == pytest.approx(best(TRUTH, budget)[0], rel=2e-3)


def test_one_run_far_off_hardly_moves_the_surface():
  """Huber's weights: by squares alone the forecast would move several times as far."""
  n, d = grid()
  losses = TRUTH.loss(n, d) + NOISE * np.random.default_rng(1).standard_normal(len(n))
  clean = surface.fit(n, d, losses).surface.loss(1e5, 5e7)
  losses[5] += 0.2
  robust = surface.fit(n, d, losses).surface.loss(1e5, 5e7)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(surface, "_REWEIGHTED", 0)
    squares = surface.fit(n, d, losses).surface.loss(1e5, 5e7)
  assert abs(robust - clean) < 0.35 * abs(squares - clean)


def test_terms_are_never_negative():
  n, d = grid()
  fit = surface.fit(n, d, 2.0 + 0.01 * np.log(n))  # the more parameters, the worse
  assert min(fit.surface.e, fit.surface.a, fit.surface.b) >= 0
  assert fit.surface.a == pytest.approx(0, abs=1e-6)


def test_it_is_the_same_every_time_and_needs_six_runs():
  n, d = grid()
  losses = TRUTH.loss(n, d) + NOISE * np.random.default_rng(2).standard_normal(len(n))
  one, two = (surface.fit(n, d, losses, draws=40, seed=3) for _ in range(2))
  np.testing.assert_array_equal(one.draws.beta, two.draws.beta)
  assert one.forecast(1e5, 5e7) == two.forecast(1e5, 5e7)
  low, high = one.forecast(1e5, 5e7)[1:]
  assert low < one.forecast(1e5, 5e7)[0] < high
  with pytest.raises(ValueError, match="5 runs for a surface of 5 parameters"):
    surface.fit(n[:5], d[:5], losses[:5])


def test_no_number_is_told_out_of_range():
  n, d = grid()
  fit = surface.fit(n, d, TRUTH.loss(n, d), draws=2)
  frontier = frontier_of(fit, n)
  near = frontier.optimum(1e14)
  assert near.n and near.d
  assert near.n.value <= 10 * n.max() and near.d.value * cost(near.n.value) == pytest.approx(1e14)
  a = fit.draws.a * np.array([[1.0], [1e3]])  # a draw that wants far larger models
  unsure = dataclasses.replace(fit, draws=dataclasses.replace(fit.draws, a=a))
  half = frontier_of(unsure, n).optimum(1e14)
  assert half.n and half.d and half.d.value == near.d.value
  assert [half.n.low, half.d.high] == pytest.approx([near.n.low, near.d.high], rel=1e-3)
  assert np.isnan([half.n.high, half.d.low]).all()
  far = frontier.optimum(1e19)
  assert far.n is far.d is far.loss is None
  tiny = frontier.optimum(1e5)
  assert frontier.best_size(1e5) < frontier.range[0] == n.min() / 10 and tiny.n is None


def test_exponents_of_six_n_d_are_the_closed_form():
  """N* grows, where C = 6·N·D, as C^(β/(α+β)) exactly."""
  n, _ = grid()
  d = 1e12 / n
  fit = surface.fit(
    n, d * np.linspace(1, 30, len(n)), TRUTH.loss(n, d * np.linspace(1, 30, len(n))), 2
  )
  a, b = Frontier(fit, n.min(), lambda n: 6 * n).exponents(BUDGETS)
  assert a.value == pytest.approx(0.30 / 0.58, abs=1e-3) and b.value == pytest.approx(
    0.28 / 0.58, abs=1e-3
  )
  assert a.low <= a.value + 1e-6 and a.high >= a.value - 1e-6


def test_parabolas_and_their_bias():
  assert vertex_of(vertex_curve(np.exp([1.0, 2, 3]), np.array([2.0, 1, 2]))) == pytest.approx(
    np.exp(2)
  )
  assert np.isnan(vertex_of((-1.0, 0.0, 0.0)))
  n, d = grid(off=(1, 1, 1, 1))
  losses = TRUTH.loss(n, d)
  frontier = frontier_of(surface.fit(n, d, losses, draws=2), n)
  rows = slice(0, 7)
  parabola = frontier.parabola(BUDGETS[0], n[rows], losses[rows])
  assert parabola.inside  # without noise the bias is all that it is off by
  assert parabola.bias == pytest.approx(parabola.n / best(TRUTH, BUDGETS[0])[0], rel=5e-3)
  high, _ = grid(off=(3, 3, 3, 3))  # the further off the middle, the more
  farther = frontier.parabola(
    BUDGETS[0], high[rows], TRUTH.loss(high[rows], BUDGETS[0] / cost(high[rows]))
  )
  assert abs(parabola.bias - 1) < 0.01 < 0.05 < farther.bias - 1
  above = frontier.parabola(BUDGETS[0], n[4:7], losses[4:7])
  assert len(set(n[4:7])) == 3 and not above.inside


@pytest.mark.slow
@pytest.mark.parametrize("kind", GRIDS)
def test_intervals_hold_the_truth_as_often_as_they_say(kind):
  """The 90% intervals of 200 draws, seeds 0 to 199, hold each truth 170 to 190 times."""
  n, d = grid(**GRIDS[kind])
  size, loss = best(TRUTH, HELD_OUT)
  ends = [best(TRUTH, budget)[0] for budget in (BUDGETS[0], BUDGETS[-1])]
  span = np.log(BUDGETS[-1] / BUDGETS[0])
  truth = {"N*": size, "a": np.log(ends[1] / ends[0]) / span, "loss": None}
  held = dict.fromkeys(truth, 0)
  for seed in range(200):
    rng = np.random.default_rng((seed, 2))  # another stream than the bootstrap's
    losses = TRUTH.loss(n, d) + NOISE * rng.standard_normal(len(n))
    fit = surface.fit(n, d, losses, draws=100, seed=seed)
    frontier = frontier_of(fit, n)
    optimum = frontier.optimum(HELD_OUT)
    assert optimum.n
    held["N*"] += optimum.n.low <= size <= optimum.n.high
    a, _ = frontier.exponents(BUDGETS)
    held["a"] += a.low <= truth["a"] <= a.high
    _, low, high = fit.forecast(size, HELD_OUT / cost(size), seed=seed)
    held["loss"] += low <= loss + NOISE * rng.standard_normal() <= high
  print(kind, held)
  assert all(170 <= count <= 190 for count in held.values()), held
