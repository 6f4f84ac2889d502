"""The ladder and the grid: shapes, FLOPs of what runs, which shapes a budget trains, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from igpt_jax.config import choices
from igpt_jax.errors import UserError
from igpt_jax.isoflop import grid
from igpt_jax.isoflop.grid import Point, compact
from igpt_jax.isoflop.ladder import LADDER, Costs, rungs
from igpt_jax.isoflop.speeds import Speeds
from igpt_jax.model.image_gpt import count_params
from igpt_jax.training.compilation import flops_per_image, optimizer_flops
from support.quickstart import load_config
from support.tiny import settings_of

IMAGES = 45_000


@pytest.fixture(scope="module")
def settings():
  return settings_of(load_config("isoflop_cifar10_16"))


@pytest.fixture(scope="module")
def costs(settings):
  return Costs(settings, 64)


def cells_of(settings, costs, budget, size):
  shapes = grid.window(LADDER, costs, size, settings.isoflop.per_budget)
  return [grid.cell(settings, costs, shape, budget, IMAGES) for shape in shapes]


# --- the ladder ------------------------------------------------------------------------------------


def test_the_ladder_is_one_of_alike_shapes():
  assert len({shape.name for shape in LADDER}) == len(LADDER)
  sizes = [12 * shape.n_layer * shape.n_embd**2 for shape in LADDER]
  steps = [b / a for a, b in itertools.pairwise(sizes)]
  assert min(steps) > 1.4 and max(steps) < 1.85
  assert (sizes[-1] / sizes[0]) ** (1 / len(steps)) == pytest.approx(1.6, abs=0.03)
  for shape in LADDER:
    assert 5 <= shape.n_embd / shape.n_layer <= 12
    assert shape.n_head >= 2  # one head can't look left and up at once
    assert shape.n_embd % shape.n_head == 0
    assert shape.n_embd // shape.n_head % 4 == 0  # rotations by row and column
    assert 4 <= shape.n_embd // shape.n_head <= 64


def test_parameters_with_and_without_tables(settings, costs):
  shape = LADDER[6]
  assert shape.name == "5x32"
  model = choices.model_config(costs.settings(shape, 1_000, 0), n_vocab=64)
  both, own = costs.parameters(shape)
  assert both == count_params(model)
  # Embeddings, output table, and value embeddings of five layers; no table of positions with rope2d.
  assert both - own == 64 * 32 * (1 + 1 + 5)
  # Matrices, gains of two norms a layer and of the last, and the start vector.
  assert own == costs.size(shape) == 5 * 12 * 32**2 + (5 * 2 + 1 + 1) * 32


def test_flops_are_those_that_run(settings, costs):
  for shape in (LADDER[0], LADDER[8]):
    model = choices.model_config(costs.settings(shape, 1_000, 0), n_vocab=64)
    muon = optimizer_flops(model, choices.optimizer_config(settings))
    assert muon > 0 and costs.flops_per_step(shape) == 16 * flops_per_image(model) + muon
    assert flops_per_image(model) > 6 * costs.size(shape) * 256  # attention and head
  sizes = np.array([costs.size(shape) for shape in LADDER], float)
  exact = [costs.flops_per_step(shape) / costs.tokens_per_step for shape in LADDER]
  assert costs.flops_per_token(sizes) == pytest.approx(
    np.array(exact), rel=0.07
  )  # 2x24 is the widest
  ends = np.array([sizes[0] / 10, sizes[0], sizes[-1], sizes[-1] * 10])
  assert np.ptp(costs.flops_per_token(ends)[:2] / ends[:2]) < 1e-9
  assert np.ptp(costs.flops_per_token(ends)[2:] / ends[2:]) < 1e-9


def test_shapes_are_named():
  assert rungs(()) == LADDER
  assert [shape.name for shape in rungs(("5x32", "2x12"))] == ["2x12", "5x32"]
  with pytest.raises(UserError, match=r"isoflop\.shapes: '4x28'; expected shapes .*: 2x12, 2x16,"):
    rungs(("5x32", "4x28"))


def test_speeds_between_measured_shapes(costs, monkeypatch):
  small, middle, large = LADDER[2], LADDER[5], LADDER[8]
  seconds = {
    shape.n_embd: costs.flops_per_step(shape) / speed
    for shape, speed in ((small, 4e9), (large, 16e9))
  }
  timed = []

  def step_seconds(settings, model, mesh):
    timed.append(model.n_embd)
    return seconds[model.n_embd]

  monkeypatch.setattr("igpt_jax.workspace.sizing.step_seconds", step_seconds)
  speeds = Speeds(costs)
  speeds.note(small, math.nan)
  for _ in range(2):
    speeds.measure((small, large), None)
  assert timed == [16, 48] and speeds.range() == pytest.approx((4e9, 16e9))
  assert speeds.seconds(small, 8e9) == speeds.seconds(LADDER[0], 8e9) == pytest.approx(2)
  assert speeds.seconds(LADDER[-1], 16e9) == pytest.approx(1)
  share = math.log(costs.size(middle) / costs.size(small)) / math.log(
    costs.size(large) / costs.size(small)
  )
  assert speeds.seconds(middle, 1e9) == pytest.approx(1 / (4 * 4**share))
  speeds.note(middle, costs.flops_per_step(middle) / 5e9)
  assert speeds.seconds(middle, 1e9) == pytest.approx(0.2)


# --- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [3e11, 1e12, 3e12, 1e13, 3e13])
def test_budgets_are_met(settings, costs, budget):
  size = grid.expected_size(budget, [], costs, 300)
  cells = cells_of(settings, costs, budget, size)
  assert len(cells) == 5
  for cell in cells:
    assert abs(cell.flops / budget - 1) <= 0.01
    assert cell.tokens == cell.steps * 16 * 256
    assert cell.epochs == pytest.approx(cell.steps * 16 / IMAGES)
  middle = cells[2]
  assert middle.tokens / costs.size(middle.shape) == pytest.approx(300, rel=0.5)


def test_the_window_stays_on_the_ladder(costs):
  names = [shape.name for shape in grid.window(LADDER, costs, 38_000, 5)]
  assert names == ["2x24", "3x24", "3x32", "5x32", "5x40"]
  assert grid.window(LADDER, costs, 1, 5) == list(LADDER[:5])
  assert grid.window(LADDER, costs, 1e12, 7) == list(LADDER[-7:])
  with pytest.raises(UserError, match=r"isoflop\.shapes: 3; expected isoflop\.per_budget = 5 or m"):
    grid.window(LADDER[:3], costs, 1e4, 5)


def slice_of(costs, budget, sizes, best):
  """Points whose losses are a parabola in log N around `best`."""
  return [
    Point(
      budget, n, budget / float(costs.flops_per_token(np.array(n))), 2 + math.log(n / best) ** 2
    )
    for n in sizes
  ]


def test_the_next_budget_goes_by_what_has_been_found(costs):
  sizes = [5e3, 8e3, 13e3, 20e3, 33e3]
  first = slice_of(costs, 3e11, sizes, 1e4)
  assert grid.expected_size(3e12, first, costs, 300) == pytest.approx(1e4 * 10**0.5)
  # A minimum beyond the slice leads no further than its end; and neither does a slice without one.
  far = slice_of(costs, 3e11, sizes, 1e6)
  assert grid.expected_size(3e12, far, costs, 300) == pytest.approx(33e3 * 10**0.5)
  hill = [Point(p.budget, p.n, p.d, -p.loss) for p in first]
  assert grid.expected_size(3e12, hill, costs, 300) == pytest.approx(33e3 * 10**0.5)


def test_after_two_budgets_the_surface_decides(costs):
  def points(budget, sizes):
    d = [budget / float(costs.flops_per_token(np.array(n))) for n in sizes]
    losses = [1.7 + 9 * n**-0.28 + 45 * each**-0.3 for n, each in zip(sizes, d, strict=True)]
    return [Point(budget, *each) for each in zip(sizes, d, losses, strict=True)]

  known = points(3e11, [5e3, 8e3, 13e3, 20e3, 33e3]) + points(1e12, [8e3, 13e3, 20e3, 33e3, 5e4])
  size = grid.expected_size(3e12, known, costs, 300)
  n = np.geomspace(1e3, 1e6, 20_000)
  d = 3e12 / costs.flops_per_token(n)
  assert size == pytest.approx(n[(9 * n**-0.28 + 45 * d**-0.3).argmin()], rel=0.01)


@pytest.mark.parametrize(
  ("budget", "changes", "expected"),
  [
    (1e8, {}, r"budgets: 1e8 on 3x32: less than one batch of 16 images, 1\.59e\+09 FLOPs; expected 7\.9e"),
    (1e10, {}, r"1e10 on 3x32: 6 steps of 1\.59e\+09 FLOPs miss it by -4\.6%; expected 1% at m"),
    (9e10, {}, r"9e10 on 3x32: train\.steps: 57; .*leave no step between them.*; fix: larger budgets, or fewer train\.w"),
    (1e13, {"isoflop.max_epochs": 2.0, "isoflop.beyond": "refuse"},
     r"1e13 on 3x32: 2\.2 epochs of 45,000 images; expected isoflop\.max_epochs = 2 at most; fix: mo"),
  ],
)  # fmt: skip
def test_a_grid_that_can_not_be_is_refused_in_words(budget, changes, expected):
  settings = settings_of(load_config("isoflop_cifar10_16"), changes)
  with pytest.raises(UserError, match=expected):
    grid.cell(settings, Costs(settings, 64), LADDER[5], budget, IMAGES)


def test_more_epochs_are_let_through_unless_asked(settings, costs):
  assert grid.cell(settings, costs, LADDER[5], 1e14, IMAGES).epochs > 20


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"train.schedule": "cosine"}, r"train\.schedule: 'cosine'; .* expected 'wsd'"),
    ({"train.steps": 500}, r"config\.train\.steps: 500; .* expected 1000000, .* isoflop\.budgets"),
    ({"model.n_embd": 32}, r"config\.model\.n_embd: 32; .*expected 0; fix: isoflop\.shapes"),
    ({"init_from": "packaged"}, r"config\.init_from: 'packaged'; .*random parameters"),
    ({"objective": "masked"}, r"config\.objective: 'masked'; job isoflop studies next-pixel"),
    ({"isoflop.budgets": (1e12,)}, r"isoflop\.budgets: \(1000000000000\.0,\); expected two or more"),
    ({"isoflop.budgets": (1e12, 3e11)}, r"isoflop\.budgets: .*the smallest first"),
    ({"isoflop.held_out": 1e12}, r"isoflop\.held_out: 1e\+12; expected more than the budgets, 1e\+13"),
    ({"isoflop.seeds": (1, 1)}, r"isoflop\.seeds: 1 twice"),
  ],
)  # fmt: skip
def test_settings_that_are_refused(changes, expected):
  with pytest.raises(UserError, match=expected):
    settings_of(load_config("isoflop_cifar10_16"), changes)


def test_budgets_are_written_short():
  assert [compact(value) for value in (3e11, 1e12, 1.25e9, 123_456)] == [
    "3e11", "1e12", "1.25e9", "1.23456e5"
  ]  # fmt: skip
