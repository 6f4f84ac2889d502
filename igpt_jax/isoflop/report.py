"""Results of a study: runs.csv, isoflop.json, isoflop.md and the pictures."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from igpt_jax import files, units
from igpt_jax.ablation.outcomes import Result
from igpt_jax.isoflop import grid, pictures
from igpt_jax.isoflop.findings import Findings, Run
from igpt_jax.isoflop.frontier import BEYOND, Estimate, Optimum
from igpt_jax.isoflop.grid import compact
from igpt_jax.isoflop.surface import LEVEL, interval
from igpt_jax.reporting import summary
from igpt_jax.reporting.tables import csv_table, markdown_table

RUNS, NUMBERS, PAGE = "runs.csv", "isoflop.json", "isoflop.md"
OUT_OF_RANGE = "out of range"
_SURFACE = {"e": "E", "a": "A", "b": "B", "alpha": "α", "beta": "β"}

# What others found; a figure that isn't theirs, or that we haven't seen, is left out.
_OTHERS = (
  ("Yan et al. 2025 (arXiv 2511.08704)", "next-pixel prediction, 32×32", "200 to 400", ""),
  ("Henighan et al. 2020 (arXiv 2010.14701)", "raw RGB images, 8×8 to 32×32", "", "0.64 to 0.75"),
  ("Hoffmann et al. 2022, Chinchilla (arXiv 2203.15556)", "text", "20", "0.46 to 0.50"),
)


# --- runs.csv --------------------------------------------------------------------------------------


def _columns(images: int) -> dict[str, Callable[[Run, Result], Any]]:
  """Returns the columns of runs.csv by name; none depends on the machine's speed, or on how often it stopped."""

  def number(value: float) -> object:
    return "" if math.isnan(value) else value

  resolution: Callable[[Run], int] = lambda run: run.entry.model.n_positions  # noqa: E731
  return {
    "budget": lambda run, _: compact(run.cell.budget),
    "fitted": lambda run, result: int(result.finished and not run.held_out),
    "shape": lambda run, _: run.cell.shape.name,
    "n_layer": lambda run, _: run.cell.shape.n_layer,
    "n_head": lambda run, _: run.cell.shape.n_head,
    "n_embd": lambda run, _: run.cell.shape.n_embd,
    "seed": lambda run, _: run.entry.seed,
    "parameters": lambda run, _: run.entry.parameters,
    "parameters_without_tables": lambda run, _: run.n,
    "steps": lambda run, _: run.cell.steps,
    "flops_per_step": lambda run, _: run.cell.flops_per_step,
    "flops": lambda run, _: run.cell.flops,
    "flops_beyond_trunk": lambda run, _: run.flops_beyond_trunk,
    "tokens": lambda run, _: run.cell.tokens,
    "unique_tokens": lambda run, _: min(run.cell.tokens, images * resolution(run)),
    "epochs": lambda run, _: round(run.cell.epochs, 4),
    "tokens_per_parameter": lambda run, _: round(run.cell.tokens / run.n, 2),
    "train_loss": lambda _, result: number(result.train_loss),
    "validation_loss": lambda _, result: number(result.validation_loss),
    "status": lambda _, result: result.status,
  }


def number_of_runs(workdir: str) -> int:
  """Returns how many runs a workdir's runs.csv tells of; 0: there is none."""
  path = os.path.join(workdir, RUNS)
  if not files.exists(path):
    return 0
  with files.opened(path) as file:
    return max(len(file.read().splitlines()) - 1, 0)


def write_runs(workdir: str, runs: Sequence[tuple[Run, Result]], images: int) -> None:
  """Writes runs.csv, a row for each run in the order in which they are planned."""
  columns = _columns(images)
  rows = [[column(run, result) for column in columns.values()] for run, result in runs]
  summary.write_text(os.path.join(workdir, RUNS), csv_table(list(columns), rows))


# --- isoflop.json ----------------------------------------------------------------------------------


def numbers(found: Findings) -> dict[str, Any]:
  """Returns isoflop.json: all that was fitted, with the ends of intervals; null: not told."""

  def of(estimate: Estimate | None) -> Any:
    return estimate and {name: _finite(end) for name, end in dataclasses.asdict(estimate).items()}

  values: dict[str, Any] = {
    "runs": len(found.runs),
    "fitted_runs": len(found.fitted),
    "interval": LEVEL,
    "seed_noise": None if math.isnan(found.seed_noise) else found.seed_noise,
  }
  if found.fit:
    values |= {
      "surface": {name: of(_of_surface(found, name)) for name in _SURFACE},
      "sigma": found.fit.sigma,
      "largest_parameters": found.fit.largest,
      "frontier": [
        {"budget": each.budget, **{name: of(getattr(each, name)) for name in ("n", "d", "loss")}}
        for each in found.optima
      ],
      "parabolas": [
        {name: _finite(value) for name, value in dataclasses.asdict(each).items()}
        for each in found.parabolas
      ],
      "exponents": found.exponents and dict(zip("nd", map(of, found.exponents), strict=True)),
      "refusal": found.refusal,
    }
  if held := found.held_out:
    done = not math.isnan(held.reached)
    values["held_out"] = {
      "budget": held.cell.budget, "shape": held.cell.shape.name, "steps": held.cell.steps,
      "forecast": of(held.forecast), "reached": held.reached if done else None,
      "inside": held.inside if done else None,
    }  # fmt: skip
  return values


