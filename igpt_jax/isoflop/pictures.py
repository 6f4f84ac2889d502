"""The four pictures of a study: slices, frontier, residuals, and loss against compute."""

import math
import os
from collections.abc import Callable

import numpy as np

from igpt_jax.isoflop.findings import Findings
from igpt_jax.isoflop.frontier import BEYOND
from igpt_jax.isoflop.grid import compact
from igpt_jax.isoflop.surface import LEVEL, interval
from igpt_jax.reporting import plots
from igpt_jax.reporting.plots import Curve, Panel

SLICES, FRONTIER, RESIDUALS, COMPUTE = "slices.png", "frontier.png", "residuals.png", "compute.png"
_POINTS = 60  # of a line, so that it has no markers
_LOSS = "validation loss, nats per token"
_SIZE = "parameters without tables"
_BAND = f"shaded: {LEVEL:.0%} intervals"


def draw(workdir: str, found: Findings) -> None:
  """Draws all four into a workdir; the surface must have been fitted."""
  for name, picture in (
    (SLICES, _slices),
    (FRONTIER, _frontier),
    (RESIDUALS, _residuals),
    (COMPUTE, _compute),
  ):
    picture(os.path.join(workdir, name), found)


def _by_budget(found: Findings) -> dict[float, tuple[np.ndarray, np.ndarray]]:
  """Returns, by budget, the parameters and losses of the fitted runs, the smallest model first."""
  runs: dict[float, list[tuple[int, float]]] = {}
  for run, result in found.fitted:
    runs.setdefault(run.cell.budget, []).append((run.n, result.validation_loss))
  sorted_runs = {budget: np.array(sorted(of)) for budget, of in runs.items()}
  return {budget: (of[:, 0], of[:, 1]) for budget, of in sorted_runs.items()}


def _slices(path: str, found: Findings) -> None:
  """Draws the losses of each budget against N, with its parabola, its minimum, and the surface."""
  curves: dict[str, Curve] = {}
  minima = []
  parabolas = {parabola.budget: parabola for parabola in found.parabolas}
  for budget, (n, losses) in _by_budget(found).items():
    x = np.geomspace(n.min() / 1.1, n.max() * 1.1, _POINTS)
    assert found.fit is not None
    surface = found.fit.surface.loss(x, budget / found.costs.flops_per_token(x))
    curves[f"_surface {budget}"] = Curve(x.tolist(), surface.tolist(), faint=True, dashed=True)
    if parabola := parabolas.get(budget):
      y = np.polyval(parabola.curve, np.log(x))
      curves[f"_parabola {budget}"] = Curve(x.tolist(), y.tolist(), faint=True)
      if parabola.inside:
        minima.append((parabola.n, float(np.polyval(parabola.curve, np.log(parabola.n)))))
    curves[f"{compact(budget)} FLOPs"] = Curve(n.tolist(), losses.tolist(), joined=False)
  chosen = None
  if minima:
    chosen = ("parabola's minimum", [n for n, _ in minima], [loss for _, loss in minima])
  plots.plot(
    path,
    Panel(curves=curves, y_label=_LOSS, x_label=_SIZE, log="x", chosen=chosen),
    title="Losses at equal compute",
    note="coloured lines: parabolas; dashed: the surface",
  )


def _frontier(path: str, found: Findings) -> None:
  """Draws N*(C) and D*(C) with their bands, as far as they are told."""
  assert found.fit is not None and found.frontier is not None
  frontier, fit, cost = found.frontier, found.fit, found.costs.flops_per_token
  budgets = _budgets(found)
  inside = [parabola for parabola in found.parabolas if parabola.inside]

  def panel(y_label: str, of: Callable[[np.ndarray, float], np.ndarray]) -> Panel:
    best = [of(frontier.sizes(fit.surface, c), c)[0] for c in budgets]
    drawn = [np.clip(frontier.sizes(fit.draws, c), *frontier.range) for c in budgets]
    ends = [interval(of(sizes, c)) for sizes, c in zip(drawn, budgets, strict=True)]
    band = ([low for low, _ in ends], [high for _, high in ends])
    at = [each.budget for each in inside]
    minima = [float(of(np.array([each.n]), each.budget)[0]) for each in inside]
    return Panel(
      curves={
        "surface": Curve(budgets, best, band=band),
        "minima of parabolas": Curve(at, minima, joined=False),
      },
      y_label=y_label, x_label="FLOPs of a run", log="xy",
    )  # fmt: skip

  plots.plot(
    path,
    panel(f"N*, {_SIZE}", lambda n, c: n),
    panel("D*, tokens", lambda n, c: c / cost(n)),
    title="How compute is spent best",
    note=f"{_BAND}; as far as {BEYOND:g} times the largest model that was fitted",
  )


def _budgets(found: Findings) -> list[float]:
  """Returns budgets from below the smallest to the largest that was asked for, of those whose N* is told."""
  assert found.frontier is not None
  least, most = found.frontier.range
  ends = found.settings.isoflop.budgets[0] / 2, found.optima[-1].budget
  return [c for c in np.geomspace(*ends, _POINTS) if least <= found.frontier.best_size(c) <= most]


def _residuals(path: str, found: Findings) -> None:
  """Draws each run's loss minus the surface's against N and against D."""
  assert found.fit is not None
  seeds = "" if math.isnan(found.seed_noise) else f"; between seeds {found.seed_noise:.4f}"
  runs = [run for run, _ in found.fitted]
  panels = []
  for x_label, x in (
    (_SIZE, [run.n for run in runs]),
    ("tokens trained on", [run.cell.tokens for run in runs]),
  ):
    curves = {}
    for budget in found.settings.isoflop.budgets:
      own = [i for i, run in enumerate(runs) if run.cell.budget == budget]
      y = [float(found.fit.residuals[i]) for i in own]
      curves[f"{compact(budget)} FLOPs"] = Curve([x[i] for i in own], y, joined=False)
    panels.append(
      Panel(
        curves=curves, y_label="loss minus surface's", x_label=x_label, log="x", levels={"": 0.0}
      )
    )
  plots.plot(
    path,
    *panels,
    title="Residuals of the surface, nats per token",
    note=f"standard deviation {found.fit.sigma:.4f}{seeds}",
  )


def _compute(path: str, found: Findings) -> None:
  """Draws losses against FLOPs, with the lowest that the surface expects, and the run held out."""
  assert found.fit is not None and found.frontier is not None
  budgets = _budgets(found)
  best = []
  for c in budgets:
    n = found.frontier.best_size(c)
    best.append(found.fit.forecast(n, c / float(found.costs.flops_per_token(np.array(n)))))
  value, low, high = ([each[i] for each in best] for i in range(3))
  curves = {"lowest expected": Curve(budgets, value, band=(low, high))}
  spent = [run.cell.flops for run, _ in found.fitted]
  reached = [result.validation_loss for _, result in found.fitted]
  curves["fitted runs"] = Curve(spent, reached, joined=False)
  held, chosen = found.held_out, None
  if held and held.reached == held.reached:
    chosen = ("held out", [held.cell.flops], [held.reached])
  plots.plot(
    path,
    Panel(curves=curves, y_label=_LOSS, x_label="FLOPs of a run", log="x", chosen=chosen),
    title="Loss against compute",
    note=f"{_BAND} of a run",
  )
