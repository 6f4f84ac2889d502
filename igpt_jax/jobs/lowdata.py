"""Linear probe with few labels: 1, 4, 25, … per class, five random subsets of each size.

Writes lowdata.json, lowdata.md and lowdata.png (accuracy against labels per class). Classifiers are
fitted to the subset's labels alone; layer and strength of the regularisation are chosen on validation,
which the paper doesn't specify; test is evaluated after all choices.
"""

import collections
import contextlib
import dataclasses
import math
import os

import numpy as np

from igpt_jax.config.fields import Settings
from igpt_jax.data.image_decoding import BadRecord
from igpt_jax.data.sources import Split
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.probing import linear
from igpt_jax.probing import sets as sets_lib
from igpt_jax.probing.linear import FewLabelsResult
from igpt_jax.probing.sets import FeatureSet
from igpt_jax.reporting import figures, plots, progress, summary
from igpt_jax.reporting.tables import markdown_table

_OURS = "best layer"
_COUNTED = 100_000  # images whose labels are counted first; more may have to be read from far away, one by one


def run(settings: Settings, workdir: str) -> None:
  """Fits to few labels, on features of `checkpoint` (or the workdir's newest)."""
  if settings.probe.pooling != "mean":
    say(
      f"few labels: linear classifiers of mean features; config.probe.pooling={settings.probe.pooling} is "
      "for job probe"
    )
  source = sets_lib.open_source(
    settings, workdir, check=lambda splits, _: check_enough(settings, splits["train"])
  )
  sets = sets_lib.extract(settings, workdir, source)
  if not hosts.is_main():
    return
  labels = sets[0].parts()[0][1]
  # All sets of features are fitted to the same subsets, drawn before anything is fitted.
  subsets = {n: draw(settings, labels, n) for n in settings.lowdata.labels_per_class}
  clock = progress.Countdown("few labels", len(sets), say)
  results: dict[str, dict[int, FewLabelsResult]] = {}
  for done, features in enumerate(sets, 1):
    with progress.doing(f"few labels: {features.name}", say, after=3.0):
      parts = features.parts()
      results[features.name] = {
        n: linear.few_labels(
          *parts, drawn, n_classes=source.n_classes, max_iterations=settings.probe.max_iterations
        )
        for n, drawn in subsets.items()
      }
    clock.tick(done)

  chosen = choose(sets, results)
  trained = source.trained
  trials = settings.lowdata.trials
  values = {
    "checkpoint": trained.path,
    "step": trained.step,
    "parameters": source.checksum,
    "data": {name: split.fingerprint for name, split in source.splits.items()},
    "trials": trials,
    "seed": settings.seed,
    "chosen": {
      label: {
        str(n): {"set": name, **dataclasses.asdict(results[name][n])} for n, name in of.items()
      }
      for label, of in chosen.items()
    },
    "sets": {
      name: {str(n): dataclasses.asdict(result) for n, result in of.items()}
      for name, of in results.items()
    },
    "verdict": verdict(chosen, results),
  }
  summary.write_json(os.path.join(workdir, "lowdata.json"), values)
  text = table(chosen, results)
  if trials > 1:
    text += f"\n±: standard deviation over {trials} random subsets of the labels\n"
  summary.write_text(os.path.join(workdir, "lowdata.md"), text)
  curves = {}
  for label, of in chosen.items():
    best = [results[name][n] for n, name in of.items()]
    curves[label] = plots.Curve(
      list(of),
      [result.test_accuracy for result in best],
      [result.test_std / math.sqrt(trials) for result in best],
    )
  plots.plot(
    os.path.join(workdir, "lowdata.png"),
    plots.Panel(curves=curves, y_label="test accuracy", accuracy=True, classes=source.n_classes),
    title=f"Linear probe with few labels, {figures.checkpoint_name(trained.path, trained.step)}",
    note=(
      f"means over {trials} random subsets of the labels; bars: their standard error"
      if trials > 1
      else "one random subset of the labels"
    ),
    x_label="labels per class",
    x_ticks=tuple(settings.lowdata.labels_per_class),
  )
  summary.write_summary(workdir)
  say(text.rstrip())
  say(values["verdict"])


def check_enough(settings: Settings, train: Split) -> None:
  """Raises UserError if a class has fewer of the training images that are used than labels are wanted.

  Beyond `_COUNTED` images that is told once their features are there.
  """
  most, counts = max(settings.lowdata.labels_per_class), collections.Counter()
  used, enough = min(len(train), settings.features.images or len(train)), 0
  if used > _COUNTED:
    return
  with progress.doing("few labels: counting those of each class", say, after=3.0):
    for i in range(used):
      with contextlib.suppress(BadRecord):
        if (label := train.label(i)) >= 0:
          counts[label] += 1
          enough += counts[label] == most
      if enough == train.n_classes:
        return
  label, count = min(counts.items(), key=lambda item: item[1], default=(0, most))
  if count < most:
    raise UserError(
      f"config.lowdata.labels_per_class: {most}; class {train.class_names[label]} has {count} of the "
      f"{used:,} training images that are used (features.images); expected at most {count}"
    )


def draw(settings: Settings, labels: np.ndarray, per_class: int) -> list[np.ndarray]:
  """Draws the subsets of one size, independently of other sizes."""
  rng = np.random.default_rng((settings.seed, per_class))
  try:
    return [linear.balanced_subset(labels, per_class, rng) for _ in range(settings.lowdata.trials)]
  except ValueError as error:
    raise UserError(
      f"config.lowdata.labels_per_class: {per_class}; expected that many of each class: {error}"
    ) from None


def choose(
  sets: list[FeatureSet], results: dict[str, dict[int, FewLabelsResult]]
) -> dict[str, dict[int, str]]:
  """Returns the set with the best validation accuracy, for every curve and number of labels."""
  titles = {"layer": _OURS, sets_lib.RANDOM: "random weights, best layer"}
  curves: dict[str, list[str]] = {_OURS: []}
  for features in sets:
    curves.setdefault(titles.get(features.kind, features.name), []).append(features.name)
  return {
    curve: {
      n: max(names, key=lambda name: results[name][n].validation_accuracy)
      for n in results[names[0]]
    }
    for curve, names in curves.items()
  }


def verdict(chosen, results) -> str:
  """One line: the best curve at each number of labels."""
  winners = []
  for n in chosen[_OURS]:
    accuracy = {curve: results[of[n]][n].test_accuracy for curve, of in chosen.items()}
    best = max(accuracy, key=accuracy.__getitem__)
    winners.append(f"{n}: {best} {accuracy[best]:.2%}")
  return "best with so many labels per class: " + "; ".join(winners)


def table(chosen, results) -> str:
  """Markdown table with a row per number of labels, and a column per curve."""

  def cell(n: int, name: str) -> str:
    result = results[name][n]
    which = f" ({name.removeprefix('random weights, ')})" if "layer" in name else ""
    return f"{result.test_accuracy:.2%} ± {result.test_std:.2%}{which}"

  rows = [(n, *(cell(n, of[n]) for of in chosen.values())) for n in chosen[_OURS]]
  return markdown_table("r" + "l" * len(chosen), ("labels per class", *chosen), rows)
