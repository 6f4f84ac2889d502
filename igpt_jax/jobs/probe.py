"""Probe: fits a classifier to the features of every layer and to baselines.

Writes probe.json, probe.md (the table) and probe.png (accuracy against layer, the paper's figure 2); with
attentive pooling probe_attentive.*, beside them. The layer is chosen on validation; test is evaluated
once per row, after all choices. With `watch`, every checkpoint of a run is probed, and two more images
compare them (probing/probe_tables.py).
"""

import dataclasses
import functools
import os
from typing import Any

from jax.sharding import Mesh

from igpt_jax import files
from igpt_jax.config.fields import Settings
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.probing import bucket_stores, probe_tables, sgd_run
from igpt_jax.probing import sets as sets_lib
from igpt_jax.probing.attentive import heads_of
from igpt_jax.probing.sets import Source
from igpt_jax.reporting import progress, summary
from igpt_jax.workspace import likelihood, provenance, watch

_LBFGS_UP_TO = 200_000  # training images

# Settings of one pooling, which decide nothing of the other's results.
_OF_ATTENTIVE = ("probe.heads", "probe.attention_rates", "probe.epochs")
_OF_LINEAR = ("probe.learning_rates", "probe.steps", "probe.max_iterations")


def run(settings: Settings, workdir: str, mesh: Mesh | None = None) -> None:
  """Probes `checkpoint` (or the workdir's newest) on the configured data."""
  check(settings)
  one = functools.partial(probe, mesh=mesh)
  name = probe_tables.name_of(settings.probe.pooling)
  made_from = watch.run(settings, workdir, f"{name}.json", one, depends_on, folder=name)
  if made_from is not None and hosts.is_main():
    probe_tables.compare_checkpoints(workdir, name, made_from)


def depends_on(settings: Settings) -> dict[str, Any]:
  """Everything that determines the result, except the checkpoint."""
  linear = settings.probe.pooling == "mean"
  of_others = _OF_ATTENTIVE if linear else _OF_LINEAR
  return {
    "data": provenance.of_data(settings.data, sets_lib.SPLITS),
    **provenance.of_settings(
      settings, ["features", "probe", "train.eval_images", "seed"],
      without=[
        "features.batch_size", "features.cache", "probe.cached", "probe.eval_every", *of_others
      ],
    ),
  }  # fmt: skip


def check(settings: Settings) -> None:
  """Raises UserError for settings that contradict each other."""
  if settings.watch and settings.features.cache:
    raise UserError(
      f"config.features.cache: {settings.features.cache} is for one checkpoint; config.watch probes several; "
      "fix: leave one of them out"
    )
  probe = settings.probe
  if probe.pooling == "mean":
    return
  for name, value, expected in (
    ("features.grid", settings.features.grid, 1),
    ("probe.method", probe.method, ""),
    ("probe.concatenate", probe.concatenate, ()),
    ("probe.around_best", probe.around_best, 0),
  ):
    if value != expected:
      raise UserError(
        f"config.{name}: {value!r} is for linear classifiers of mean features; config.probe.pooling is "
        f"{probe.pooling!r}; expected {expected!r}"
      )


def check_concatenated(settings: Settings, layers: tuple[int, ...]) -> None:
  """Raises UserError if a layer is to be concatenated that isn't one of these, the computed ones."""
  for layer in settings.probe.concatenate:
    if layer not in layers:
      raise UserError(
        f"config.probe.concatenate: layer {layer}; expected some of {', '.join(map(str, layers))}"
      )


