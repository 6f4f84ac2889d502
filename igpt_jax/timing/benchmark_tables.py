"""The benchmark job's results as Markdown: a heading, a table, notes."""

import math
from collections.abc import Iterator
from typing import Any

from igpt_jax import units
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.tokens import TokenSpec

Values = dict[str, Any]

# Of a timing its number of repetitions, and of calls in each.
HEAD = ("what", "median", "fastest to slowest", "times", "that is")
SIDES = "lrlrl"


def heading(results: Values) -> str:
  """Returns lines on the machine, the versions and the model."""
  machine, model = results["machine"], results["model"]
  lines = [
    f"{machine['mesh']}; {machine['processor']}, {machine['cores']} cores, hosts: {machine['hosts']}",
    ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    f"{results['objective']}: {model['n_layer']} layers, {model['n_head']} heads, width "
    f"{model['n_embd']}, {results['parameters']:,} parameters, {model['n_positions']} positions of "
    f"{TokenSpec(model['token_kind'], model['n_vocab']).values}, {model['dtype']}, remat {model['remat']}",
  ]
  return "\n".join(filter(None, [*lines, results["note"]]))


def as_markdown(results: Values) -> str:
  """Returns the whole report."""
  parts = [part for part in _ROWS if part in results]
  table = markdown_table(SIDES, HEAD, [row for part in parts for row in rows(part, results[part])])
  lines = ["# Benchmark", "", *(f"- {line}" for line in heading(results).split("\n")), "", table]
  lines += [note for part in parts for note in notes(part, results[part])]
  lines += [f"- {part}: skipped: {reason}" for part, reason in results["skipped"].items()]
  return "\n".join(lines) + "\n"


def rows(part: str, values: Values) -> Iterator[tuple[str, ...]]:
  """Yields a part's rows of the table, cells as in HEAD."""
  for what, times, meaning in _ROWS[part](values):
    spread = f"{seconds(times['fastest'])} to {seconds(times['slowest'])}"
    calls = f" × {times['calls']}" if times["calls"] > 1 else ""
    yield what, seconds(times["seconds"]), spread, f"{times['repeats']}{calls}", meaning


def notes(part: str, values: Values) -> Iterator[str]:
  """Yields the lines below the table that a part has."""
  yield from _NOTES[part](values)


def _training_rows(part: Values):
  mfu = "" if part["mfu"] is None else f", {part['mfu']:.1%} of the public peak (MFU)"
  speed = (
    f"{part['images_per_second']:,.2f} images/s, {part['tokens_per_second']:,.0f} tokens/s, "
    f"{part['tflops_per_second']:,.3f} TFLOP/s{mfu}, {part['share_of_matmul']:.1%} of the matmul below"
  )
  yield f"training step, batch {part['batch_size']}", part["step"], speed
  speed = f"{part['matmul_tflops_per_second']:,.3f} TFLOP/s"
  yield "large matmul, every device", part["matmul"], speed


def _training_notes(part: Values):
  memory = part["memory_per_device"]
  if memory is not None:
    # Donated buffers are arguments and outputs: count them once.
    held = units.memory(memory["argument"] + memory["output"] - memory["alias"])
    temporary = units.memory(memory["temp"])
    yield f"- training: {held} held and {temporary} to work in per device, as compiled"
  if part["peak_bytes_per_device"] is not None:
    yield f"- training: at most {units.memory(part['peak_bytes_per_device'])} in use on a device"


def _attention_rows(part: Values):
  for row in part["rows"]:
    chosen = " (auto)" if row["implementation"] == part["auto"] else ""
    for name, what in (("forward", "forward"), ("forward_and_backward", "forward and backward")):
      speed = f"{row[f'{name}_tflops_per_second']:,.3f} TFLOP/s"
      yield f"attention, {row['implementation']}{chosen}, {what}", row[name], speed


def _attention_notes(part: Values):
  yield (
    f"- attention: {part['pictures']} images of {part['length']} positions, {part['n_head']} heads of "
    f"{part['head_dim']}, {'causal' if part['causal'] else 'all positions'}, one device"
  )
  for name, reason in part["not_run"].items():
    yield f"- attention: {name} didn't run: {reason}"


def _sampling_rows(part: Values):
  speed = f"{part['samples_per_second']:,.3f} images/s, {part['tokens_per_second']:,.0f} tokens/s"
  several = math.prod(part["mesh"].values()) > 1
  on = ", " + " × ".join(f"{axis} {size}" for axis, size in part["mesh"].items()) if several else ""
  yield f"sampling {part['samples']} images{on}", part["all_samples"], speed


def _input_rows(part: Values):
  for row in part["stages"]:
    speed = f"{row['per_core_second']:,.0f} images per core-second"
    yield f"input, {row['stage']}, CPU time", row["cpu"], speed
  speed = f"{part['pictures_per_second']:,.0f} images/s on a host"
  yield f"input, whole ({part['pipeline']}), workers: {part['workers']}", part["picture"], speed
  per_core = part["images_per_core_second"]
  yield "input, whole, CPU time", part["picture_cpu"], f"{per_core:,.0f} images per core-second"


def _input_notes(part: Values):
  yield f"- input: {part['data']}, nothing cached, no training beside it"
  if part["times_training"] is not None:
    enough = "fast enough" if part["times_training"] > 1 else "TOO SLOW"
    yield f"- input: {part['times_training']:,.2f} times as fast as training on this machine: {enough}"


# Part of the results -> its rows (what, timing, meaning), and its notes.
_ROWS = {
  "training": _training_rows,
  "attention": _attention_rows,
  "sampling": _sampling_rows,
  "input": _input_rows,
}
_NOTES = {
  "training": _training_notes,
  "attention": _attention_notes,
  "sampling": lambda part: (),
  "input": _input_notes,
}


def seconds(value: float) -> str:
  """Formats a timing in seconds: 0.0123 as "12.3 ms"."""
  for unit, size in (("s", 1.0), ("ms", 1e-3)):
    if value >= size:
      return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value:,.0f} s"
  return f"{value / 1e-6:.3g} µs"
