"""The training loop. Read this first.

restore → for every step: evaluate? → save? → next batch → step → the last step's metrics →
asked to stop? → final evaluation, save, pictures of the curve. Running the same command again goes
on from the newest checkpoint: parameters, optimizer, RNG, data position and metrics.
"""

import dataclasses
import os
import signal
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from igpt_jax import __version__, metrics, pictures, report
from igpt_jax import config as config_lib
from igpt_jax.checkpoint import Checkpoints
from igpt_jax.data import pipeline
from igpt_jax.data.sources import open_split
from igpt_jax.jobs import common, starting_point
from igpt_jax.jobs.common import say
from igpt_jax.model.image_gpt import count_params
from igpt_jax.parallel import hardware, sharding
from igpt_jax.training import compilation, objectives, optimizer, state, step
from igpt_jax.training.evaluation import Likelihood


def run(config: ConfigDict, workdir: str) -> None:
  """Trains until `train.steps`, or until it is asked to stop (SIGTERM)."""
  common.open_workdir(workdir)
  config_lib.check_workdir(config, workdir)
  given = config
  mesh = common.mesh_of(config)
  batch_size = config.train.batch_size
  sharding.batch_size_per_shard(mesh, batch_size, accumulate=config.train.accumulate)
  data_config = config_lib.data(config)
  train_split = open_split(data_config, "train")
  validation_split = open_split(data_config, "validation")
  start = starting_point.of_run(config, workdir, train_split)
  config = start.config
  palette = common.training_palette(config, data_config, train_split, workdir, start.palette)
  n_vocab = config_lib.palette_size(config) if palette is None else palette.size
  model_config = config_lib.model(config, n_vocab=n_vocab)
  sharding.check_model_fits(mesh, n_head=model_config.n_head, n_embd=model_config.n_embd)
  optimizer_config = config_lib.optimizer(config)
  objective = objectives.make_objective(config.objective, config.mask_probability)
  schedule = optimizer.make_schedule(optimizer_config)
  tx = optimizer.make_optimizer(optimizer_config)
  # Only now: a mistake in the lines above leaves the workdir unclaimed.
  if common.is_main():
    config_lib.claim_workdir(given, workdir)
    if palette is not None:
      palette.save(os.path.join(workdir, "palette.npy"))

  checkpoints = Checkpoints(workdir, keep=config.train.keep, keep_every=config.train.keep_every)
  shardings = state.state_shardings(model_config, tx, mesh)
  abstract = state.abstract_state(model_config, tx)
  newest = checkpoints.latest()
  first_step, elapsed_before = 0, 0.0
  if newest is None:
    train_state = state.make_state(model_config, tx, config.seed, mesh, start.params(mesh, say))
  else:
    saved = checkpoints.read_run(newest)
    here = pipeline.position(train_split, batch_size=batch_size, seed=config.seed, step=newest)
    first_step = pipeline.check_position(saved["data"], here)
    elapsed_before = saved["elapsed_seconds"]
    train_state = checkpoints.restore(newest, abstract, shardings)
    say(f"resuming at step {first_step} of {config.train.steps} from {workdir}")

  began = time.monotonic()
  parameters = count_params(model_config)
  flops = compilation.flops_per_image(model_config)
  say(
    f"{config.objective}: {model_config.n_layer} layers, {model_config.n_head} heads, width "
    f"{model_config.n_embd}, {parameters:,} parameters, "
    f"{model_config.n_positions} positions of {n_vocab} colours, {model_config.dtype}; "
    f"{train_split.fingerprint}; {hardware.describe_devices(mesh)}"
  )

  def described(at_step: int) -> dict[str, Any]:
    return {
      "version": __version__,
      "model": dataclasses.asdict(model_config),
      "objective": config.objective,
      "mask_probability": config.mask_probability,
      "resolution": config.data.resolution,
      "data": pipeline.position(train_split, batch_size=batch_size, seed=config.seed, step=at_step),
      "elapsed_seconds": elapsed_before + time.monotonic() - began,
      "config": config_lib.as_json(config),
    }

  share, shares = common.input_share(mesh)
  batches = pipeline.train_batches(
    train_split,
    data_config,
    palette,
    batch_size=batch_size,
    seed=config.seed,
    start_step=first_step,
    process_index=share,
    process_count=shares,
  )
  likelihood = Likelihood(model_config, objective, mesh)

  def validate(params) -> float:
    eval_batch = min(batch_size, sharding.round_up_batch(mesh, len(validation_split)))
    limit = min(config.train.eval_images or len(validation_split), len(validation_split))
    with common.eval_stream(
      validation_split, data_config, palette, mesh, eval_batch, limit
    ) as stream:
      return likelihood(params, stream)[0]

  writers = make_writers(config, workdir, first_step)
  progress = metrics.Progress(config.train.steps, batch_size, flops, hardware.peak_flops(mesh))
  stop = StopSignal()
  pending: tuple[int, step.Metrics] | None = None
  last: dict[str, Any] = {}

  def flush() -> None:
    """Writes the metrics that were left one step behind."""
    nonlocal pending
    if pending is None:
      return
    at_step, values = pending[0], {name: float(v) for name, v in jax.device_get(pending[1]).items()}
    pending = None
    measured = progress.measure(at_step)
    if measured:
      measured["data_wait"] = progress.share_waited(batches.wait_seconds)
    last.update(values, **measured)
    writers.write(at_step, {**values, **measured})
    say(progress.line(at_step, {**values, **measured}))

  def pause(work) -> Any:
    """Does something beside the training, outside the clock."""
    flush()
    jax.block_until_ready(train_state)
    paused = time.monotonic()
    result = work()
    progress.pause(time.monotonic() - paused)
    return result

  def evaluation_due(at_step: int) -> bool:
    return bool(config.train.eval_every) and at_step % config.train.eval_every == 0

  def evaluate(at_step: int) -> None:
    nats = pause(lambda: validate(train_state.params))
    last["validation_loss"] = nats
    writers.write(at_step, {"validation_loss": nats})
    say(progress.line(at_step, {"validation_loss": nats}))

  def save(at_step: int) -> None:
    colours = None if palette is None else palette.centers
    pause(lambda: checkpoints.save(train_state, palette=colours, run=described(at_step)))

  compiled = None
  at_step = first_step
  with stop, batches, jax.set_mesh(mesh):
    while at_step < config.train.steps and not stop.asked(at_step):
      if at_step > first_step:
        if evaluation_due(at_step):
          evaluate(at_step)
        if at_step % config.train.checkpoint_every == 0:
          save(at_step)
      # Only begun here: it travels while the device is still at the step before.
      batch = sharding.put_batch({"tokens": next(batches)["tokens"]}, mesh)
      if compiled is None:
        compiled = compilation.compile_step(
          step.make_train_step(model_config, objective, tx, schedule, config.train.accumulate),
          abstract,
          shardings,
          batch,
        )
        say(f"compiled in {compiled.seconds:.0f} s; {compiled.memory}")
        progress.start(first_step, batches.wait_seconds)
      with jax.transfer_guard("disallow"):
        train_state, values = compiled(train_state, batch)
      at_step += 1
      flush()
      if at_step % config.train.log_every == 0 or at_step == config.train.steps:
        pending = at_step, values
    flush()
    done = at_step >= config.train.steps
    # Also when stopped: what is saved at a step has been evaluated at it, so resuming owes nothing.
    if at_step > first_step and (done or evaluation_due(at_step)):
      evaluate(at_step)
    save(at_step)
  checkpoints.close()
  writers.close()
  if not done:
    say(f"stopped by {stop.requested} at step {at_step}: saved; the same command goes on from here")
    return
  if at_step > first_step and common.is_main():
    finish(workdir, at_step, parameters, last, elapsed_before + time.monotonic() - began)
  say(f"done: {config.train.steps} steps in {workdir}")


