"""Plot of a run's losses."""

import os

from igpt_jax.reporting import figures, metrics


def draw_curve(workdir: str, path: str) -> bool:
  """Plots a run's losses so far into a PNG; returns False if there are none yet."""
  records = metrics.read_jsonl(os.path.join(workdir, "metrics.jsonl"))
  curves = {}
  for name, label in (("loss", "training"), ("validation_loss", "validation")):
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
      curves[label] = tuple(zip(*points, strict=True))
  if not curves:
    return False
  title = os.path.basename(os.path.abspath(workdir))
  figures.plot(path, curves, title=title, x_label="step", y_label="nats per token")
  return True
