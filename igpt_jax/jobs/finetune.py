"""Fine-tuning: a pretrained model and a linear head, trained together to classify (paper, 3.4).

Starting checkpoint → its test likelihood → the loop, with an early stop by validation accuracy → the
best checkpoint → one look at test. Everything goes to WORKDIR/finetune (from random parameters:
WORKDIR/finetune_scratch): checkpoints, metrics.jsonl, finetune.json and finetune.png. The same
command goes on from the newest checkpoint there, to the same numbers.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from igpt_jax import checkpoint
from igpt_jax.checkpoint import Checkpoints
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data import sources
from igpt_jax.data.sources import open_split
from igpt_jax.model.image_gpt import Params
from igpt_jax.parallel import hardware, hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import figures, metrics, progress, summary
from igpt_jax.runner import data_order, goodput, guard, loop, saving
from igpt_jax.runner.loop import StopSignal
from igpt_jax.training import compilation, joint, optimizer, state
from igpt_jax.workspace import (
  devices,
  finetuning,
  lock,
  memory,
  provenance,
  streams,
  training_palette,
)
from igpt_jax.workspace import workdir as workdir_lib


def run(settings: Settings, workdir: str) -> None:
  """Fine-tunes `checkpoint` (or the workdir's newest, or `init_from`) on the configured data."""
  own = settings.finetune
  folder = os.path.join(workdir, "finetune_scratch" if own.scratch else "finetune")
  workdir_lib.open_workdir(folder)
  with lock.held(folder):
    guard.persist(lambda: _run(settings, workdir, folder), settings.guard, folder)


def _run(settings: Settings, workdir: str, folder: str) -> None:
  own = settings.finetune
  workdir_lib.check(settings, folder, "finetuning")
  mesh = devices.mesh_of(settings)
  batch_size = own.batch_size
  sharding.batch_size_per_shard(mesh, batch_size, "finetune.batch_size")
  data_config = settings.data
  data_config = dataclasses.replace(data_config, augment=own.augment or data_config.augment)
  splits = {name: open_split(data_config, name) for name in ("train", "validation", "test")}
  sources.check_labels(splits)
  train_split = sources.subset(splits["train"], own.images, settings.seed)
  classes = train_split.class_names
  start = finetuning.begin(settings, workdir, folder, data_config, train_split)
  given, settings, palette = settings, start.settings, start.palette
  model_config = choices.model_config(settings, n_vocab=palette.size)
  sharding.check_model_fits(mesh, n_head=model_config.n_head, n_embd=model_config.n_embd)
  memory.check_state(model_config, mesh)
  loss = joint.JointLoss(
    layer=joint.check_layer(own.layer, model_config.n_layer, start.head),
    generative=own.generative,
    classification=own.classification,
    mask_probability=start.mask_probability,
  )
  optimizer_config = choices.finetuning_optimizer_config(settings)
  schedule = optimizer.make_schedule(optimizer_config)
  tx = optimizer.make_optimizer(optimizer_config)
  # Only now: a mistake in the lines above leaves the folder unclaimed.
  if hosts.is_main():
    workdir_lib.claim(given, folder)
    training_palette.keep_palette(palette, folder)

  classifier = joint.Classifier(
    model_config,
    mesh,
    layer=loss.layer,
    mask_probability=loss.mask_probability,
    masks=own.masks,
  )

  def score(params: Params, name: str, limit: int, tell: bool = False) -> joint.Scores:
    split = splits[name]
    total = min(limit or len(split), len(split))
    eval_batch = min(batch_size, sharding.round_up_batch(mesh, total))
    clock = progress.Countdown(f"{name}: {total:,} pictures", total, say)
    with streams.eval_stream(split, data_config, palette, mesh, eval_batch, total) as stream:
      return classifier(params, stream, clock.batches(eval_batch) if tell else None)

  checkpoints = Checkpoints(
    folder,
    keep=settings.train.max_to_keep,
    keep_every=settings.train.keep_period,
    keep_best="validation_accuracy",
    say=say,
    patience=settings.train.save_retry_seconds,
  )
  shardings = state.state_shardings(model_config, tx, mesh, len(classes))
  abstract = state.abstract_state(model_config, tx, len(classes))

  order = data_order.DataOrder(folder, train_split, batch_size=batch_size, seed=settings.seed)
  say(
    f"fine-tuning {finetuning.describe(start, settings)} on {len(classes)} classes of {train_split.fingerprint}, "
    f"head at layer {loss.layer} of {model_config.n_layer}, loss {loss.generative:g} × generative + "
    f"{loss.classification:g} × classification, learning rate {optimizer_config.learning_rate:g}; "
    f"{hardware.describe_devices(mesh)}"
  )
  resumed = checkpoints.resume(abstract, shardings, order.check)
  if resumed is None:
    first_step, elapsed_before, best = 0, 0.0, Best()
    params = start.params(mesh)
    train_state = state.make_state(model_config, tx, settings.seed, mesh, params, len(classes))
    del params
    began_with = {"checkpoint": None, "step": None, "nats_per_token": None, "accuracy": None}
    if start.weights is not None:
      scores = score(train_state.params, "test", settings.evaluate.images, tell=True)
      began_with = {
        "checkpoint": start.weights.path,
        "step": start.weights.step,
        **provenance.of_checkpoint(start.weights),
        "nats_per_token": scores.nats_per_token,
        "accuracy": None if start.head is None else scores.accuracy,
      }
  else:
    first_step, saved, train_state = resumed.step, resumed.run, resumed.state
    elapsed_before, began_with, best = (
      saved["elapsed_seconds"],
      saved["began_with"],
      Best(**saved["best"]),
    )
    best.keep_to(checkpoints.scores())
    del resumed  # its arrays will be donated
    say(f"resuming at step {first_step} of at most {own.steps} from {folder}")

  began = time.monotonic()

  def elapsed() -> float:
    return elapsed_before + time.monotonic() - began

  def evaluate(at: state.TrainState) -> dict[str, float]:
    scores = score(at.params, "validation", settings.train.eval_images)
    best.update(int(at.step), scores.accuracy)
    values = {
      "validation_accuracy": scores.accuracy,
      "validation_classification_loss": scores.classification_loss,
      "validation_generative_loss": scores.nats_per_token,
    }
    if not model_config.causal:
      values["validation_accuracy_of_mean"] = scores.accuracy_of_mean
    return values

  def save(at: state.TrainState, at_step: int) -> None:
    # Nothing is being written now: of the checkpoints before, all that can be are whole.
    score = best.newest if best.evaluated == at_step else None
    best.keep_to(checkpoints.scores() | {at_step: score})
    described = loop.describe_run(
      settings,
      model_config,
      mask_probability=loss.mask_probability,
      data=order.position(at_step),
      elapsed_seconds=elapsed(),
    )
    fine_tuned = {
      "classes": list(classes),
      "layer": loss.layer,
      "best": dataclasses.asdict(best),
      "began_with": began_with,
    }
    checkpoints.save(
      at,
      palette=palette.centers,
      run=described | fine_tuned,
      scores=None if score is None else {"validation_accuracy": score},
    )

  batches = order.batches(first_step, data_config, palette, mesh)
  writers = loop.make_writers(settings, folder, first_step)
  clock = goodput.Clock(folder, first_step)
  flops = compilation.flops_per_image(model_config)
  outcome = loop.run(
    loop.Work(
      steps=own.steps,
      log_every=settings.train.log_every,
      eval_every=own.eval_every,
      save_every=own.eval_every,
      train_step=joint.make_finetune_step(model_config, loss, tx, schedule),
      fields=("tokens", "label"),
      abstract=abstract,
      shardings=shardings,
      evaluate=evaluate,
      save=saving.Saver(checkpoints, save, settings.train.save_retry_seconds),
      ended=lambda: 0 < own.patience <= best.waited,
    ),
    train_state,
    batches,
    mesh=mesh,
    writers=writers,
    progress=progress.Progress(own.steps, batch_size, flops, hardware.peak_flops(mesh), _SHOWN),
    stop=StopSignal(),
    clock=clock,
    profiler=loop.make_profiler(settings, folder),
    guard=loop.make_guard(settings, folder),
  )
  steps, stopped_by = outcome.step, outcome.stopped_by
  del train_state, outcome  # room for the best one
  checkpoints.close()
  writers.close()
  spent = clock.end(steps, stopped_by is None)
  if stopped_by:
    say(f"stopped by {stopped_by} at step {steps}: saved; the same command goes on from here")
    return

  found = checkpoint.describe(os.path.join(folder, checkpoint.FOLDER, str(best.step)))
  params = checkpoint.load_params(found, mesh) | {state.HEAD: checkpoint.load_head(found, mesh)}
  scores = score(params, "test", settings.evaluate.images, tell=True)
  masked = not model_config.causal
  values = {
    "checkpoint": found.path,
    "best_step": best.step,
    "steps": steps,
    "ended_early": steps < own.steps,
    "elapsed_seconds": elapsed(),
    **spent,
    "objective": settings.objective,
    "classes": len(classes),
    "data": {name: split.fingerprint for name, split in (splits | {"train": train_split}).items()},
    "augment": data_config.augment,
    "layer": loss.layer,
    "generative_weight": loss.generative,
    "classification_weight": loss.classification,
    "learning_rate": optimizer_config.learning_rate,
    "batch_size": batch_size,
    "validation_accuracy": best.accuracy,
    "test_images": scores.images,
    "test_accuracy": scores.accuracy,
    "test_accuracy_of_mean": scores.accuracy_of_mean if masked else None,
    "masks_per_picture": own.masks if masked else None,
    "test_classification_loss": scores.classification_loss,
    "test_nats_per_token": scores.nats_per_token,
    **{f"start_{name}": value for name, value in began_with.items()},
  }
  if hosts.is_main():
    finish(workdir, folder, values)
  of_mean = f" ({scores.accuracy_of_mean:.2%} by the mean of logits)" if masked else ""
  before = began_with["nats_per_token"]
  say(
    f"best of {steps:,} steps: {best.step:,}; test accuracy {scores.accuracy:.2%}{of_mean} over "
    f"{scores.images:,} pictures, {scores.nats_per_token:.4f} nats/token"
    + ("" if before is None else f", {before:.4f} before")
    + f"; {found.path}"
  )


@dataclasses.dataclass
class Best:
  """The first evaluation with the best accuracy so far, of those whose checkpoints can be read at the
  end; part of what a checkpoint says.

  Attributes:
    step, accuracy: of it.
    waited: evaluations since.
    evaluated, newest: step and accuracy of the last evaluation.
  """

  step: int = 0
  accuracy: float = -1.0
  waited: int = 0
  evaluated: int = -1
  newest: float = -1.0

  def update(self, step: int, accuracy: float) -> None:
    self.evaluated, self.newest = step, accuracy
    if accuracy > self.accuracy:
      self.step, self.accuracy, self.waited = step, accuracy, 0
    else:
      self.waited += 1

  def keep_to(self, scores: Mapping[int, float | None]) -> None:
    """Names the best of these checkpoints, step -> accuracy, if its own isn't among them."""
    if self.step in scores:
      return
    scored = {step: score for step, score in sorted(scores.items()) if score is not None}
    self.step = max(scored, key=scored.__getitem__, default=0)
    self.accuracy = scored.get(self.step, -1.0)


_SHOWN = (
  ("generative_loss", "generative {:.4f} nats/token"),
  ("classification_loss", "classification {:.4f}"),
  ("accuracy", "accuracy {:.1%}"),
  ("validation_generative_loss", "validation: generative {:.4f} nats/token"),
  ("validation_classification_loss", "classification {:.4f}"),
  ("validation_accuracy", "accuracy {:.2%}"),
  ("validation_accuracy_of_mean", "({:.2%} by the mean of logits)"),
)


def finish(workdir: str, folder: str, values: dict[str, Any]) -> None:
  """finetune.json, the curves, the summary."""
  summary.write_json(os.path.join(folder, "finetune.json"), values)
  records = metrics.read_jsonl(os.path.join(folder, "metrics.jsonl"))
  curves = {}
  for name, label in (
    ("validation_accuracy", "accuracy"),
    ("validation_classification_loss", "classification loss, nats"),
    ("validation_generative_loss", "generative loss, nats per token"),
  ):
    points = [(record["step"], record[name]) for record in records if name in record]
    curves[label] = tuple(zip(*points, strict=True))
  figures.plot(
    os.path.join(folder, "finetune.png"),
    curves,
    title=f"Fine-tuning: {values['test_accuracy']:.2%} of test at step {values['best_step']:,}",
    x_label="step",
    y_label="on validation",
  )
  summary.write_summary(workdir)
