"""What the features are worth: a linear classifier at every layer, beside one on raw pixels.

Writes probe.json, probe.md (the table) and probe.png (accuracy against layer, the paper's figure 2).
The layer is chosen on validation; test is looked at once per layer, with everything chosen.
"""

import dataclasses
import os

import numpy as np
from ml_collections import ConfigDict

from igpt_jax import config as config_lib
from igpt_jax import metrics, pictures, report
from igpt_jax.data.sources import Split, open_split
from igpt_jax.errors import UserError
from igpt_jax.jobs import common
from igpt_jax.jobs.common import say
from igpt_jax.parallel import sharding
from igpt_jax.training import linear_probe
from igpt_jax.training.features import FeatureExtractor, LabelledFeatures

PIXELS = "raw pixels"
SPLITS = ("train", "validation", "test")


def run(config: ConfigDict, workdir: str) -> None:
  """Probes `checkpoint` (or the workdir's newest) on the configured data."""
  common.open_workdir(workdir)
  mesh = common.mesh_of(config)
  batch_size = config.probe.batch_size
  sharding.batch_size_per_shard(mesh, batch_size, "probe.batch_size")
  data_config = config_lib.data(config)
  splits = {name: open_split(data_config, name) for name in SPLITS}
  for split in splits.values():
    check_labels(split)
  trained = common.load_model(config, workdir, mesh, needs_palette=True)
  palette = common.palette_of(trained)
  extractor = FeatureExtractor(trained.config, mesh)

  def features_of(name: str) -> LabelledFeatures:
    split = splits[name]
    limit = config.probe.images if name == "train" else 0
    total = min(len(split), limit or len(split))
    clock = metrics.Countdown(f"features of {name}", total, say)
    with common.eval_stream(split, data_config, palette, mesh, batch_size, limit) as batches:
      return extractor(trained.params, batches, report=clock.tick)

  found = {name: features_of(name) for name in SPLITS}
  if not common.is_main():
    return
  n_layer = trained.config.n_layer
  sets = {PIXELS: [(raw_pixels(found[name], palette), found[name].labels) for name in SPLITS]}
  for layer in range(n_layer + 1):
    sets[str(layer)] = [(found[name].features[layer], found[name].labels) for name in SPLITS]

  iterations = config.probe.max_iterations
  clock = metrics.Countdown("probes", len(sets), say)
  full = {}
  for name, parts in sets.items():
    full[name] = linear_probe.probe(*parts, max_iterations=iterations)
    clock.tick(len(full))
  few = {
    per_class: few_labels(config, sets, per_class) for per_class in config.probe.labels_per_class
  }
  best = best_layer(full)
  values = {
    "checkpoint": trained.path,
    "step": trained.step,
    "data": {name: split.fingerprint for name, split in splits.items()},
    "best_layer": int(best),
    "validation_accuracy": full[best].validation_accuracy,
    "test_accuracy": full[best].test_accuracy,
    "pixels_test_accuracy": full[PIXELS].test_accuracy,
    "verdict": verdict("all labels", full[best].test_accuracy, full[PIXELS].test_accuracy),
    "layers": {name: dataclasses.asdict(result) for name, result in full.items()},
    "few_labels": {
      str(per_class): {name: dataclasses.asdict(result) for name, result in results.items()}
      for per_class, results in few.items()
    },
  }
  verdicts = [
    verdict(
      f"{per_class} labels per class",
      results[best_layer(results)].test_accuracy,
      results[PIXELS].test_accuracy,
    )
    for per_class, results in few.items()
  ]
  values["few_labels_verdict"] = "; ".join(verdicts) or None
  report.write_json(os.path.join(workdir, "probe.json"), values)
  text = table(full, few)
  report.write_text(os.path.join(workdir, "probe.md"), text)
  curves = {"all labels": curve(full, n_layer)}
  levels = {f"{PIXELS}, all labels": full[PIXELS].test_accuracy}
  for per_class, results in few.items():
    curves[f"{per_class} labels per class"] = curve(results, n_layer)
    levels[f"{PIXELS}, {per_class} per class"] = results[PIXELS].test_accuracy
  pictures.plot(
    os.path.join(workdir, "probe.png"),
    curves,
    title=f"Linear probe, {trained.config.n_layer} layers, step {trained.step:,}",
    x_label="layer",
    y_label="test accuracy",
    levels=levels,
    whole_steps=True,
  )
  report.write_summary(workdir)
  say(text.rstrip())
  say("\n".join([values["verdict"], *verdicts]))


def check_labels(split: Split) -> None:
  """Raises UserError when there is nothing to classify."""
  if split.n_classes < 2:
    raise UserError(
      f"data.name: {split.fingerprint} has no labels; a probe needs at least two classes; "
      "fix: a labelled data set, or a folder with one sub-folder per class"
    )


def raw_pixels(found: LabelledFeatures, palette) -> np.ndarray:
  """Colours as the model sees them, [N, T·3] in [-1, 1]."""
  return palette.centers[found.tokens].reshape(len(found.tokens), -1)


def few_labels(config: ConfigDict, sets: dict, per_class: int) -> dict:
  """Every feature set on the same random subsets."""
  labels = sets[PIXELS][0][1]
  rng = np.random.default_rng(config.seed)
  try:
    subsets = [
      linear_probe.balanced_subset(labels, per_class, rng) for _ in range(config.probe.trials)
    ]
  except ValueError as error:
    raise UserError(f"probe.labels_per_class: {per_class}: {error}") from None
  return {
    name: linear_probe.few_labels(*parts, subsets, max_iterations=config.probe.max_iterations)
    for name, parts in sets.items()
  }


def best_layer(results: dict) -> str:
  """The layer with the best validation accuracy, the lowest such."""
  layers = [name for name in results if name != PIXELS]
  return max(layers, key=lambda name: (results[name].validation_accuracy, -int(name)))


def curve(results: dict, n_layer: int) -> tuple[list[int], list[float]]:
  layers = list(range(n_layer + 1))
  return layers, [results[str(layer)].test_accuracy for layer in layers]


def verdict(setting: str, features: float, pixels: float) -> str:
  """Who wins, in words, whoever it is."""
  if round(features, 4) == round(pixels, 4):
    return f"{setting}: features and raw pixels are even at {features:.2%}"
  winner, better, worse = (
    ("features", features, pixels) if features > pixels else (PIXELS, pixels, features)
  )
  return f"{setting}: {winner} win, {better:.2%} to {worse:.2%}"


def table(full: dict, few: dict) -> str:
  """Markdown: a row per feature set; the chosen layer is starred."""
  head = ["features", "C", "validation", "test"]
  for per_class in few:
    head += [f"test, {per_class} labels per class"]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  best = best_layer(full)
  for name, result in full.items():
    label = name if name == PIXELS else f"layer {name}" + (" *" if name == best else "")
    row = [
      label,
      f"{result.strength:g}",
      f"{result.validation_accuracy:.2%}",
      f"{result.test_accuracy:.2%}" + ("" if result.converged else " (not converged)"),
    ]
    row += [f"{r[name].test_accuracy:.2%} ± {r[name].test_std:.2%}" for r in few.values()]
    lines.append("| " + " | ".join(row) + " |")
  return "\n".join(lines) + "\n"
