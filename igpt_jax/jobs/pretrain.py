"""Pretraining. Read this first, then runner/loop.py.

Data, palette, model, optimizer → the newest checkpoint, or a fresh state → the loop → pictures of
the curve. Running the same command again goes on from the newest checkpoint: parameters, optimizer,
RNG, data position and metrics.
"""

import contextlib
import os
import time
from typing import Any

from igpt_jax import files
from igpt_jax.checkpoint import Checkpoints
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.sources import has_validation, open_split
from igpt_jax.model.image_gpt import count_params
from igpt_jax.parallel import hardware, hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import metrics, progress, summary
from igpt_jax.reporting.curves import draw_curve
from igpt_jax.runner import data_order, goodput, guard, loop, saving
from igpt_jax.runner.loop import StopSignal
from igpt_jax.training import compilation, objectives, optimizer, state, step
from igpt_jax.training.evaluation import Likelihood
from igpt_jax.workspace import devices, lock, memory, streams, training_palette, weights
from igpt_jax.workspace import workdir as workdir_lib

RESULT = "training.json"  # there when a run has made all its steps


def run(settings: Settings, workdir: str) -> None:
  """Trains until `train.steps`, or until it is asked to stop (SIGTERM)."""
  workdir_lib.open_workdir(workdir)
  with lock.held(workdir):
    guard.persist(lambda: _run(settings, workdir), settings.guard, workdir)


