"""The probe by gradient descent: all classifiers are trained at once, on images or stored features.

Linear ones by SGD are for large data sets, attentive ones (probing/attentive.py) by AdamW for any. Their
state is checkpointed in OUT/probe_sgd/DIGEST or OUT/probe_adamw/DIGEST, a digest of all that decides it, so
that the same command resumes, and another checkpoint's begins beside it; validation accuracy goes to
metrics.jsonl there. Learning rates are chosen on validation, per layer; test is evaluated once.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from igpt_jax import files
from igpt_jax.config.fields import Settings
from igpt_jax.errors import Stopped, UserError
from igpt_jax.parallel import sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.probing import attentive, feeds, sets, sgd
from igpt_jax.probing.feeds import LAYERS
from igpt_jax.probing.sets import PCA, PIXELS, RANDOM, Source
from igpt_jax.reporting import progress
from igpt_jax.runner.data_order import DataOrder
from igpt_jax.runner.loop import Through, Work
from igpt_jax.runner.run import TrainingRun
from igpt_jax.training.state import TrainState

_SHOWN = (
  ("probe_loss", "best classifier: loss {:.4f}"),
  ("accuracy", "accuracy {:.1%}"),
  ("validation_accuracy", "validation accuracy {:.2%}"),
)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How classifiers are trained."""

  method: str
  make_optimizer: Callable[[Sequence[float], int], optax.GradientTransformation]
  rates: tuple[float, ...]
  steps: int