def probe(settings: Settings, workdir: str, out: str, mesh: Mesh | None = None) -> None:
  """Probes one checkpoint; features are stored in `workdir`, results go to `out`."""
  source = sets_lib.open_source(
    settings, workdir, mesh, lambda _, features: check_concatenated(settings, features.layers)
  )
  features_folder = sets_lib.folder_of(settings, workdir, source)
  own_features = not bucket_stores.exists(features_folder)
  pooling, heads = settings.probe.pooling, None
  method = settings.probe.method or ("lbfgs" if source.rows("train") <= _LBFGS_UP_TO else "sgd")
  if pooling == "attentive":
    model = source.trained.config
    method, heads = "adamw", heads_of(settings.probe.heads, model.n_embd, model.n_head)
  images = f"{source.rows('train'):,} training images of {source.n_classes} classes"
  say(f"probe: {pooling} pooling, {method}, {images}")
  nats = validation_loss(settings, source)
  if method != "lbfgs":
    rows = sgd_run.run(settings, workdir, out, source)
  else:
    rows = by_lbfgs(settings, workdir, source)
  if not hosts.is_main():
    return
  trained = source.trained
  best = probe_tables.best_of(rows)
  pixels = next((row for row in rows if row["kind"] == sets_lib.PIXELS), None)
  values = {
    "checkpoint": trained.path,
    "step": trained.step,
    "parameters": source.checksum,
    "method": method,
    "pooling": pooling,
    "heads": heads,
    "data": {name: split.fingerprint for name, split in source.splits.items()},
    "train_images": source.rows("train"),
    "test_images": source.rows("test"),
    "classes": source.n_classes,
    "n_layer": trained.config.n_layer,
    "objective": trained.run["objective"],
    "validation_nats_per_token": nats,
    "best_layer": best["layer"],
    "validation_accuracy": best["validation_accuracy"],
    "test_accuracy": best["test_accuracy"],
    "pixels_test_accuracy": pixels and pixels["test_accuracy"],
    "verdict": probe_tables.verdict(rows),
    "rows": rows,
  }
  name = probe_tables.name_of(pooling)
  text = f"{probe_tables.table(rows)}\n{probe_tables.in_words(values)}\n"
  summary.write_text(os.path.join(out, f"{name}.md"), text)
  probe_tables.draw(os.path.join(out, f"{name}.png"), values)
  summary.write_json(os.path.join(out, f"{name}.json"), values)
  summary.write_summary(out)
  # Every checkpoint's features together would fill the disk.
  if settings.watch and own_features:
    bucket_stores.forget(features_folder)
  say(text.rstrip())
  say(values["verdict"])


def validation_loss(settings: Settings, source: Source) -> float:
  """Evaluates the checkpoint's nats per token on the probe's validation images."""
  return likelihood.nats_per_token(
    source.trained,
    source.splits["validation"],
    settings.data,
    source.mesh,
    batch_size=settings.features.batch_size,
    images=settings.train.eval_images,
  )


def by_lbfgs(settings: Settings, workdir: str, source: Source) -> list[dict[str, Any]]:
  """Fits logistic regression to every set of features; returns rows of the table, as JSON."""
  baselines = _Baselines(settings, workdir, source)
  rows = baselines.rows()
  if rows:
    say("baselines: fitted before, for this data and architecture")
    source = dataclasses.replace(source, baselines=())
  sets = sets_lib.extract(settings, workdir, source)
  if settings.probe.concatenate:
    sets.append(sets_lib.side_by_side(sets, tuple(settings.probe.concatenate)))
  if not hosts.is_main():
    return []
  clock = progress.Countdown("probes", len(sets), say)
  most = settings.probe.max_iterations
  for done, features in enumerate(sets, 1):
    rows.append(sets_lib.fit(features, source, most))
    clock.tick(done)
  if source.baselines:
    baselines.keep([row for row in rows if row["kind"] in sets_lib.BASELINES])
  if settings.probe.around_best:
    best = probe_tables.best_of(rows)["layer"]
    layers = around(best, source.features.layers, settings.probe.around_best)
    rows.append(sets_lib.fit(sets_lib.side_by_side(sets, layers), source, most))
  return rows


def around(best: int, layers: tuple[int, ...], count: int) -> tuple[int, ...]:
  """Returns `count` consecutive layers with the best as near their middle as possible."""
  count = min(count, len(layers))
  first = min(max(layers.index(best) - count // 2, 0), len(layers) - count)
  return layers[first : first + count]


class _Baselines:
  """Stored rows of the baselines, which are the same for all checkpoints of a run."""

  def __init__(self, settings: Settings, workdir: str, source: Source):
    of_model = dataclasses.asdict(source.trained.config)
    self._depends_on = {
      # Random weights have a fixed seed, so that the architecture determines them.
      "model": {k: v for k, v in of_model.items() if k not in ("attention", "remat")},
      "features_of": {
        name: sets_lib.identity_of(settings, source, name, "") for name in source.splits
      },
      "rows": {name: source.rows(name) for name in source.splits},
      "layers": list(source.features.layers),
      "baselines": list(source.baselines),
      "max_iterations": settings.probe.max_iterations,
      "pca": sets_lib.PCA_VERSION,
    }
    self._path = os.path.join(workdir, "probe", "baselines.json")

  def rows(self) -> list[dict[str, Any]]:
    """Reads the stored rows; [] if there are none for these settings."""
    try:
      kept = files.read_json(self._path)
    except FileNotFoundError:
      return []
    except ValueError as error:
      say(f"baselines: {self._path} is damaged ({error}): fitted again")
      return []
    same = not files.differing(kept.get("depends_on"), self._depends_on)
    return kept.get("rows", []) if same else []

  def keep(self, rows: list[dict[str, Any]]) -> None:
    files.make_folder(os.path.dirname(self._path))
    summary.write_json(self._path, {"depends_on": self._depends_on, "rows": rows})