def _run(settings: Settings, workdir: str) -> None:
  workdir_lib.check(settings, workdir)
  given = settings
  mesh = devices.mesh_of(settings)
  batch_size = settings.train.batch_size
  sharding.batch_size_per_shard(mesh, batch_size, accumulate=settings.train.accumulate)
  data_config = settings.data
  train_split = open_split(data_config, "train")
  validation_split = open_split(data_config, "validation") if has_validation(data_config) else None
  start = weights.of_run(settings, workdir, train_split)
  settings = start.settings
  palette = training_palette.training_palette(
    settings, data_config, train_split, workdir, start.palette
  )
  n_vocab = choices.palette_size(settings) if palette is None else palette.size
  model_config = choices.model_config(settings, n_vocab=n_vocab)
  sharding.check_model_fits(mesh, n_head=model_config.n_head, n_embd=model_config.n_embd)
  memory.check_state(model_config, mesh)
  optimizer_config = choices.optimizer_config(settings)
  objective = objectives.make_objective(settings.objective, settings.mask_probability)
  schedule = optimizer.make_schedule(optimizer_config)
  tx = optimizer.make_optimizer(optimizer_config)
  # Only now: a mistake in the lines above leaves the workdir unclaimed.
  if hosts.is_main():
    workdir_lib.claim(given, workdir)
    if palette is not None:
      training_palette.keep_palette(palette, workdir)

  checkpoints = Checkpoints(
    workdir,
    keep=settings.train.max_to_keep,
    keep_every=settings.train.keep_period,
    say=say,
    patience=settings.train.save_retry_seconds,
  )
  shardings = state.state_shardings(model_config, tx, mesh)
  abstract = state.abstract_state(model_config, tx)

  order = data_order.DataOrder(workdir, train_split, batch_size=batch_size, seed=settings.seed)
  resumed = checkpoints.resume(abstract, shardings, order.check)
  first_step, elapsed_before = 0, 0.0
  if resumed is None:
    train_state = state.make_state(model_config, tx, settings.seed, mesh, start.params(mesh, say))
  else:
    first_step, train_state = resumed.step, resumed.state
    elapsed_before = resumed.run["elapsed_seconds"]
    del resumed  # its arrays will be donated
    say(f"resuming at step {first_step} of {settings.train.steps} from {workdir}")
  clock = goodput.Clock(workdir, first_step)
  if first_step < settings.train.steps and hosts.is_main():
    # Of a run that had ended, and lost its last checkpoint: who watches it is to wait again.
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(workdir, RESULT))

  began = time.monotonic()
  parameters = count_params(model_config)
  flops = compilation.flops_per_image(model_config)
  say(
    f"{settings.objective}: {model_config.n_layer} layers, {model_config.n_head} heads, width "
    f"{model_config.n_embd}, {parameters:,} parameters, "
    f"{model_config.n_positions} positions of {n_vocab} colours, {model_config.dtype}; "
    f"{train_split.fingerprint}; {hardware.describe_devices(mesh)}"
  )

  if validation_split is None:
    say(
      "data.validation: 0: nothing is held out, and nothing evaluated while it trains; "
      "--config.job=evaluate takes test"
    )

  batches = order.batches(first_step, data_config, palette, mesh)
  likelihood = Likelihood(model_config, objective, mesh)

  def evaluate(at: state.TrainState) -> dict[str, float]:
    assert validation_split is not None, "without one nothing is evaluated"
    eval_batch = min(batch_size, sharding.round_up_batch(mesh, len(validation_split)))
    limit = min(settings.train.eval_images or len(validation_split), len(validation_split))
    with streams.eval_stream(
      validation_split, data_config, palette, mesh, eval_batch, limit
    ) as stream:
      result = likelihood(at.params, stream)
    # BERT's masks may hide nothing of few images: then there is no loss to tell.
    return {"validation_loss": result.nats_per_token} if result.predicted else {}

  def save(at: state.TrainState, at_step: int) -> None:
    run = loop.describe_run(
      settings,
      model_config,
      mask_probability=settings.mask_probability,
      data=order.position(at_step),
      elapsed_seconds=elapsed_before + time.monotonic() - began,
    )
    checkpoints.save(at, palette=None if palette is None else palette.centers, run=run)

  writers = loop.make_writers(settings, workdir, first_step)
  outcome = loop.run(
    loop.Work(
      steps=settings.train.steps,
      log_every=settings.train.log_every,
      eval_every=settings.train.eval_every,
      save_every=settings.train.checkpoint_every,
      train_step=step.make_train_step(
        model_config, objective, tx, schedule, settings.train.accumulate
      ),
      fields=("tokens",),
      abstract=abstract,
      shardings=shardings,
      evaluate=None if validation_split is None else evaluate,
      save=saving.Saver(checkpoints, save, settings.train.save_retry_seconds),
    ),
    train_state,
    batches,
    mesh=mesh,
    writers=writers,
    progress=progress.Progress(settings.train.steps, batch_size, flops, hardware.peak_flops(mesh)),
    stop=StopSignal(),
    clock=clock,
    profiler=loop.make_profiler(settings, workdir),
    guard=loop.make_guard(settings, workdir),
  )
  checkpoints.close()
  writers.close()
  spent = clock.end(outcome.step, outcome.stopped_by is None)
  if outcome.stopped_by:
    say(
      f"stopped by {outcome.stopped_by} at step {outcome.step}: saved; the same command goes on "
      "from here"
    )
    return
  if hosts.is_main():
    elapsed = elapsed_before + time.monotonic() - began
    finish(workdir, outcome.step, parameters, spent, elapsed)
  say(f"done: {settings.train.steps} steps in {workdir}")


def finish(
  workdir: str, at_step: int, parameters: int, spent: dict[str, Any], elapsed: float
) -> None:
  """The curve, training.json, the summary; of a run that had ended before, what isn't there of them."""
  draw_curve(workdir, os.path.join(workdir, "loss.png"))
  path = os.path.join(workdir, RESULT)
  try:
    files.read_json(path)
  except (FileNotFoundError, ValueError):  # not there yet, or damaged
    values = {"step": at_step, "parameters": parameters, "elapsed_seconds": elapsed}
    newest = metrics.newest(os.path.join(workdir, "metrics.jsonl"))
    summary.write_json(path, values | newest | spent)
  summary.write_summary(workdir)
