"""The report of job first_contact as Markdown: what it is of, one table, notes."""

from collections.abc import Iterator
from typing import Any

from igpt_jax import units
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.timing import benchmark_tables
from igpt_jax.timing.benchmark_tables import HEAD, SIDES, seconds

Values = dict[str, Any]


def as_markdown(report: Values) -> str:
  """Returns the whole report."""
  parts = report["parts"].values()
  table = markdown_table(SIDES, HEAD, [row for part in parts for row in _rows(part)])
  lines = ["# First contact", "", *(f"- {line}" for line in _heading(report)), "", table]
  return "\n".join([*lines, *(note for part in parts for note in _notes(part))]) + "\n"


def _heading(report: Values) -> Iterator[str]:
  about = report["about"]
  machine = about["machine"]
  yield (
    f"{units.counted(machine['devices'], 'device')}: {machine['device']}, hosts: {machine['hosts']}; "
    f"{machine['processor']}, {machine['cores']} cores"
  )
  if memory := report.get("memory_bytes_per_device"):
    yield f"a device has {units.memory(memory)} for programs"
  yield ", ".join(f"{name} {version}" for name, version in about["versions"].items())
  yield from (f"{name}={value}" for name, value in about["environment"].items())
  yield from (f"{name}: {described(model)}" for name, model in report["configs"].items())
  if report.get("note"):
    yield report["note"]


def described(model: Values) -> str:
  """Returns a config's model, batch and mesh in words."""
  mesh = " × ".join(f"{axis} {size}" for axis, size in model["mesh"].items())
  return (
    f"{model['parameters']:,} parameters, {model['n_layer']} layers of {model['n_embd']}, "
    f"{model['n_positions']:,} positions, {model['dtype']}, remat {model['remat']}; batch "
    f"{model['batch_size']}, {mesh}; {model['model_flops_per_step']:.3g} FLOPs a step"
  )


def _rows(part: Values) -> Iterator[tuple[str, ...]]:
  config, values = part["config"], part["values"]
  if part["state"] != "measured":
    yield f"{config}: {part['kind']}", "", "", "", f"{part['state']}: {part['reason']}"
  elif part["kind"] == "forecast":
    what = f"MFU by it {values['mfu']:.1%} on {values['topology']}"
    if (ratio := values["measured_over_forecast"]) is not None:
      what = f"measured: {ratio:.3g} times the forecast; {what}"
    if (needed := values["measured_bytes_per_device"]) is not None:
      what = f"{what}; memory measured: {units.memory(needed)}"
    yield f"{config}: forecast of the training step", seconds(values["step_seconds"]), "", "", what
  else:
    for what, *cells in benchmark_tables.rows(part["kind"], values):
      yield (f"{config}: {what}", *cells)


def _notes(part: Values) -> Iterator[str]:
  if part["state"] != "measured" or part["kind"] == "forecast":
    return
  for note in benchmark_tables.notes(part["kind"], part["values"]):
    yield f"- {part['config']}: {note.removeprefix('- ')}"
  yield from (f"- {part['config']}: {note}" for note in part["values"].get("notes", ()))