class StopSignal:
  """Turns SIGTERM into a wish that the loop looks at between two steps.

  Several processes must stop at the same step, whoever was signalled and when: there jax' own
  handler takes the signal, and agrees on a step with the others in the background.
  """

  def __init__(self):
    self.requested: str | None = None
    self._previous: Any = None

  def asked(self, at_step: int) -> str | None:
    """The signal's name if the run is to stop before step `at_step`; ask before every step."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(at_step):
      self.requested = "SIGTERM"
    return self.requested

  def __enter__(self):
    if jax.process_count() > 1:
      return self
    self._previous = signal.signal(signal.SIGTERM, self._ask)
    return self

  def _ask(self, number, frame) -> None:
    del frame
    self.requested = signal.Signals(number).name

  def __exit__(self, *unused) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)


def make_writers(config: ConfigDict, workdir: str, first_step: int) -> metrics.Writers:
  if not common.is_main():
    return metrics.Writers([])
  writers: list[Any] = [metrics.JsonlWriter(os.path.join(workdir, "metrics.jsonl"), first_step)]
  if config.log.tensorboard:
    writers.append(metrics.TensorBoardWriter(workdir, first_step))
  if config.log.wandb:
    writers.append(
      metrics.WandbWriter(workdir, config_lib.as_json(config), config.log.wandb_project)
    )
  return metrics.Writers(writers)


def finish(workdir: str, at_step: int, parameters: int, last: dict, elapsed: float) -> None:
  """training.json, the curve, the summary."""
  values = {"step": at_step, "parameters": parameters, "elapsed_seconds": elapsed, **last}
  report.write_json(os.path.join(workdir, "training.json"), values)
  records = metrics.read_jsonl(os.path.join(workdir, "metrics.jsonl"))
  curves = {}
  for name, label in (("loss", "training"), ("validation_loss", "validation")):
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
      curves[label] = tuple(zip(*points, strict=True))
  pictures.plot(
    os.path.join(workdir, "loss.png"),
    curves,
    title=os.path.basename(workdir),
    x_label="step",
    y_label="nats per token",
  )
  report.write_summary(workdir)
