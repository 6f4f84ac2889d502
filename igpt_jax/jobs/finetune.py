"""Fine-tuning: a pretrained model and a linear head, trained together to classify (paper, 3.4).

Starting checkpoint → its test likelihood → the loop, with an early stop by validation accuracy → the
best checkpoint → one look at test. Everything goes to WORKDIR/finetune (from random parameters:
WORKDIR/finetune_scratch): checkpoints, metrics.jsonl, finetune.json and finetune.png. The same
command resumes from the newest checkpoint there, with the same numbers.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import optax
from jax.sharding import Mesh

from igpt_jax import checkpoint, files, units
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data import sources
from igpt_jax.data.pipeline import Batches
from igpt_jax.model.image_gpt import Params
from igpt_jax.parallel import hardware, hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import metrics, plots, progress, summary
from igpt_jax.runner.data_order import DataOrder
from igpt_jax.runner.loop import Through, Work
from igpt_jax.runner.run import TrainingRun
from igpt_jax.training import compilation, joint, optimizer, state
from igpt_jax.workspace import finetuning, memory, provenance, streams, weights

RESULT = "finetune.json"
SCORE = "validation_accuracy"  # the best checkpoint is kept by it


def run(
  settings: Settings, workdir: str, mesh: Mesh | None = None, began: float | None = None
) -> None:
  """Fine-tunes `checkpoint` (or the workdir's newest, or `init_from`) on the configured data."""
  own = settings.finetune
  folder = os.path.join(workdir, "finetune_scratch" if own.scratch else "finetune")
  begins = not own.scratch and checkpoint.latest_step(folder) is None
  # One that isn't there is refused before a folder is made.
  start = weights.of_job(settings, workdir) if begins else None
  with TrainingRun(
    settings, folder, own.steps, "finetuning", mesh=mesh, began=began, keep_best=SCORE
  ) as run:
    tuning = FineTuning(settings, workdir, folder, run, start)
    model, n_classes = tuning.model, len(tuning.classes)
    optimizer_config = choices.finetuning_optimizer_config(tuning.settings)
    schedule = optimizer.make_schedule(optimizer_config)
    tx = optimizer.make_optimizer(optimizer_config)
    # Only now: a UserError above must leave the folder unclaimed.
    run.claim(tuning.settings, tuning.spec)

    rate = optimizer_config.learning_rate
    devices = hardware.describe_devices(run.mesh)
    say(f"fine-tuning {tuning.in_words()}, learning rate {rate:g}; {devices}")
    train_state = run.resume_or(
      lambda: tuning.begin(tx),
      state.abstract_state(model, tx, n_classes),
      state.state_shardings(model, tx, run.mesh, n_classes),
      tuning.order.check,
      tuning.go_on,
    )
    run.tell_length(optimizer_config)
    if run.lengths and run.first_step < own.steps and hosts.is_main():
      files.remove(os.path.join(folder, RESULT), missing_ok=True)  # the result of the old length
    outcome = run.train(
      train_state,
      Work(
        train_step=joint.make_finetune_step(model, tuning.loss, tx, schedule),
        batches=tuning.batches,
        fields=("tokens", "label"),
        batch_size=own.batch_size,
        log_every=settings.train.log_every,
        eval_every=own.eval_every,
        save_every=own.eval_every,
        describe=tuning.describe,
        evaluate=tuning.evaluate,
        ended=lambda: 0 < own.patience <= tuning.best.waited,
        scores=lambda step: tuning.best.scores_of(step),
        flops=compilation.flops_per_image(model),
        shown=_SHOWN,
        job="finetune",
      ),
    )
    steps, stopped_by = outcome.step, outcome.stopped_by
    del train_state, outcome  # frees memory for the best one
    if stopped_by:
      say(f"stopped by {stopped_by} at step {steps}: saved; the same command goes on from here")
      return
    values = tuning.result(steps, rate)
    if hosts.is_main():
      finish(workdir, folder, values)
    say(_verdict(values))


class FineTuning:
  """Model, data and scores of a fine-tuning, all settings checked.

  Args:
    settings: as given.
    workdir: the job's.
    folder: the fine-tuning's.
    run: the entered run.
    start: the checkpoint that it begins from, if that is opened.

  Raises:
    UserError: the settings, the data or the checkpoint have a mistake.
  """

  def __init__(
    self,
    settings: Settings,
    workdir: str,
    folder: str,
    run: TrainingRun,
    start: checkpoint.CheckpointInfo | None = None,
  ):
    self._run, self._folder, self._own = run, folder, settings.finetune
    own = self._own
    sharding.batch_size_per_shard(run.mesh, own.batch_size, "finetune.batch_size")
    self._data = dataclasses.replace(settings.data, augment=own.augment or settings.data.augment)
    self._splits = {
      name: sources.open_split(self._data, name) for name in ("train", "validation", "test")
    }
    sources.check_labels(self._splits)
    self._split = sources.subset(self._splits["train"], own.images, settings.seed)
    self.classes = self._split.class_names
    self._start = finetuning.begin(settings, workdir, folder, self._data, self._split, start)
    self.settings, self.spec = self._start.settings, self._start.spec
    model = choices.model_config(self.settings, n_vocab=self.spec.n_vocab)
    self.model, mesh = run.arrange(self.settings, model, own.batch_size), run.mesh
    sharding.check_model_fits(mesh, n_head=self.model.n_head, n_embd=self.model.n_embd)
    adam = optimizer.make_optimizer(choices.finetuning_optimizer_config(self.settings))
    memory.check_state(self.model, adam, mesh)
    self.loss = joint.JointLoss(
      layer=joint.check_layer(own.layer, self.model.n_layer, self._start.head),
      generative=own.generative,
      classification=own.classification,
      mask_probability=self._start.mask_probability,
    )
    self._classifier = joint.Classifier(
      self.model,
      mesh,
      layer=self.loss.layer,
      mask_probability=self.loss.mask_probability,
      masks=own.masks,
    )
    self.order = DataOrder(folder, self._split, batch_size=own.batch_size, seed=settings.seed)
    self.best = Best()
    self._began_with: dict[str, Any] = {}

  def in_words(self) -> str:
    loss = self.loss
    return (
      f"{finetuning.describe(self._start, self.settings)} on {len(self.classes)} classes of "
      f"{self._split.fingerprint}, head at layer {loss.layer} of {self.model.n_layer}, loss "
      f"{loss.generative:g} × generative + {loss.classification:g} × classification"
    )

  def batches(self, step: int) -> Batches:
    return self.order.batches(step, self._data, self.spec, self._run.mesh)

  def score(self, params: Params, name: str, limit: int, through: Through = iter) -> joint.Scores:
    """Scores parameters on the first `limit` images of a split (0: all)."""
    split, mesh = self._splits[name], self._run.mesh
    total = min(limit or len(split), len(split))
    batch_size = min(self._own.batch_size, sharding.round_up_batch(mesh, total))
    clock = progress.Countdown(f"{name}: {units.counted(total, 'image')}", total, say)
    with streams.eval_stream(split, self._data, self.spec, mesh, batch_size, total) as stream:
      return self._classifier(params, through(stream), clock.batches(batch_size))

  def score_on_test(self, params: Params) -> joint.Scores:
    return self.score(params, "test", self.settings.evaluate.images)

  def begin(self, tx: optax.GradientTransformation) -> state.TrainState:
    """Makes the initial state, and scores its parameters on test."""
    self.best = Best()
    start, mesh = self._start, self._run.mesh
    made = state.make_state(
      self.model, tx, self.settings.seed, mesh, start.params(mesh), len(self.classes)
    )
    self._began_with = {"checkpoint": None, "step": None, "nats_per_token": None, "accuracy": None}
    if start.weights is not None:
      scores = self.score_on_test(made.params)
      self._began_with = {
        "checkpoint": start.weights.path,
        "step": start.weights.step,
        **provenance.of_checkpoint(start.weights),
        "nats_per_token": scores.nats_per_token,
        "accuracy": None if start.head is None else scores.accuracy,
      }
    return made

  def go_on(self, saved: dict[str, Any]) -> None:
    """Restores what `describe` stored in a checkpoint."""
    self._began_with, self.best = saved["began_with"], Best(**saved["best"])
    self.best.keep_to(self._run.checkpoints.scores())

  def describe(self, step: int) -> dict[str, Any]:
    """Returns the `run` of this step's checkpoint; called when older checkpoints are complete."""
    scores = self.best.scores_of(step) or {}
    self.best.keep_to(self._run.checkpoints.scores() | {step: scores.get(SCORE)})
    position = self.order.position(step)
    return self._run.describe_model(self.model, self.loss.mask_probability, position) | {
      "classes": list(self.classes),
      "layer": self.loss.layer,
      "best": dataclasses.asdict(self.best),
      "began_with": self._began_with,
    }

  def evaluate(self, at: state.TrainState, through: Through) -> dict[str, float]:
    scores = self.score(at.params, "validation", self.settings.train.eval_images, through)
    self.best.update(int(at.step), scores.accuracy)
    values = {
      "validation_accuracy": scores.accuracy,
      "validation_classification_loss": scores.classification_loss,
      "validation_generative_loss": scores.nats_per_token,
    }
    if not self.model.causal:
      values["validation_accuracy_of_mean"] = scores.accuracy_of_mean
    return values

  def result(self, steps: int, learning_rate: float) -> dict[str, Any]:
    """Returns the contents of finetune.json, with the best checkpoint's scores on test."""
    path = os.path.join(self._folder, checkpoint.FOLDER, str(self.best.step))
    info, mesh, own = checkpoint.describe(path), self._run.mesh, self._own
    params = checkpoint.load_params(info, mesh) | {state.HEAD: checkpoint.load_head(info, mesh)}
    scores = self.score_on_test(params)
    masked, splits = not self.model.causal, self._splits | {"train": self._split}
    held_out = len(splits["validation"])
    return {
      "checkpoint": info.path,
      "best_step": self.best.step,
      "steps": steps,
      "ended_early": steps < own.steps,
      "elapsed_seconds": self._run.elapsed(),
      **self._run.spent,
      "objective": self.settings.objective,
      "classes": len(self.classes),
      "data": {name: split.fingerprint for name, split in splits.items()},
      "augment": self._data.augment,
      "layer": self.loss.layer,
      "generative_weight": self.loss.generative,
      "classification_weight": self.loss.classification,
      "learning_rate": learning_rate,
      "batch_size": own.batch_size,
      "validation_images": min(self.settings.train.eval_images or held_out, held_out),
      "validation_accuracy": self.best.accuracy,
      "test_images": scores.images,
      "test_accuracy": scores.accuracy,
      "test_accuracy_of_mean": scores.accuracy_of_mean if masked else None,
      "masks_per_picture": own.masks if masked else None,
      "test_classification_loss": scores.classification_loss,
      "test_nats_per_token": scores.nats_per_token,
      **{f"start_{name}": value for name, value in self._began_with.items()},
    }


@dataclasses.dataclass
class Best:
  """First evaluation with the best accuracy whose checkpoint exists; stored in checkpoints.

  Attributes:
    step, accuracy: the best evaluation's.
    waited: the number of evaluations since.
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

  def scores_of(self, step: int) -> dict[str, float] | None:
    """Returns the scores of this step's checkpoint; None: it wasn't evaluated."""
    return {SCORE: self.newest} if self.evaluated == step else None

  def keep_to(self, scores: Mapping[int, float | None]) -> None:
    """Chooses the best of these checkpoints, step -> accuracy, if the best one isn't among them."""
    if self.step in scores:
      return
    scored = {step: score for step, score in sorted(scores.items()) if score is not None}
    self.step = max(scored, key=scored.__getitem__, default=0)
    self.accuracy = scored.get(self.step, -1.0)


def _verdict(values: Mapping[str, Any]) -> str:
  of_mean, before = values["test_accuracy_of_mean"], values["start_nats_per_token"]
  return (
    f"best of {values['steps']:,} steps: {values['best_step']:,}; test accuracy "
    f"{values['test_accuracy']:.2%}"
    + ("" if of_mean is None else f" ({of_mean:.2%} by the mean of logits)")
    + f" over {units.counted(values['test_images'], 'image')}, {values['test_nats_per_token']:.4f} nats/token"
    + ("" if before is None else f", {before:.4f} before")
    + f"; {values['checkpoint']}"
  )


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
  """Writes finetune.json, the curves and the summary."""
  summary.write_json(os.path.join(folder, RESULT), values)
  records = metrics.read_jsonl(os.path.join(folder, "metrics.jsonl"))

  def curve(name: str) -> plots.Curve:
    points = [(record["step"], record[name]) for record in records if name in record]
    return plots.Curve([step for step, _ in points], [value for _, value in points])

  best, losses = (
    values["best_step"],
    ("validation_classification_loss", "validation_generative_loss"),
  )
  labels = "classification, nats per image", "generative, nats per token"
  plots.plot(
    os.path.join(folder, "finetune.png"),
    plots.Panel(
      curves={"validation": curve("validation_accuracy")},
      y_label="validation accuracy",
      chosen=(f"best: step {best:,}", [best], [values["validation_accuracy"]]),
      accuracy=True,
      images=values["validation_images"],
      classes=values["classes"],
    ),
    plots.Panel(
      curves=dict(zip(labels, map(curve, losses), strict=True)), y_label="validation loss, nats"
    ),
    title=f"Fine-tuning: test accuracy {values['test_accuracy']:.2%} at step {best:,}",
    note="bars: standard error of an accuracy on {validation_images:,} validation images".format(
      **values
    ),
    x_label="step",
  )
  summary.write_summary(workdir)
