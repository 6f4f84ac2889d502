"""Pretraining as a function of settings, which job pretrain calls.

Data, palette, model, optimizer → the newest checkpoint, or a fresh state → the loop (runner/loop.py)
→ the curve and training.json. Called again it resumes from the newest checkpoint: parameters,
optimizer, RNG, data position and metrics.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from igpt_jax import files
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.sources import Split, has_validation, open_split
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import metrics, progress, summary
from igpt_jax.reporting.curves import draw_curve
from igpt_jax.runner.data_order import DataOrder
from igpt_jax.runner.loop import Through, Work
from igpt_jax.runner.progress_images import NoImages, ProgressImages
from igpt_jax.runner.run import TrainingRun
from igpt_jax.tokens import TokenSpec
from igpt_jax.training import compilation, objectives, optimizer, state, step
from igpt_jax.training.evaluation import LikelihoodEvaluator
from igpt_jax.workspace import branches, memory, streams, training_palette, weights

RESULT = "training.json"  # written when a run has made all its steps
_LOSSES = 10  # logged losses, of a batch each, whose mean stands for training's


@dataclasses.dataclass(frozen=True)
class Outcome:
  """End of a pretraining.

  Attributes:
    step: its newest checkpoint's.
    stopped_by: the signal that stopped it; None: it has made all its steps.
    losses: on the main process the newest `loss` and, if images are held out, `validation_loss`, in
      nats per token; {} on others.
    workdir: the folder of checkpoints, metrics and results.
    asked_by: the signal that asked it to stop, if it came after the last step, too; None: none did.
  """

  step: int
  stopped_by: str | None
  losses: dict[str, float]
  workdir: str
  asked_by: str | None = None


def pretrain(
  settings: Settings,
  workdir: str,
  mesh: Mesh | None = None,
  began: float | None = None,
  listener: metrics.Listener | None = None,
) -> Outcome:
  """Trains until `train.steps`, or until it is asked to stop (SIGTERM, Ctrl-C).

  Args:
    settings: as given.
    workdir: the run's folder; a run that was begun there is resumed.
    mesh: the mesh of state and batches; None: the settings'.
    began: when the process began, by time.monotonic, if it serves this run alone; None: now.
    listener: is told the metrics on the main process, too.
  """
  train, data = settings.train, settings.data
  trunk_ends = branches.trunk_ends(choices.optimizer_config(settings))
  with TrainingRun(
    settings, workdir, train.steps, mesh=mesh, began=began, listener=listener, keep_steps=trunk_ends
  ) as run:
    batch_size = train.batch_size
    sharding.batch_size_per_shard(run.mesh, batch_size, accumulate=train.accumulate)
    split = open_split(data, "train")
    held_out = open_split(data, "validation") if has_validation(data) else None
    start = weights.of_run(settings, workdir)
    settings = start.settings
    spec = training_palette.training_tokens(settings, data, split, workdir, start.palette)
    model = choices.model_config(settings, n_vocab=spec.n_vocab)
    model, mesh = run.arrange(settings, model, batch_size // train.accumulate), run.mesh
    optimizer_config = choices.optimizer_config(settings)
    objective = objectives.make_objective(settings.objective, settings.mask_probability)
    schedule = optimizer.make_schedule(optimizer_config)
    tx = optimizer.make_optimizer(optimizer_config)
    sharding.check_model_fits(mesh, n_head=model.n_head, n_embd=model.n_embd)
    memory.check_state(model, tx, mesh)
    run.claim(settings, spec)  # only now: a UserError above must leave it unclaimed

    order = DataOrder(workdir, split, batch_size=batch_size, seed=settings.seed)
    branches.leave_decay(workdir, optimizer_config, order.check)
    train_state = run.resume_or(
      lambda: state.make_state(model, tx, settings.seed, mesh, start.params(mesh, say)),
      state.abstract_state(model, tx),
      state.state_shardings(model, tx, mesh),
      order.check,
    )
    run.tell_length(optimizer_config)
    if run.first_step < train.steps:
      _forget_result(workdir)
    devices = hardware.describe_devices(mesh)
    say(f"{settings.objective}: {_in_words(model)}; {split.fingerprint}; {devices}")

    likelihood = LikelihoodEvaluator(model, objective, mesh)
    outcome = run.train(
      train_state,
      Work(
        train_step=step.make_train_step(model, objective, tx, schedule, train.accumulate),
        flops=compilation.flops_per_image(model),
        describe=lambda at_step: run.describe_model(
          model, settings.mask_probability, order.position(at_step)
        ),
        batches=lambda at_step: order.batches(at_step, data, spec, mesh),
        fields=("tokens",),
        batch_size=batch_size,
        log_every=train.log_every,
        eval_every=train.eval_every,
        save_every=train.checkpoint_every,
        save_at=trunk_ends,
        evaluate=_evaluation(settings, held_out, likelihood, model, spec, mesh),
        images=_images(settings, workdir, held_out, spec, model, mesh),
      ),
    )
    newest = _newest(os.path.join(workdir, "metrics.jsonl")) if hosts.is_main() else {}
    if outcome.stopped_by is None and hosts.is_main():
      measured_on = {} if held_out is None else {"validation": held_out.fingerprint}
      _finish(workdir, {
        "step": outcome.step, "parameters": count_params(model), "elapsed_seconds": run.elapsed(),
        **newest, **measured_on, **run.spent,
      })  # fmt: skip
  losses = {name: newest[name] for name in ("loss", "validation_loss") if name in newest}
  return Outcome(outcome.step, outcome.stopped_by, losses, workdir, outcome.asked_by)


def _newest(path: str) -> dict[str, Any]:
  """Returns the newest metrics and, if images are held out, how far their loss lies above training's."""
  newest = metrics.newest(path)
  losses = [record["loss"] for record in metrics.read_jsonl(path) if "loss" in record][-_LOSSES:]
  if losses and "validation_loss" in newest:
    newest["validation_gap"] = newest["validation_loss"] - sum(losses) / len(losses)
  return newest


