"""The training loop of every job that trains.

Every step: evaluate if due → save if due → next batch → step → wait for the step before, and report it
→ stop if asked to. At the end: evaluate, save. A run that is to stop saves at once: an evaluation that is
due, or not at its end, is made by the process that goes on. The job supplies step, evaluation and what
is saved; nothing here knows a model or a loss.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax.parallel import compilation_cache, hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import metrics
from igpt_jax.reporting.progress import Progress, doing
from igpt_jax.runner import goodput, saving
from igpt_jax.runner.guard import Guard
from igpt_jax.runner.progress_images import NoImages
from igpt_jax.runner.stop_signal import EvaluationStopped, Rows, StopSignal
from igpt_jax.training import compilation
from igpt_jax.training.bad_numbers import BadNumbers
from igpt_jax.training.profiling import Profiler
from igpt_jax.training.state import TrainState
from igpt_jax.workspace import agreement, memory

# Passes an evaluation's batches on, until the run is to stop.
Through = Callable[[Iterable[Rows]], Iterator[Rows]]


class Feed(Protocol):
  """Iterator over this host's rows of batches, such as `pipeline.Batches`.

  Attributes:
    wait_seconds: time spent waiting for batches.
  """

  wait_seconds: float

  def place(self) -> dict[str, str]: ...

  def __next__(self) -> dict[str, np.ndarray]: ...

  def __enter__(self) -> Any: ...

  def __exit__(self, *unused) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """The job's part of a training loop.

  Attributes:
    train_step: (state, batch) -> (state, metrics); not compiled yet.
    batches: step -> this host's rows from that step on.
    fields: the arrays of a batch that the step takes.
    batch_size: images in a step, all hosts together.
    log_every, eval_every, save_every: steps between two; eval_every 0: at the end only.
    save_at: further steps whose checkpoints are saved.
    describe: step -> the `run` in the checkpoint of that step.
    evaluate: (state, through) -> metrics, of batches that go through `through`; None: there are no images
      to evaluate on.
    images: draws what the state makes of held-out images, after each evaluation and once early.
    ended: returns True, after an evaluation, to end before the last step.
    kept: state -> the part of it that checkpoints hold.
    scores: step -> metrics by which the best checkpoint is kept; None: that step has none.
    flops: FLOPs of training on one image; 0: unknown.
    shown: the metrics in a line of the log, in order, with their formats.
    job: whose settings an error names.
  """

  train_step: Callable
  batches: Callable[[int], Feed]
  fields: tuple[str, ...]
  batch_size: int
  log_every: int
  eval_every: int
  save_every: int
  describe: Callable[[int], dict[str, Any]]
  evaluate: Callable[[TrainState, Through], dict[str, float]] | None
  ended: Callable[[], bool] = lambda: False
  kept: Callable[[TrainState], TrainState] = lambda state: state
  scores: Callable[[int], dict[str, float] | None] = lambda step: None
  save_at: Collection[int] = ()
  flops: float = 0.0
  shown: Sequence[tuple[str, str]] = Progress.PRETRAINING
  images: NoImages = dataclasses.field(default_factory=NoImages)
  job: str = "pretrain"

  def evaluates_at(self, step: int, steps: int) -> bool:
    """Returns True if a run of `steps` is to be evaluated at this step."""
    due = step >= steps or (self.eval_every and step % self.eval_every == 0)
    return bool(self.evaluate and due)

  def saves_at(self, step: int) -> bool:
    """Returns True if this step's checkpoint is to be saved."""
    return step % self.save_every == 0 or step in self.save_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruments:
  """Saving, logging, timing and checking of a training loop.

  Attributes:
    save: saves states as checkpoints.
    writers: the writers of metrics, which stay open.
    progress: measures speed and formats the log's lines.
    clock: counts time by phase; ends in phase "checkpoint".
    profiler: the profiler, not entered yet.
    guard: checks the logged metrics.
  """

  save: saving.Saver
  writers: metrics.Writers
  progress: Progress
  clock: goodput.Clock
  profiler: Profiler
  guard: Guard

  def tell(self, step: int, values: dict[str, float]) -> None:
    """Writes a step's metrics, and prints them as a line."""
    self.writers.write(step, values)
    say(self.progress.line(step, values))

  def tell_training(self, step: int, values: dict[str, float], wait_seconds: float) -> None:
    """Reports a training step's metrics, and the speed."""
    measured = self.progress.measure(step)
    if measured:
      measured["data_wait"] = self.progress.share_waited(wait_seconds)
    self.tell(step, {**values, **measured})
    self.clock.note(step)

  def settle(self, step: int, values: dict[str, jax.Array] | None) -> None:
    """Waits for a dispatched step, and prints its line if there was none for a while; None: no step.

    At most two steps are in flight, so that a run that is to stop has little to wait for.
    """
    jax.block_until_ready(values)
    if values is not None and self.progress.due():
      shown = {name: float(value) for name, value in jax.device_get(values).items()}
      say(self.progress.line(step, shown | self.progress.speed(step)))

  def pause(self, function: Callable, phase: str, recurs: bool = False) -> Any:
    """Calls `function`, excluded from the measured speed and counted as `phase`.

    `recurs`: the remaining time includes as much for each evaluation to come.
    """
    paused = time.monotonic()
    with self.clock.phase(phase):
      result = function()
    self.progress.pause(time.monotonic() - paused, evaluated=recurs)
    return result