def _finite(value: Any) -> Any:
  return None if isinstance(value, float) and math.isnan(value) else value


def _of_surface(found: Findings, name: str) -> Estimate:
  assert found.fit is not None
  return Estimate(getattr(found.fit.surface, name), *interval(getattr(found.fit.draws, name)))


# --- isoflop.md ------------------------------------------------------------------------------------


def markdown(found: Findings) -> str:
  """Returns isoflop.md."""
  parts = ["# IsoFLOP study", _scope(found)]
  if found.fit is None:
    parts.append("Too few runs have finished to fit a surface to.")
  else:
    parts += [
      "## How to spend a budget", _frontier(found).rstrip(), _exponents(found),
      "## The surface", _surface(found), "## The slices", _slices(found).rstrip(), _BIAS,
    ]  # fmt: skip
  if found.held_out:
    parts += ["## The run held out", _held_out(found)]
  if found.fit:
    parts += ["## Beside others", _others(found).rstrip(), _COMPARABLE]
  parts += ["## Runs", _runs(found).rstrip()]
  return "\n\n".join(parts) + "\n"


def _scope(found: Findings) -> str:
  sizes = [run.n for run, _ in found.runs]
  budgets = found.settings.isoflop.budgets
  total = sum(run.flops_beyond_trunk for run, _ in found.runs)
  return (
    f"Budgets of {compact(budgets[0])} to {compact(budgets[-1])} FLOPs, models of {min(sizes):,} to {max(sizes):,} "
    f"parameters without tables, {units.counted(len(found.fitted), 'run')} fitted, {compact(float(f'{total:.3g}'))} FLOPs, each trunk counted once. Exponents and "
    "ratios are for these sizes, these images and this recipe; nothing here says that they hold for others."
  )


def _text(estimate: Estimate | None, form: str) -> str:
  """Formats "value (low to high)"."""
  if estimate is None:
    return OUT_OF_RANGE
  low, high = (
    OUT_OF_RANGE if math.isnan(end) else format(end, form) for end in (estimate.low, estimate.high)
  )
  return f"{estimate.value:{form}} ({low} to {high})"


def _frontier(found: Findings) -> str:
  rows = []
  for each in found.optima:
    shape = total = ratio = epochs = OUT_OF_RANGE
    if each.n and each.d:
      nearest = grid.best_shape(found.costs, each.n.value)
      shape, total = nearest.name, f"{found.costs.parameters(nearest)[0]:,}"
      ratio = _text(_ratio(each), ",.0f")
      epochs = f"{each.d.value / found.costs.tokens_per_image / found.images:.2f}"
    rows.append((
      compact(each.budget), _text(each.n, ",.0f"), _text(_millions(each.d), ".3g"), ratio, epochs,
      _text(each.loss, ".4f"), shape, total,
    ))  # fmt: skip
  head = (
    "FLOPs", "N*, without tables", "D*, million tokens", "D*/N*", "epochs", "loss, nats/token",
    "nearest shape", "its parameters, all",
  )  # fmt: skip
  return markdown_table("lrrrrrlr", head, rows)


def _millions(d: Estimate | None) -> Estimate | None:
  return d and Estimate(d.value / 1e6, d.low / 1e6, d.high / 1e6)


def _ratio(optimum: Optimum) -> Estimate:
  """Returns tokens for each parameter; more of the ones go with fewer of the others."""
  assert optimum.n and optimum.d
  return Estimate(
    optimum.d.value / optimum.n.value,
    optimum.d.low / optimum.n.high,
    optimum.d.high / optimum.n.low,
  )


def _exponents(found: Findings) -> str:
  legend = (
    f"In brackets: {LEVEL:.0%} intervals of a parametric bootstrap ({found.settings.isoflop.draws} draws). FLOPs are those that run: matrices, "
    f"attention, head, and the optimizer's products. “{OUT_OF_RANGE}”: beyond {BEYOND:g} times the largest model that was fitted, or below that part of the smallest."
  )
  if not found.exponents:
    return f"{legend}\n\nOf N* ∝ C^a and D* ∝ C^b {found.refusal}."
  a, b = found.exponents
  return f"{legend}\n\nN* ∝ C^a with a = {_text(a, '.3f')}, D* ∝ C^b with b = {_text(b, '.3f')}, over these budgets."


