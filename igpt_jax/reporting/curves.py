"""Plot of a run's losses."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from igpt_jax.reporting import metrics, plots

_SMOOTHED_FROM = 100  # logged losses
_MEANS = 20  # windows of the smoothed curve in the whole one


def draw_curve(workdir: str, path: str) -> bool:
  """Plots a run's losses so far into a PNG; returns False if there are none yet."""
  records = metrics.read_jsonl(os.path.join(workdir, "metrics.jsonl"))
  unit, scale = _unit(records)
  points = {
    name: [(record["step"], scale * record[name]) for record in records if name in record]
    for name in ("loss", "validation_loss")
  }
  curves, chosen = {}, None
  if training := points["loss"]:
    steps, losses = zip(*training, strict=True)
    window = len(losses) // _MEANS
    smooth = len(losses) >= _SMOOTHED_FROM
    curves["training, single batches"] = plots.Curve(steps, losses, faint=smooth)
    if smooth:
      name = f"training, mean of the last {window} of these"
      curves[name] = plots.Curve(steps[window - 1 :], _trailing_means(losses, window))
  if validation := points["validation_loss"]:
    steps, losses = zip(*validation, strict=True)
    curves["validation"] = plots.Curve(steps, losses)
    if finite := [(loss, step) for step, loss in validation if math.isfinite(loss)]:
      best, step = min(finite)
      chosen = (f"best on validation: {best:.4f} at step {step:,}", [step], [best])
  if not curves:
    return False
  newest = max(step for of_curve in points.values() for step, _ in of_curve)
  plots.plot(
    path,
    plots.Panel(curves=curves, y_label=f"loss, {unit}", chosen=chosen),
    title=f"{os.path.basename(os.path.abspath(workdir))}: losses up to step {newest:,}",
    x_label="step",
  )
  return True


def _unit(records: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
  """Returns the unit to draw losses in and what of it is a nat per token: bits per dimension where they are told."""
  for record in records:
    bits = record.get("validation_bits_per_dim")
    if bits and math.isfinite(bits):
      return "bits per dimension", bits / record["validation_loss"]
  return "nats per token", 1.0


def _trailing_means(values: Sequence[float], window: int) -> list[float]:
  """Returns the mean of each value and the `window - 1` before it, where there are as many."""
  ends = range(window, len(values) + 1)
  return [sum(values[end - window : end]) / window for end in ends]
