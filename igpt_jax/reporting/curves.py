"""The curve of a run's losses."""

import os

from igpt_jax.reporting import figures, metrics


def draw_curve(workdir: str, path: str) -> bool:
  """Draws a run's losses so far into a PNG; False where there are none yet."""
  records = metrics.read_jsonl(os.path.join(workdir, "metrics.jsonl"))
  curves = {}
  for name, label in (("loss", "training"), ("validation_loss", "validation")):
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
      curves[label] = tuple(zip(*points, strict=True))
  if not curves:
    return False
  figures.plot(
    path,
    curves,
    title=os.path.basename(os.path.abspath(workdir)),
    x_label="step",
    y_label="nats per token",
  )
  return True