def _surface(found: Findings) -> str:
  assert found.fit is not None
  told = ", ".join(
    f"{symbol} = {_text(_of_surface(found, name), '.3g')}" for name, symbol in _SURFACE.items()
  )
  noise = "unknown" if math.isnan(found.seed_noise) else f"{found.seed_noise:.4f}"
  return (
    f"L(N, D) = E + A/N^α + B/D^β, nats per token: {told}.\n\nStandard deviation of runs from the surface "
    f"{found.fit.sigma:.4f}, between seeds of one shape and budget {noise}: what the first has more than the second, the surface "
    "doesn't describe."
  )


_BIAS = (
  "Bias: a slice is no parabola in log N, so the vertex is off even without noise, by more where the slice is wide or "
  "its middle far from the minimum. It is told as the vertex of the parabola through the fitted surface itself at the "
  "same sizes, over that surface's minimum."
)


def _slices(found: Findings) -> str:
  assert found.frontier is not None
  rows = [
    (
      compact(each.budget), "none" if math.isnan(each.n) else f"{each.n:,.0f}",
      "yes" if each.inside else "no", f"{found.frontier.best_size(each.budget):,.0f}",
      "" if math.isnan(each.bias) else f"× {each.bias:.2f}",
    )
    for each in found.parabolas
  ]  # fmt: skip
  head = ("FLOPs", "parabola's minimum", "inside the slice", "surface's N*", "parabola's bias")
  return markdown_table("lrrrr", head, rows)


def _held_out(found: Findings) -> str:
  held = found.held_out
  assert held is not None
  forecast = held.forecast
  text = (
    f"{compact(held.cell.budget)} FLOPs on {held.cell.shape.name}, {held.cell.steps:,} steps, {held.cell.epochs:.2f} epochs, not "
    f"fitted. Forecast by the fitted runs alone: {_text(forecast, '.4f')} nats per token. "
  )
  if math.isnan(held.reached):
    return f"{text}It hasn't finished."
  missed = held.reached - forecast.value
  if held.inside:
    return (
      f"{text}Reached: {held.reached:.4f}, within the interval, {missed:+.4f} from the forecast."
    )
  beyond = max(forecast.low - held.reached, held.reached - forecast.high)
  return f"{text}Reached: {held.reached:.4f}, **outside** the interval by {beyond:.4f}, {missed:+.4f} from the forecast."


def _others(found: Findings) -> str:
  ratios = [_ratio(each).value for each in found.optima if each.n and each.d]
  budgets = found.settings.isoflop.budgets
  within = [
    _ratio(each).value for each in found.optima if each.n and each.d and each.budget in budgets
  ]
  own = within or ratios
  between = f"{min(own):,.0f} to {max(own):,.0f}" if own else OUT_OF_RANGE
  data = (
    f"{found.settings.data.name}, {found.settings.data.resolution}×{found.settings.data.resolution}"
  )
  exponent = _text(found.exponents[0], ".2f") if found.exponents else "not told"
  rows = [("this study, at its budgets", data, between, exponent), *_OTHERS]
  return markdown_table("llrr", ("study", "data", "tokens a parameter", "a of N ∝ C^a"), rows)


_COMPARABLE = (
  "Comparable: the question, and an answer by runs of equal FLOPs. Not comparable: budgets (Yan et al.'s go to 7e19 FLOPs); "
  "images, resolution and palette; N, which is here without the tables of colours and positions, a large part of all parameters "
  "at these sizes; FLOPs, which are here those of attention, head and optimizer, too: at these sizes far more than 6·N·D, and the "
  "more so the smaller the model; and the recipe, on which every such figure depends."
)


def _runs(found: Findings) -> str:
  rows = [
    (
      compact(run.cell.budget) + (" (held out)" if run.held_out else ""), run.cell.shape.name,
      run.entry.seed, f"{run.n:,}", f"{run.entry.parameters:,}", f"{run.cell.steps:,}",
      f"{run.cell.epochs:.2f}", f"{run.cell.tokens / run.n:,.0f}",
      "" if math.isnan(result.validation_loss) else f"{result.validation_loss:.4f}", result.status,
    )
    for run, result in found.runs
  ]  # fmt: skip
  head = (
    "FLOPs", "shape", "seed", "N", "with tables", "steps", "epochs", "tokens/N", "validation",
    "status",
  )  # fmt: skip
  return markdown_table("llrrrrrrrl", head, rows)


def write(workdir: str, found: Findings) -> None:
  """Writes runs.csv, isoflop.json, isoflop.md and, once there is a surface, the pictures."""
  write_runs(workdir, found.runs, found.images)
  summary.write_json(os.path.join(workdir, NUMBERS), numbers(found))
  summary.write_text(os.path.join(workdir, PAGE), markdown(found))
  if found.fit:
    pictures.draw(workdir, found)
