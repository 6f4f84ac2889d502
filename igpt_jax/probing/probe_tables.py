"""What probes found, for people: the table, the verdict, accuracy against layer and against loss."""

import os
from typing import Any

from igpt_jax.probing import sets
from igpt_jax.reporting import figures, summary
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.workspace import watch

Row = dict[str, Any]  # name, kind, layer, validation_accuracy, test_accuracy, and how it was fitted

_RANDOM = "random weights"


def best_of(rows: list[Row], kind: str = "layer") -> Row:
  """The row of a kind with the best validation accuracy, the first such."""
  return max(
    (row for row in rows if row["kind"] == kind), key=lambda row: row["validation_accuracy"]
  )


def contenders(rows: list[Row]) -> dict[str, Row]:
  """The best layer, and the best of every baseline, by what a person calls them."""
  found = {f"layer {best_of(rows)['layer']}": best_of(rows)}
  for row in rows:
    if row["kind"] in (sets.PIXELS, sets.PCA, "layers"):
      found[row["name"]] = row
  if any(row["kind"] == sets.RANDOM for row in rows):
    best = best_of(rows, sets.RANDOM)
    found[f"{_RANDOM} (layer {best['layer']})"] = best
  return found


def verdict(rows: list[Row]) -> str:
  """Who is best on test, in words, whoever it is."""
  order = sorted(contenders(rows).items(), key=lambda item: -item[1]["test_accuracy"])
  said = [f"{name} {row['test_accuracy']:.2%}" for name, row in order]
  return f"test accuracy: {said[0]}" + "".join(f" > {each}" for each in said[1:])


def table(rows: list[Row]) -> str:
  """Markdown: a row per feature set; the chosen layer is starred."""
  fitted = {"strength": "C", "learning_rate": "learning rate"}
  by = next(name for name in fitted if name in rows[0])
  best = best_of(rows)
  cells = [
    (
      row["name"] + (" *" if row is best else ""), f"{row[by]:g}", f"{row['validation_accuracy']:.2%}",
      f"{row['test_accuracy']:.2%}" + ("" if row.get("converged", True) else " (not converged)"),
    )
    for row in rows
  ]  # fmt: skip
  return markdown_table("lrrr", ("features", fitted[by], "validation", "test"), cells)


def curve(rows: list[Row], kind: str = "layer") -> tuple[list[int], list[float]]:
  """(layers, their test accuracy)."""
  found = [(row["layer"], row["test_accuracy"]) for row in rows if row["kind"] == kind]
  return [layer for layer, _ in found], [accuracy for _, accuracy in found]


def levels(rows: list[Row]) -> dict[str, float]:
  """Baselines that have no layers, and layers side by side."""
  kinds = (sets.PIXELS, sets.PCA, "layers")
  return {row["name"]: row["test_accuracy"] for row in rows if row["kind"] in kinds}


def draw(path: str, values: dict[str, Any]) -> None:
  """Accuracy against layer (the paper's figure 2)."""
  rows = values["rows"]
  curves = {"trained": curve(rows)}
  if curve(rows, sets.RANDOM)[0]:
    curves[_RANDOM] = curve(rows, sets.RANDOM)
  figures.plot(
    path,
    curves,
    title=f"Linear probe, {values['n_layer']} layers, step {values['step']:,}",
    x_label="layer",
    y_label="test accuracy",
    levels=levels(rows),
    whole_steps=True,
  )


def compare_checkpoints(workdir: str, made_from: watch.MadeFrom) -> None:
  """Figures 2 and 3 of the paper over the checkpoints that were probed: accuracy against layer for
  each, and against the validation loss. Writes probe_checkpoints.{json,png} and probe_loss.png.

  Args:
    workdir: of the job.
    made_from: by `watch`; results of another run or other settings are left out.
  """
  found = _probed(workdir, made_from)
  if len(found) < 2:
    return
  shown = found if len(found) <= 6 else [found[i * (len(found) - 1) // 5] for i in range(6)]
  curves = {
    f"step {values['step']:,}, {values['validation_nats_per_token']:.3f} nats": curve(
      values["rows"]
    )
    for values in shown
  }
  figures.plot(
    os.path.join(workdir, "probe_checkpoints.png"),
    curves,
    title="Linear probe against layer, as training goes on",
    x_label="layer",
    y_label="test accuracy",
    levels=levels(found[-1]["rows"]),
    whole_steps=True,
  )
  nats = [values["validation_nats_per_token"] for values in found]
  figures.plot(
    os.path.join(workdir, "probe_loss.png"),
    {
      "best layer": (nats, [values["test_accuracy"] for values in found]),
      "last layer": (nats, [curve(values["rows"])[1][-1] for values in found]),
    },
    title="Linear probe against validation loss, as training goes on",
    x_label="validation loss, nats per token (better to the right)",
    y_label="test accuracy",
    markers=True,
    reverse_x=True,
  )
  kept = (
    "step", "validation_nats_per_token", "best_layer", "validation_accuracy", "test_accuracy"
  )  # fmt: skip
  summary.write_json(
    os.path.join(workdir, "probe_checkpoints.json"),
    {
      "data": found[-1]["data"],
      "checkpoints": [
        {**{name: values[name] for name in kept}, "accuracy_of_layers": curve(values["rows"])}
        for values in found
      ],
    },
  )


def _probed(workdir: str, made_from: watch.MadeFrom) -> list[dict[str, Any]]:
  """What was found for each checkpoint of this run with these settings, by step."""
  folder = os.path.join(workdir, "probe")
  names = os.listdir(folder) if os.path.isdir(folder) else []
  found = []
  for step in sorted(int(name) for name in names if name.isdigit()):
    values = watch.results_like(os.path.join(folder, str(step)), "probe.json", made_from)
    if values is not None:
      found.append(values)
  return found