def run(settings: Settings, workdir: str, out: str, source: Source) -> list[dict[str, Any]]:
  """Trains all classifiers; returns the rows of the table, as JSON."""
  if settings.probe.concatenate or settings.probe.around_best:
    raise UserError(
      "config.probe.concatenate, around_best: layers side by side are for method lbfgs; expected () and 0 "
      "with sgd; fix: config.probe.method=lbfgs"
    )
  probe = settings.probe
  sharding.batch_size_per_shard(source.mesh, probe.batch_size, "probe.batch_size")
  if probe.pooling == "attentive":
    source = feeds.by_position(source)
    steps = -(-probe.epochs * source.rows("train") // probe.batch_size)
    plan = _Plan("adamw", attentive.make_optimizer, probe.attention_rates, steps)
  else:
    plan = _Plan("sgd", sgd.make_optimizer, probe.learning_rates, probe.steps)
  identity = _identity_of(settings, plan, source)
  every, name = os.path.join(out, f"probe_{plan.method}"), files.digest(identity)
  folder = os.path.join(every, name)
  if others := sorted({*files.names(every)} - {name}):
    say(
      f"probe: kept in {folder}; {every} holds those of other checkpoints or settings, too, which may be removed: "
      f"{', '.join(others)}"
    )
  keeping: dict[str, Any] = {"keep": 1, "keep_every": 0}
  with TrainingRun(settings, folder, plan.steps, None, mesh=source.mesh, **keeping) as training:
    return _run(settings, workdir, folder, plan, source, training, identity)


def _identity_of(settings: Settings, plan: _Plan, source: Source) -> dict[str, Any]:
  """Returns everything that determines the classifiers; JSON."""
  return {
    "features_of": sets.identity_of(settings, source, "train", source.checksum),
    "random_weights": source.random_checksum if RANDOM in source.baselines else None,
    "pca": sets.PCA_VERSION if PCA in source.baselines else None,
    "images": source.rows("train"),
    "batch_size": settings.probe.batch_size,
    "seed": settings.seed,
    "learning_rates": [float(rate) for rate in plan.rates],
    "groups": {name: list(group) for name, group in feeds.groups_of(settings, source).items()},
    "steps": plan.steps,
    "layers": list(source.features.layers),
  }


def _run(
  settings: Settings,
  workdir: str,
  folder: str,
  plan: _Plan,
  source: Source,
  training: TrainingRun,
  identity: dict[str, Any],
) -> list[dict[str, Any]]:
  mesh = source.mesh
  batch_size = settings.probe.batch_size
  rates = tuple(float(rate) for rate in plan.rates)
  groups = feeds.groups_of(settings, source)
  order = DataOrder(folder, source.splits["train"], batch_size=batch_size, seed=settings.seed)
  feed = feeds.open_feed(settings, workdir, source)
  optimizer = plan.make_optimizer(rates, plan.steps)

  def fresh(frozen) -> TrainState:
    return sgd.make_state(groups, optimizer, len(rates), source.n_classes, frozen, settings.seed)

  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(fresh, feed.frozen)
    frozen_shardings = jax.tree.map(lambda leaf: leaf.sharding, feed.frozen)
    shardings = sgd.state_shardings(abstract, mesh, frozen_shardings)
    whole = jax.jit(fresh, out_shardings=shardings)(feed.frozen)
  saved = training.resume_or(
    lambda: _probes(whole), _probes(abstract), _probes(shardings), order.check
  )

  evaluate_step = jax.jit(
    sgd.make_eval_step(feed.extract, groups), out_shardings=sharding.replicated(mesh)
  )

  def accuracies(params, split: str, through: Through = iter) -> dict[str, np.ndarray]:
    """Accuracies of all classifiers, [R, F] for every group."""
    total: Any = None
    images = 0
    with jax.set_mesh(mesh):
      for batch in through(feed.rows_of(split)):
        correct, counted = jax.device_get(evaluate_step(params, sharding.put_batch(batch, mesh)))
        total = correct if total is None else jax.tree.map(np.add, total, correct)
        images += int(counted)
    return {name: correct / images for name, correct in total.items()}

  def evaluate(state: TrainState, through: Through) -> dict[str, float]:
    measured = accuracies(state.params, "validation", through)
    return {"validation_accuracy": float(measured[LAYERS].max())}

  began = time.monotonic()
  work = Work(
    train_step=sgd.make_train_step(feed.extract, groups, optimizer),
    batches=feed.training,
    fields=feed.fields,
    batch_size=batch_size,
    log_every=settings.train.log_every,
    eval_every=settings.probe.eval_every,
    save_every=settings.probe.eval_every,
    describe=lambda step: {"data": order.position(step), "probe": identity},
    evaluate=evaluate,
    kept=_probes,
    shown=_SHOWN,
    job="probe",
  )
  outcome = training.train(_joined(saved, whole), work)
  if outcome.stopped_by:
    raise Stopped(
      f"probe: stopped by {outcome.stopped_by} at step {outcome.step} of the probe: saved; fix: the same "
      "command goes on from here"
    )
  say(f"classifiers trained in {progress.format_seconds(time.monotonic() - began)}; testing")
  params = outcome.state.params
  validation, test = accuracies(params, "validation"), accuracies(params, "test")
  return [
    row for kind in groups for row in _rows(kind, source, rates, validation[kind], test[kind])
  ]


def _rows(kind: str, source: Source, rates, validation_RxF, test_RxF) -> list[dict[str, Any]]:
  title = {
    LAYERS: "layer {}", RANDOM: "random weights, layer {}", PIXELS: "raw pixels", PCA: "PCA of pixels"
  }[kind]  # fmt: skip
  layers = source.features.layers if kind in (LAYERS, RANDOM) else (None,)
  return [
    {
      "name": title.format(layer),
      "kind": kind,
      "layer": layer,
      "learning_rate": rates[best],
      "validation_accuracy": float(validation_RxF[best, f]),
      "test_accuracy": float(test_RxF[best, f]),
    }
    for f, (layer, best) in enumerate(zip(layers, validation_RxF.argmax(0), strict=True))
  ]


def _probes(state: TrainState) -> TrainState:
  """The state to save: without "frozen", which training doesn't change."""
  return dataclasses.replace(state, params={"probes": state.params["probes"]})


def _joined(saved: TrainState, whole: TrainState) -> TrainState:
  params = {**saved.params, "frozen": whole.params["frozen"]}
  return dataclasses.replace(saved, params=params)
