"""A training run of any job.

A job prepares what it trains, claims the folder, and passes a `Work`. The run does checkpoints, metrics,
profile, clock, retries of saving, and rollbacks after bad numbers.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from igpt_jax import __version__, files
from igpt_jax.checkpoint import Checkpoints
from igpt_jax.config.fields import Settings, as_json, value_of
from igpt_jax.config.run_fields import ProfileConfig
from igpt_jax.data.palette import Palette
from igpt_jax.errors import SaveFailed
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import compilation_cache, hardware, hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import metrics
from igpt_jax.reporting.progress import Progress
from igpt_jax.runner import goodput, guard, loop, saving
from igpt_jax.runner.loop import Outcome, Work
from igpt_jax.tokens import TokenSpec
from igpt_jax.training.bad_numbers import BadNumbers
from igpt_jax.training.optimizer import OptimizerConfig, make_schedule
from igpt_jax.training.profiling import Profiler
from igpt_jax.training.state import TrainState
from igpt_jax.workspace import devices, lock, training_palette
from igpt_jax.workspace import workdir as workdir_lib


class TrainingRun:
  """A run in its folder, which is locked while the run is entered.

  Args:
    settings: as given.
    folder: the run's folder, made if missing.
    steps: the number of steps of the whole run.
    kind: "pretraining" or "finetuning", which selects the settings that a resumed run must share; None:
      part of another job, which neither claims its folder nor goes back.
    mesh: the mesh of state and batches; None: the settings'.
    began: when the process began, by time.monotonic, if it serves this run alone; None: now.
    listener: is told the metrics on the main process, too.
    checkpoints: arguments of `Checkpoints`; those of `settings.train` otherwise.

  Attributes:
    mesh: the mesh of state and batches, once `arrange` has chosen it; before, one with as many parts of a batch.
    settings: as given; from `claim` on with all choices made.
    first_step: the step of the state that `resume_or` returned.
    lengths: changes of the run's number of steps, or of its decay: "at" which step, from how many
      "steps" and, if they changed, which "decay_steps" and "decay_shape".
    spent: the clock's `goodput.Clock.end`, after `train`.
  """

  mesh: Mesh
  first_step: int
  spent: dict[str, Any]

  def __init__(
    self,
    settings: Settings,
    folder: str,
    steps: int,
    kind: str | None = "pretraining",
    *,
    mesh: Mesh | None = None,
    began: float | None = None,
    listener: metrics.Listener | None = None,
    **checkpoints: Any,
  ):
    self.settings, self._folder, self._steps, self._kind = settings, folder, steps, kind
    self._given, self._given_mesh = settings, mesh
    self._began: float | None = time.monotonic() if began is None else began
    self._kept, self._listener = checkpoints, listener
    self._programs = compilation_cache.Tally()
    self._palette: Palette | None = None
    self._held = contextlib.ExitStack()
    self.lengths: list[dict[str, Any]] = []

  def __enter__(self) -> "TrainingRun":
    workdir_lib.open_workdir(self._folder)
    with contextlib.ExitStack() as held:
      self._lock = held.enter_context(lock.held(self._folder))
      if self._kind is not None:
        workdir_lib.forget_unbegun(self._given, self._folder, self._kind)
        workdir_lib.check(self._given, self._folder, self._kind)
      self.mesh = self._given_mesh or devices.mesh_of(self._given)
      self._held = held.pop_all()
    return self

  def __exit__(self, kind: type[BaseException] | None, *error) -> None:
    # After a save that failed, orbax' follow-up errors may still come: they stay ignored.
    if kind is not None and not issubclass(kind, SaveFailed) and "checkpoints" in self.__dict__:
      self.checkpoints.let_go()
    self._held.__exit__(kind, *error)

  def arrange(self, settings: Settings, model: ImageGPTConfig, batch_size: int) -> ImageGPTConfig:
    """Chooses the run's mesh and the model's remat; returns the model with it (`devices.arranged`)."""
    model, self.mesh = devices.arranged(settings, model, batch_size, self._given_mesh)
    return model

  def claim(self, settled: Settings, spec: TokenSpec) -> None:
    """Writes settings and the tokens' palette into the folder, which makes it this run's."""
    self.settings, self._palette = settled, spec.palette
    if self._given.train.b2 != settled.train.b2:
      say(f"train.b2: 0: chosen by the batch size: {settled.train.b2:.6g}")
    if hosts.is_main():
      workdir_lib.claim(self._given, self._folder)
      if spec.palette is not None:
        training_palette.keep_palette(spec.palette, self._folder)

  @functools.cached_property
  def checkpoints(self) -> Checkpoints:
    train = self.settings.train
    kept = {"keep": train.max_to_keep, "keep_every": train.keep_period, **self._kept}
    return Checkpoints(self._folder, say=say, patience=train.save_retry_seconds, **kept)

  def resume_or(
    self,
    make_state: Callable[[], TrainState],
    abstract: TrainState,
    shardings: TrainState,
    check: Callable[[int, dict[str, Any]], object],
    read: Callable[[dict[str, Any]], None] = lambda run: None,
  ) -> TrainState:
    """Returns the state of the newest good checkpoint, or a fresh one.

    Args:
      make_state: makes the fresh state.
      abstract, shardings: shapes and shardings of the state in a checkpoint.
      check: (step, run); raises UserError to refuse a checkpoint.
      read: called with the checkpoint's `run`, again after every rollback.
    """
    self._resume_again = lambda: self.resume_or(make_state, abstract, shardings, check, read)
    resumed = self.checkpoints.resume(abstract, shardings, check)
    self.first_step = 0 if resumed is None else resumed.step
    self._elapsed_before = 0.0 if resumed is None else resumed.run.get("elapsed_seconds", 0.0)
    if resumed is None:
      state = make_state()
    else:
      state = resumed.state
      read(resumed.run)
      say(f"resuming at step {self.first_step} of {self._steps} from {self._folder}")
      self._compare_length(resumed.run)
    self._clock = goodput.Clock(
      self._folder,
      self.first_step,
      self._began,
      self._kept.get("keep_steps", ()),
      self._programs,
    )
    self._began = None  # counted
    return state

  def _compare_length(self, run: dict[str, Any]) -> None:
    """Notes a change of how the run ends since the checkpoint with this `run`."""
    if self._kind is None:
      return
    self.lengths = list(run.get("lengths", ()))
    saved, before = files.flatten(run.get("config", {})), {}
    for name in workdir_lib.LENGTH[self._kind]:
      ours = value_of(self._given, name)
      used = workdir_lib.is_used(name, self._given.train.schedule)
      if used and saved.get(name, ours) != ours:
        before[name.split(".")[1]] = saved[name]
    if before:
      self.lengths.append({"at": self.first_step, "steps": self._steps} | before)
    if hosts.is_main():
      workdir_lib.keep_current(self._given, self._folder, self._kind)

  def tell_length(self, config: OptimizerConfig) -> None:
    """Says how the learning rate goes on, if the run has resumed with another number of steps, or decay.

    Args:
      config: the run's, with the new values.
    """
    if self._kind is None or not self.lengths or self.lengths[-1]["at"] != self.first_step:
      return
    before, at = self.lengths[-1]["steps"], self.first_step
    change = f"{workdir_lib.STEPS[self._kind]} {before:,} → {self._steps:,}"
    if config.decays_from is not None:
      now = {
        name: value_of(self._given, f"train.{name}") for name in self.lengths[-1].keys() - {"at"}
      }
      changes = (
        f"train.{name} {self.lengths[-1][name]} → {now[name]}"
        for name in sorted(now, reverse=True)
        if now[name] != self.lengths[-1][name]
      )
      say(
        f"{', '.join(changes)}: the learning rate is {config.learning_rate:.3g} until the decay, from step "
        f"{config.decays_from:,} on ({config.decay_shape})"
      )
      return
    rates = [
      float(np.asarray(make_schedule(dataclasses.replace(config, steps=steps))(at)))
      for steps in (before, self._steps)
    ]
    if config.schedule == "constant":
      say(f"{change}: the learning rate stays {rates[1]:.3g}")
    else:
      say(
        f"{change}: from step {at:,} on the learning rate follows the {config.schedule} of the new length: "
        f"{rates[1]:.3g} there, {rates[0]:.3g} by the old one"
      )

  def train(self, state: TrainState, work: Work) -> Outcome:
    """Trains until the end or a stop signal; goes back to an older checkpoint after bad numbers.

    Raises:
      BadNumbers: `settings.guard` says to stop, or the run can't go back.
      SaveFailed: the disk was full, or broken, for too long.
    """
    stopped_by = None
    while True:
      try:
        return self._train(state, work, stopped_by)
      except BadNumbers as bad:
        if self._kind is None or not bad.back:
          raise
        stopped_by = bad.stopped_by
        self._lock.check()
        guard.go_back(bad, self.settings.guard, self._folder)
      del self.checkpoints, state
      state = self._resume_again()

  def _evaluated(self, work: Work) -> bool:
    """Returns False if the step that it resumes at lacks an evaluation that was due.

    The run was stopped before the evaluation's end, or has been made shorter and ends there.
    """
    if not self.first_step or not work.evaluates_at(self.first_step, self._steps):
      return True
    records = (
      metrics.read_jsonl(os.path.join(self._folder, "metrics.jsonl")) if hosts.is_main() else []
    )
    here = (record for record in records if record["step"] == self.first_step)
    evaluated = any(name.startswith("validation") for r in here for name in r)
    return bool(hosts.from_main(evaluated, "a look for the last evaluation"))

  def _train(self, state: TrainState, work: Work, stopped_by: str | None) -> Outcome:
    self._since = time.monotonic()
    checkpoints, settings = self.checkpoints, self.settings

    def save(at: TrainState, step: int) -> None:
      palette = None if self._palette is None else self._palette.centers
      self._lock.check()
      run, scores = work.describe(step), work.scores(step)
      checkpoints.save(work.kept(at), palette=palette, run=run, scores=scores)

    writers = self._writers()
    window = settings.profile if hosts.is_main() else ProfileConfig()
    peak = hardware.peak_flops(self.mesh) if work.flops else None
    instruments = loop.Instruments(
      save=saving.Saver(checkpoints, save, settings.train.save_retry_seconds),
      writers=writers,
      progress=Progress(
        self._steps, work.batch_size, work.flops, peak, work.shown, work.eval_every
      ),
      clock=self._clock,
      profiler=Profiler(window, os.path.join(self._folder, "profile"), say),
      guard=guard.Guard(settings.guard, self._folder, work.job),
    )
    self._clock.save_seconds = lambda: instruments.save.seconds
    try:
      outcome = loop.run(
        work, state, self.mesh, self._steps, instruments, stopped_by, self._evaluated(work)
      )
    except Exception:
      with contextlib.suppress(OSError):  # the error that ends the run is the one to report
        writers.close()
      raise
    checkpoints.close()
    writers.close()
    self.spent = self._clock.end(outcome.step, outcome.stopped_by is None)
    return outcome

  def _writers(self) -> metrics.Writers:
    """Returns the writers of `settings.log`, on the main process; none on others."""
    if not hosts.is_main():
      return metrics.Writers([])
    folder, log, step = self._folder, self.settings.log, self.first_step
    writers: list[Any] = [metrics.JsonlWriter(os.path.join(folder, "metrics.jsonl"), step)]
    if log.tensorboard:
      writers.append(metrics.TensorBoardWriter(folder, step))
    if log.wandb:
      writers.append(metrics.WandbWriter(folder, as_json(self.settings), log.wandb_project))
    if self._listener is not None:
      writers.append(metrics.ListenerWriter(self._listener))
    return metrics.Writers(writers)

  def elapsed(self) -> float:
    """Returns the seconds of training so far, earlier processes included."""
    return self._elapsed_before + time.monotonic() - self._since

  def describe_model(
    self, model: ImageGPTConfig, mask_probability: float, data: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the `run` of a model's checkpoint (`checkpoint.CheckpointInfo`).

    Args:
      model: the trained model's config.
      mask_probability: the masked objective's.
      data: the position in the data, from `DataOrder.position`.
    """
    return {
      "version": __version__,
      "model": dataclasses.asdict(model),
      "mesh": dict(self.mesh.shape),
      "objective": self.settings.objective,
      "mask_probability": mask_probability,
      "resolution": self.settings.data.resolution,
      "data": data,
      "elapsed_seconds": self.elapsed(),
      "config": as_json(self.settings),
      **({"lengths": self.lengths} if self.lengths else {}),
    }
