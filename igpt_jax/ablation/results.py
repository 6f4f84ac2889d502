"""An ablation's files: ablate.csv and ablate.md, and ablate.png, losses against FLOPs and against time."""

import math
import os
import statistics
from collections.abc import Sequence

from igpt_jax.ablation import comparison
from igpt_jax.ablation.comparison import Run
from igpt_jax.ablation.outcomes import UNFINISHED, Point, Result
from igpt_jax.reporting import plots, summary


def write(workdir: str, results: Sequence[Result], notes: Sequence[str] = ()) -> str:
  """Writes ablate.csv, ablate.md and ablate.png; returns the text of ablate.md."""
  runs = comparison.runs_of(results)
  text = comparison.markdown(runs, notes)
  summary.write_text(os.path.join(workdir, "ablate.csv"), comparison.csv_text(runs))
  summary.write_text(os.path.join(workdir, "ablate.md"), text)
  draw(os.path.join(workdir, "ablate.png"), runs)
  return text


def draw(path: str, runs: Sequence[Run]) -> bool:
  """Plots validation losses against FLOPs and time; returns False if there is none yet."""
  scale, unit = comparison.flop_unit(max(run.entry.flops for run in runs))
  shown = [run for run in comparison.by_loss(runs) if _points(run)]
  if not shown:
    return False
  longest = max(point.seconds for run in shown for points in _points(run) for point in points)
  minutes = longest > 300
  by_flops, by_time = {}, {}
  for run in shown:
    steps = _points(run)
    losses = [[point.loss for point in points] for points in steps]
    means = [statistics.fmean(of_step) for of_step in losses]
    several = len(losses[0]) > 1
    band = ([min(of) for of in losses], [max(of) for of in losses]) if several else None
    name = f"{run.name}: {means[-1]:.4f}" + (" (baseline)" if run is runs[0] else "")
    flops = [points[0].step * run.entry.flops_per_step / scale for points in steps]
    seconds = [statistics.fmean(point.seconds for point in points) for points in steps]
    times = [value / 60 if minutes else value for value in seconds]
    dashed = run is runs[0]
    by_flops[name] = plots.Curve(flops, means, band=band, dashed=dashed)
    by_time[name] = plots.Curve(times, means, band=band, dashed=dashed)
  y_label = f"validation loss, {runs[0].unit}"
  seeds = sorted({len(_points(run)[0]) for run in shown})
  over = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
  plots.plot(
    path,
    plots.Panel(curves=by_flops, y_label=y_label, x_label=f"training so far, {unit}"),
    plots.Panel(
      curves=by_time, y_label=y_label,
      x_label=f"time in training steps, {'minutes' if minutes else 'seconds'}",
    ),
    title="Ablation: validation loss against FLOPs and time",
    note=f"means over {over} seeds; shaded: lowest to highest" if seeds[-1] > 1 else "one seed",
  )  # fmt: skip
  return True


def _points(run: Run) -> list[list[Point]]:
  """Returns, for each step at which all seeds that have an evaluation have one, their points there."""
  curves = [
    {point.step: point for point in result.curve if math.isfinite(point.loss)}
    for result in run.results
    if result.curve and (result.finished or result.status == UNFINISHED)
  ]
  common = sorted(set.intersection(*map(set, curves))) if curves else []
  return [[curve[step] for curve in curves] for step in common]
