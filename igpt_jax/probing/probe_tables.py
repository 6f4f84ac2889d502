"""Reports of probes: the table, the verdict, accuracy against layer and against loss."""

import os
from collections.abc import Sequence
from typing import Any

from igpt_jax import files
from igpt_jax.probing import sets
from igpt_jax.reporting import figures, plots, summary
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.workspace import watch

Row = dict[str, Any]  # name, kind, layer, validation_accuracy, test_accuracy, and how it was fitted

_RANDOM = "random weights"
_UNLAYERED = (sets.PIXELS, sets.PCA, "layers")


def name_of(pooling: str) -> str:
  """The name of a result's files and folder: results of all poolings lie beside each other."""
  return "probe" if pooling == "mean" else f"probe_{pooling}"


def title_of(values: dict[str, Any]) -> str:
  """What a result is of; results older than attentive pooling are of means."""
  return "Linear probe" if values.get("pooling", "mean") == "mean" else "Attentive probe"


def in_words(values: dict[str, Any]) -> str:
  """One line: how features were pooled and classifiers fitted."""
  if values["pooling"] == "mean":
    return f"pooling: mean over positions; linear classifiers by {values['method']}"
  return (
    f"pooling: attentive, one learned query with {values['heads']} heads for each layer; by "
    f"{values['method']}; raw pixels and their principal components have linear classifiers"
  )


def best_of(rows: list[Row], kind: str = "layer") -> Row:
  """The first row of a kind with the best validation accuracy."""
  rows = [row for row in rows if row["kind"] == kind]
  return max(rows, key=lambda row: row["validation_accuracy"])


def contenders(rows: list[Row]) -> dict[str, Row]:
  """The best layer, and the best row of every baseline, by name."""
  best = best_of(rows)
  by_name = {f"layer {best['layer']}": best}
  by_name |= {row["name"]: row for row in rows if row["kind"] in _UNLAYERED}
  if any(row["kind"] == sets.RANDOM for row in rows):
    best = best_of(rows, sets.RANDOM)
    by_name[f"{_RANDOM} (layer {best['layer']})"] = best
  return by_name


def verdict(rows: list[Row]) -> str:
  """One line: the contenders by test accuracy, best first."""
  order = sorted(contenders(rows).items(), key=lambda item: -item[1]["test_accuracy"])
  return "test accuracy: " + " > ".join(f"{name} {row['test_accuracy']:.2%}" for name, row in order)


def table(rows: list[Row]) -> str:
  """Markdown table with a row per feature set; the chosen layer is starred."""
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
  """Returns (layers, their test accuracies) of one kind."""
  rows = [row for row in rows if row["kind"] == kind]
  return [row["layer"] for row in rows], [row["test_accuracy"] for row in rows]


def levels(rows: list[Row]) -> dict[str, float]:
  """Test accuracies by name of baselines without layers, and of concatenated layers."""
  return {row["name"]: row["test_accuracy"] for row in rows if row["kind"] in _UNLAYERED}


def draw(path: str, values: dict[str, Any]) -> None:
  """Plots accuracy against layer (the paper's figure 2)."""
  rows = values["rows"]
  curves = {"trained": plots.Curve(*curve(rows))}
  if curve(rows, sets.RANDOM)[0]:
    curves[_RANDOM] = plots.Curve(*curve(rows, sets.RANDOM))
  name = figures.checkpoint_name(values["checkpoint"], values["step"])
  _plot(
    path, curves, values, title=f"{title_of(values)} of every layer, {name}", chosen=[values],
    x_label="layer", whole_steps=True,
  )  # fmt: skip


def _plot(
  path: str,
  curves: dict[str, plots.Curve],
  last: dict[str, Any],
  chosen: Sequence[dict[str, Any]] = (),
  **texts: Any,
) -> None:
  """Plots test accuracies beside the baselines of the results `last`.

  The layers that the results `chosen` chose are marked; `texts` are for `plots.plot`.
  """
  layers = [values["best_layer"] for values in chosen]
  accuracies = [values["test_accuracy"] for values in chosen]
  images = last.get("test_images", 0)  # older results don't have it
  panel = plots.Panel(
    curves=curves,
    y_label="test accuracy",
    levels=levels(last["rows"]),
    chosen=("layer chosen on validation", layers, accuracies) if chosen else None,
    accuracy=True,
    images=images,
    classes=last.get("classes", 0),
    ordered=len(curves) > 2,
  )
  note = f"bars and ±: standard error of an accuracy on {images:,} test images" if images else ""
  plots.plot(path, panel, note=note, **texts)


def compare_checkpoints(workdir: str, name: str, made_from: watch.MadeFrom) -> None:
  """Plots the paper's figures 2 and 3 over all probed checkpoints: accuracy against layer and loss.

  Writes NAME_checkpoints.{json,png} and NAME_loss.png.

  Args:
    workdir: workdir of the job.
    name: of the results' files and folder, by `name_of`.
    made_from: as returned by `watch.run`; results of another run or other settings are left out.
  """
  probed = _probed(workdir, name, made_from)
  if len(probed) < 2:
    return
  shown = probed if len(probed) <= 6 else [probed[i * (len(probed) - 1) // 5] for i in range(6)]
  curves = {}
  for values in shown:
    nats = values["validation_nats_per_token"]
    label = f"step {values['step']:,}, validation loss {nats:.3f} nats"
    curves[label] = plots.Curve(*curve(values["rows"]))
  _plot(
    os.path.join(workdir, f"{name}_checkpoints.png"), curves, probed[-1], shown,
    title=f"{title_of(probed[-1])} of every layer, as training goes on", x_label="layer", whole_steps=True,
  )  # fmt: skip
  nats = [values["validation_nats_per_token"] for values in probed]
  of_layers = {
    "layer chosen on validation": [values["test_accuracy"] for values in probed],
    "last layer": [curve(values["rows"])[1][-1] for values in probed],
  }
  _plot(
    os.path.join(workdir, f"{name}_loss.png"),
    {name: plots.Curve(nats, accuracies) for name, accuracies in of_layers.items()},
    probed[-1],
    title=f"{title_of(probed[-1])} against validation loss, as training goes on",
    x_label="validation loss, nats per token (better to the right)",
    reverse_x=True,
  )
  kept = (
    "step", "validation_nats_per_token", "best_layer", "validation_accuracy", "test_accuracy"
  )  # fmt: skip
  checkpoints = [
    {**{name: values[name] for name in kept}, "accuracy_of_layers": curve(values["rows"])}
    for values in probed
  ]
  path = os.path.join(workdir, f"{name}_checkpoints.json")
  summary.write_json(path, {"data": probed[-1]["data"], "checkpoints": checkpoints})


def _probed(workdir: str, name: str, made_from: watch.MadeFrom) -> list[dict[str, Any]]:
  """Results of this run's checkpoints with these settings, by step."""
  folder = os.path.join(workdir, name)
  results = (
    watch.results_like(os.path.join(folder, str(step)), f"{name}.json", made_from)
    for step in sorted(int(each) for each in files.names(folder) if each.isdigit())
  )
  return [values for values in results if values is not None]