def _evaluation(
  settings: Settings,
  split: Split | None,
  likelihood: LikelihoodEvaluator,
  model: ImageGPTConfig,
  spec: TokenSpec,
  mesh: Mesh,
) -> Callable[[state.TrainState, Through], dict[str, float]] | None:
  """Returns the function of a state that measures its validation loss; None: no images are held out."""
  if split is None:
    say(
      "data.validation: 0: nothing is held out, and nothing evaluated while it trains; "
      "--config.job=evaluate takes test"
    )
    return None
  train = settings.train
  batch_size = min(train.batch_size, sharding.round_up_batch(mesh, len(split)))
  limit = min(train.eval_images or len(split), len(split))

  def evaluate(at: state.TrainState, through: Through) -> dict[str, float]:
    clock = progress.Countdown(f"validation: {limit:,} images", limit, say)
    with streams.eval_stream(split, settings.data, spec, mesh, batch_size, limit) as stream:
      result = likelihood(at.params, through(stream), report=clock.batches(batch_size))
    # With few images, BERT's masks may hide no pixel: then there is no loss.
    if not result.predicted:
      return {}
    bits = model.bits_per_dim(result.nats_per_token)
    of_rgb = {} if bits is None else {"validation_bits_per_dim": bits}
    return {"validation_loss": result.nats_per_token, **of_rgb}

  return evaluate


def _images(
  settings: Settings,
  workdir: str,
  held_out: Split | None,
  spec: TokenSpec,
  model: ImageGPTConfig,
  mesh: Mesh,
) -> NoImages:
  """Returns what draws `train.progress_images`; nothing where none are wanted, or can be shown."""
  if not settings.train.progress_images:
    return NoImages()
  if held_out is None or held_out.is_tokens:
    why = "nothing is held out" if held_out is None else "the data are tokens, without images"
    say(f"train.progress_images: none are drawn: {why}")
    return NoImages()
  return ProgressImages(settings, workdir, held_out, spec, model, mesh)


def _forget_result(workdir: str) -> None:
  """Removes the result of a run that lost its last checkpoint, so that jobs that watch it wait."""
  if hosts.is_main():
    files.remove(os.path.join(workdir, RESULT), missing_ok=True)


def _in_words(model: ImageGPTConfig) -> str:
  return (
    f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, "
    f"{count_params(model):,} parameters, {model.n_positions} positions of {model.tokens.values}, "
    f"{model.dtype}"
  )


def _finish(workdir: str, values: dict[str, Any]) -> None:
  """Writes the curve, the summary and, unless a run that had ended has left it, training.json."""
  draw_curve(workdir, os.path.join(workdir, "loss.png"))
  path = os.path.join(workdir, RESULT)
  try:
    files.read_json(path)
  except (FileNotFoundError, ValueError):  # not there yet, or damaged
    summary.write_json(path, values)
  summary.write_summary(workdir)
