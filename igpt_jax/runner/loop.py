"""The training loop, of every job that trains.

For every step: evaluate? → save? → next batch → step → the last step's metrics → asked to stop? At
the end: evaluate, save. What is evaluated, saved and trained is the job's; nothing here knows a
model or a loss.
"""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from igpt_jax.parallel import sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import metrics
from igpt_jax.reporting.progress import Progress
from igpt_jax.runner import goodput, saving
from igpt_jax.runner.guard import Guard
from igpt_jax.training import compilation
from igpt_jax.training.bad_numbers import BadNumbers
from igpt_jax.training.profiling import Profiler
from igpt_jax.training.state import TrainState
from igpt_jax.workspace import agreement, memory


class Feed(Protocol):
  """This host's rows, batch by batch; `pipeline.Batches`, or what is used like them.

  Attributes:
    wait_seconds: time that was spent waiting for batches.
  """

  wait_seconds: float

  def place(self) -> dict[str, str]: ...

  def __next__(self) -> dict[str, np.ndarray]: ...

  def __enter__(self) -> Any: ...

  def __exit__(self, *unused) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What a job trains, how often it looks at it, and what it says of it.

  Attributes:
    train_step: (state, batch) -> (state, metrics), compiled here.
    batches: step -> this host's rows from that step on.
    fields: of a batch, that the step takes.
    batch_size: of a step, all hosts together.
    log_every, eval_every, save_every: steps between two; eval_every 0: at the end only.
    describe: step -> what the checkpoint of that step says.
    evaluate: state -> numbers, to be written down; None: nothing is held out to evaluate on.
    ended: asked after each evaluation whether to end before the last step.
    kept: state -> what a checkpoint holds of it.
    scores: step -> numbers by which the best checkpoint is kept; None: it has none.
    flops: of training on one image; 0: not known.
    shown: metrics that a line tells, in order, and how.
  """

  train_step: Callable
  batches: Callable[[int], Feed]
  fields: tuple[str, ...]
  batch_size: int
  log_every: int
  eval_every: int
  save_every: int
  describe: Callable[[int], dict[str, Any]]
  evaluate: Callable[[TrainState], dict[str, float]] | None
  ended: Callable[[], bool] = lambda: False
  kept: Callable[[TrainState], TrainState] = lambda state: state
  scores: Callable[[int], dict[str, float] | None] = lambda step: None
  flops: float = 0.0
  shown: Sequence[tuple[str, str]] = Progress.PRETRAINING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruments:
  """What goes on beside the training.

  Attributes:
    save: writes states, under their steps.
    writers: of metrics; they stay open.
    progress: what a log's speed and line come from.
    clock: of where the time goes; left in the phase of checkpoints.
    profiler: not entered yet.
    guard: shown what is logged.
  """

  save: saving.Saver
  writers: metrics.Writers
  progress: Progress
  clock: goodput.Clock
  profiler: Profiler
  guard: Guard

  def tell(self, step: int, values: dict[str, float]) -> None:
    """Writes a step's numbers down, and says them in a line."""
    self.writers.write(step, values)
    say(self.progress.line(step, values))

  def tell_training(self, step: int, values: dict[str, float], wait_seconds: float) -> None:
    """Tells a training step's metrics, and how fast training is."""
    measured = self.progress.measure(step)
    if measured:
      measured["data_wait"] = self.progress.share_waited(wait_seconds)
    self.tell(step, {**values, **measured})
    self.clock.note(step)

  def pause(self, function: Callable, phase: str) -> Any:
    """Calls `function` outside the measured speed, its time counted as `phase`."""
    paused = time.monotonic()
    with self.clock.phase(phase):
      result = function()
    self.progress.pause(time.monotonic() - paused)
    return result


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run of the loop ended.

  Attributes:
    state: the last one, saved.
    step: its number.
    stopped_by: the signal that ended it; None: it has ended by itself.
  """

  state: TrainState
  step: int
  stopped_by: str | None


class StopSignal:
  """Turns SIGTERM into a wish that the loop looks at between two steps.

  Several processes must stop at the same step, whoever was signalled and when: there jax' own
  handler takes the signal, and agrees on a step with the others in the background. (Where main has
  left that out, the signal ends the process.)
  """

  def __init__(self):
    self.requested: str | None = None
    self._previous: Any = None

  def asked(self, at_step: int) -> str | None:
    """The signal's name if the run is to stop before step `at_step`; ask before every step."""
    serves = jax.config.jax_enable_preemption_service  # pyright: ignore[reportAttributeAccessIssue]
    agrees = jax.process_count() > 1 and serves
    if agrees and multihost_utils.reached_preemption_sync_point(at_step):
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


