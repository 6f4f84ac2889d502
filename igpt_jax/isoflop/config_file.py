"""Config files that a study writes: the best run at a budget, with its forecast."""

import os
import textwrap

from igpt_jax.config.fields import FIELDS, Settings, value_of
from igpt_jax.isoflop.findings import HeldOut
from igpt_jax.isoflop.grid import compact
from igpt_jax.isoflop.surface import LEVEL
from igpt_jax.reporting import summary

_WIDTH = 110


def name_of(budget: float) -> str:
  """Returns the name of a budget's config file, such as "isoflop_1e15.py"."""
  return f"isoflop_{compact(budget)}.py"


def text(own: Settings, forecast: HeldOut, path: str) -> str:
  """Returns the config file of a run.

  Args:
    own: its settings, those of job pretrain.
    forecast: of its loss.
    path: the file's, which its docstring names.
  """
  cell, loss = forecast.cell, forecast.forecast
  run = os.path.splitext(path)[0]
  docstring = (
    f"{compact(cell.budget)} FLOPs as a study of job isoflop would spend them: {cell.shape.name}, "
    f"{cell.steps:,} steps, {cell.tokens:,} tokens, {cell.epochs:.2f} epochs.\n\n"
    f"  python -m igpt_jax.main --config {path} --workdir {run}\n\n"
    f"Forecast: {loss.value:.4f} nats per token of validation, {LEVEL:.0%} interval {loss.low:.4f} to "
    f"{loss.high:.4f}, of the fit to that study's runs (isoflop.md beside this file)."
  )
  paragraphs = [
    each if each.startswith("  ") else textwrap.fill(each, _WIDTH)
    for each in docstring.split("\n\n")
  ]
  changed = [
    f"  config.{name} = {value!r}"
    for name, declaration in FIELDS.items()
    if "pretrain" in declaration.jobs
    and (value := value_of(own, name)) != value_of(Settings(), name)
  ]
  lines = "\n".join(changed)
  quoted = "\n\n".join(paragraphs).replace("\\", "\\\\").replace('"""', "'''")
  return (
    f'"""{quoted}\n"""\n\nfrom igpt_jax.config import base\n\n\n'
    f"def get_config():\n  config = base()\n{lines}\n  return config\n"
  )


def write(path: str, own: Settings, forecast: HeldOut) -> None:
  """Writes the config file of a run."""
  summary.write_text(path, text(own, forecast, path))