@dataclasses.dataclass(frozen=True)
class Outcome:
  """End of a training loop.

  Attributes:
    state: the last state, which has been saved.
    step: its step.
    stopped_by: the signal that stopped it; None: it ended by itself.
    asked_by: the signal that asked it to stop, if it came after the last step, too; None: none did.
  """

  state: TrainState
  step: int
  stopped_by: str | None
  asked_by: str | None


class _Logged:
  """The newest logged step, which is reported when the one after it has been dispatched."""

  def __init__(self, instruments: Instruments, batches: Feed):
    self._instruments, self._batches = instruments, batches
    self._step: tuple[int, dict[str, jax.Array], dict[str, np.ndarray]] | None = None

  def keep(self, step: int, values: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> None:
    self._step = step, values, batch

  def report(self, state: Callable[[], TrainState]) -> None:
    """Writes, prints and checks its metrics, once."""
    if self._step is None:
      return
    step, computed, batch = self._step
    self._step = None
    values = {name: float(value) for name, value in jax.device_get(computed).items()}
    self._instruments.tell_training(step, values, self._batches.wait_seconds)
    self._instruments.guard.look(step, values, state, batch)


def run(
  work: Work,
  train_state: TrainState,
  mesh: Mesh,
  steps: int,
  instruments: Instruments,
  stopped_by: str | None = None,
  evaluated: bool = True,
) -> Outcome:
  """Trains from `train_state` until `steps`, until `work.ended`, or until it is asked to stop.

  Args:
    work: the job's part.
    train_state: the initial state; its arrays are donated.
    mesh: the mesh of state and batches.
    steps: the number of steps of the whole run.
    instruments: saving, logging, timing and checking.
    stopped_by: a signal that has asked the run to stop already.
    evaluated: False if the checkpoint that it resumes from lacks an evaluation that was due.

  Raises:
    BadNumbers: raised by the guard; checkpoints under way are complete.
  """
  save_state, writers, clock = instruments.save, instruments.writers, instruments.clock
  stop, profiler = StopSignal(save_state.newest, stopped_by), instruments.profiler
  first_step = at_step = int(train_state.step)
  evaluated_at = first_step if evaluated else -1
  clock.reads(batches := work.batches(first_step))
  clock.enter("step")
  logged = _Logged(instruments, batches)
  flush = functools.partial(logged.report, lambda: train_state)

  def pause(function: Callable, phase: str, recurs: bool = False) -> Any:
    """Calls `function` when the device is idle, excluded from the measured speed."""
    flush()
    jax.block_until_ready(train_state)
    return instruments.pause(function, phase, recurs)

  def draw_images() -> None:
    if not stop.requested:  # the same on all processes
      pause(functools.partial(work.images, train_state, writers), "evaluation")

  def evaluate() -> None:
    nonlocal evaluated_at
    evaluation = functools.partial(_evaluation, work, train_state, stop)
    if (values := pause(evaluation, "evaluation", recurs=True)) is not None:
      evaluated_at = at_step
      instruments.tell(at_step, values)
      draw_images()

  def save() -> None:
    place = batches.place if at_step > first_step else None
    saving_it = functools.partial(_agree_and_save, instruments, train_state, at_step, place)
    pause(saving_it, "checkpoint")
    clock.saved(at_step)

  compiled = values = None
  with _settled(save_state, stop), stop, batches, profiler, jax.set_mesh(mesh):
    while at_step < steps and not work.ended() and not stop.asked(at_step):
      if at_step > first_step or not evaluated:
        if work.evaluates_at(at_step, steps):
          evaluate()
          if work.ended() or at_step > evaluated_at:
            break
        elif work.images.overdue():
          draw_images()
        if work.saves_at(at_step) or save_state.failed():
          save()
      if (read := stop.next(batches)) is None:
        break
      # Asynchronous: the transfer overlaps with the step before.
      batch = sharding.put_batch({name: read[name] for name in work.fields}, mesh)
      if compiled is None:
        agreement.check(at_step, batches.place)
        with clock.phase("compile"):
          compiled = _compiled(work, train_state, batch, mesh)
        stop.begin(at_step)
        instruments.progress.start(first_step, batches.wait_seconds)
      if profiler.due(at_step):
        pause(functools.partial(profiler.turn, at_step), "profile")
      if at_step > first_step and not stop.begins(at_step):
        break
      before = values
      with profiler.named(at_step), jax.transfer_guard("disallow"):
        train_state, values = compiled(train_state, batch)
      at_step += 1
      flush()
      instruments.settle(at_step - 1, before)
      if at_step % work.log_every == 0 or at_step == steps:
        logged.keep(at_step, values, read)
    flush()
    if profiler.tracing:
      pause(profiler.close, "profile")
    if at_step > evaluated_at and work.evaluates_at(at_step, steps):
      evaluate()
    save()
    clock.enter("checkpoint")  # it is still being written
    save_state.finish(train_state, at_step)
  done = work.ended() or (at_step >= steps and (not work.evaluate or evaluated_at == at_step))
  return Outcome(train_state, at_step, None if done else stop.requested, stop.requested)


def _evaluation(work: Work, at: TrainState, stop: StopSignal) -> dict[str, float] | None:
  """Returns the metrics of an evaluation; None if the run is to stop before its end, on all processes."""
  assert work.evaluate is not None
  if stop.requested:
    return None
  try:
    return work.evaluate(at, stop.through)
  except EvaluationStopped:
    return None


def _agree_and_save(
  instruments: Instruments, at: TrainState, at_step: int, place: Callable[[], dict] | None
) -> None:
  """Begins to save a state; all processes have come to the same one, if they have made a step (`place`)."""
  if place is not None:
    agreement.check(at_step, place, at.params)
  instruments.save(at, at_step, instruments.writers.sync)


def _compiled(work: Work, train_state: TrainState, batch: dict, mesh: Mesh):
  """Compiles the step for these arrays' shardings; raises UserError if it doesn't fit the devices."""
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), train_state)
  shardings = jax.tree.map(lambda x: x.sharding, train_state)
  with doing("compiling the training step", say, ends=False):
    compiled = compilation.compile_step(work.train_step, abstract, shardings, batch)
  say(f"{compiled.took}; {compiled.memory}")
  from_cache = hosts.gathered(np.int32(compiled.from_cache), "the compiled training step")
  if told := compilation_cache.of_hosts(from_cache):
    say(told)
  memory.check_step(compiled, mesh, work.job)
  return compiled


@contextlib.contextmanager
def _settled(save: saving.Saver, stop: StopSignal) -> Iterator[None]:
  """Completes checkpoints under way, and notes a request to stop, before the run goes back."""
  try:
    yield
  except BadNumbers as bad:
    bad.stopped_by = stop.requested
    save.settle()
    raise