def run(
  work: Work, train_state: TrainState, mesh: Mesh, steps: int, instruments: Instruments
) -> Outcome:
  """Trains from `train_state` until `steps`, until `work.ended`, or until it is asked to stop.

  Args:
    work: what to do.
    train_state: where to begin; its arrays are donated.
    mesh: where state and batches lie.
    steps: of the whole run.
    instruments: what goes on beside it.

  Raises:
    BadNumbers: as the guard has it; what was begun to be saved is saved, and the writers are closed.
  """
  save_state, writers = instruments.save, instruments.writers
  clock, profiler, stop = instruments.clock, instruments.profiler, StopSignal()
  first_step = at_step = int(train_state.step)
  batches = work.batches(first_step)
  clock.reads(batches)
  clock.enter("step")
  # A step's number, its metrics, and the batch that they are of.
  pending: tuple[int, dict[str, jax.Array], dict[str, np.ndarray]] | None = None

  def flush() -> None:
    """Writes the metrics that were left one step behind."""
    nonlocal pending
    if pending is None:
      return
    of_step, values, of_batch = pending
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    pending = None
    instruments.tell_training(of_step, values, batches.wait_seconds)
    instruments.guard.look(of_step, values, lambda: train_state, of_batch)

  def pause(function: Callable, phase: str) -> Any:
    """Does something beside the training, outside the measured speed."""
    flush()
    jax.block_until_ready(train_state)
    return instruments.pause(function, phase)

  def evaluation_due() -> bool:
    return bool(work.evaluate and work.eval_every) and at_step % work.eval_every == 0

  evaluated_at = first_step  # what a run goes on from has been evaluated

  def evaluate() -> None:
    nonlocal evaluated_at
    assert work.evaluate, "it is called only where there is one"
    evaluated_at = at_step
    values = pause(functools.partial(work.evaluate, train_state), "evaluation")
    instruments.tell(at_step, values)

  def agree_and_save() -> None:
    if at_step > first_step:
      agreement.check(at_step, batches.place, train_state.params)
    save_state(train_state, at_step, writers.sync)

  def save() -> None:
    pause(agree_and_save, "checkpoint")
    clock.saved(at_step)

  compiled = None
  with _settled(save_state, writers), stop, batches, profiler, jax.set_mesh(mesh):
    while at_step < steps and not work.ended() and not stop.asked(at_step):
      if at_step > first_step:
        if evaluation_due():
          evaluate()
          if work.ended():
            break
        if at_step % work.save_every == 0 or save_state.failed():
          save()
      # Only begun here: it travels while the device is still at the step before.
      read = next(batches)
      batch = sharding.put_batch({name: read[name] for name in work.fields}, mesh)
      if compiled is None:
        agreement.check(at_step, batches.place)
        with clock.phase("compile"):
          compiled = _compiled(work.train_step, train_state, batch, mesh)
        instruments.progress.start(first_step, batches.wait_seconds)
      if profiler.due(at_step):
        pause(functools.partial(profiler.turn, at_step), "profile")
      with profiler.named(at_step), jax.transfer_guard("disallow"):
        train_state, values = compiled(train_state, batch)
      at_step += 1
      flush()
      if at_step % work.log_every == 0 or at_step == steps:
        pending = at_step, values, read
    flush()
    if profiler.tracing:
      pause(profiler.close, "profile")
    # Also when stopped: what is saved at a step has been evaluated at it, so resuming owes nothing.
    at_end = work.evaluate is not None and at_step >= steps
    if at_step > evaluated_at and (at_end or evaluation_due()):
      evaluate()
    save()
    clock.enter("checkpoint")  # which is still being written
    save_state.finish(train_state, at_step)
  done = at_step >= steps or work.ended()
  return Outcome(train_state, at_step, None if done else stop.requested)


def _compiled(train_step: Callable, train_state: TrainState, batch: dict, mesh: Mesh):
  """The step, compiled for arrays that lie as these do; a UserError where it doesn't fit."""
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), train_state)
  shardings = jax.tree.map(lambda x: x.sharding, train_state)
  compiled = compilation.compile_step(train_step, abstract, shardings, batch)
  say(f"compiled in {compiled.seconds:.0f} s; {compiled.memory}")
  memory.check_step(compiled, mesh)
  return compiled


@contextlib.contextmanager
def _settled(save: saving.Saver, writers: metrics.Writers) -> Iterator[None]:
  """Leaves nothing under way where the run goes back and begins anew."""
  try:
    yield
  except BadNumbers:
    save.settle()
    writers.close()
    raise
