"""Checkpoints of a training run: saves, resumes from the newest good one, sets damaged ones aside.

A checkpoint gets its name when all of it is written, and older ones are deleted only after that, so
that a killed run loses none. Its files are flushed to the disk (fsync) before, but not its name: after
a power cut the newest checkpoint may be missing, or damaged on file systems where fsync guarantees
nothing (buckets, some networks). The damage is detected, and the checkpoint before it is used.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from igpt_jax import bucket_errors, files
from igpt_jax.checkpoint import file_sums, folders, in_buckets, reading
from igpt_jax.checkpoint.folders import FOLDER
from igpt_jax.checkpoint.process_wide import ignore_followup_errors
from igpt_jax.errors import BucketError, NewerFormat, UserError
from igpt_jax.files import sync
from igpt_jax.parallel import hosts
from igpt_jax.training.state import HEAD, TrainState

# Raised by orbax and its storage layers when a disk or a bucket fails.
SAVE_ERRORS = (OSError, ValueError, RuntimeError)

# Number of attempts to read a checkpoint before it is set aside, and the seconds between them.
_READS, _PAUSE_SECONDS = 2, 1

# A field of the state that is stored in the run, since older checkpoints lack it.
_SKIPPED = "skipped"


def _items(state: TrainState) -> dict[str, Any]:
  """Splits a state into stored items; the head is its own, so that the model can be read alone."""
  items = {
    "params": {name: leaf for name, leaf in state.params.items() if name != HEAD},
    "training": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
  }
  if HEAD in state.params:
    items["head"] = {HEAD: state.params[HEAD]}
  return items


class Resumed(NamedTuple):
  """Checkpoint that a run resumes from: its step, its run as saved, and its state on the devices."""

  step: int
  run: dict[str, Any]
  state: TrainState


def _sync_unnamed(folder: str) -> None:
  """Flushes a checkpoint's files to the disk before the checkpoint gets its name."""
  for name in os.listdir(folder):
    if ".orbax-checkpoint-tmp" in name:
      for parent, _, inside in os.walk(os.path.join(folder, name)):
        for file in (*inside, ""):  # "" for the folder itself
          sync(os.path.join(parent, file))


@contextlib.contextmanager
def _told(folder: str) -> Iterator[None]:
  """Raises errors of a bucket's requests, which aren't errors of files, as BucketError, which is one.

  Raises:
    SAVE_ERRORS: as they come.
  """
  try:
    yield
  except SAVE_ERRORS:
    raise
  except Exception as error:
    if not files.is_remote(folder):
      raise
    raise bucket_errors.in_words(folder, error) from error


class Checkpoints:
  """The checkpoints of one training run.

  Args:
    workdir: the run's workdir.
    keep: number of the newest checkpoints to keep.
    keep_every: also keep checkpoints whose step is a multiple of this; 0: none.
    keep_steps: also keep the checkpoints of these steps.
    keep_best: also keep the first checkpoint with the largest score of this name; "": none.
    say: called with a message about every checkpoint that is set aside.
    patience: seconds that a process waits for the others during a save; 0: orbax' 20 minutes.

  Raises:
    UserError: there are checkpoints, but none is readable.
  """

  def __init__(
    self,
    workdir: str,
    *,
    keep: int = 3,
    keep_every: int = 0,
    keep_steps: Collection[int] = (),
    keep_best: str = "",
    say: Callable[[str], None] = lambda message: None,
    patience: float = 0.0,
  ):
    self._folder = os.path.join(files.place("workdir", workdir), FOLDER)
    self._say, self._patience = say, patience
    policies = ocp.training.preservation_policies
    preserve: list[Any] = [policies.LatestN(keep)]
    if keep_every:
      preserve.append(policies.EveryNSteps(keep_every))
    if keep_steps:
      preserve.append(policies.CustomSteps(tuple(keep_steps)))
    if keep_best:

      def rank(scores) -> Any:  # orbax asks for a float, but takes any comparable value
        return scores[keep_best], -scores["step"]

      best = policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False)
      preserve.append(best)
    self._preserve: Any = policies.AnyPreservationPolicy(preserve)
    self._score = keep_best
    self._begun = False
    self._error: BaseException | None = None
    self._made_room = False  # a checkpoint is set aside until this step is saved
    if hosts.is_main():
      folders.put_back(self._folder)
    hosts.wait_for_all("checkpoints put back")
    self._set_aside_unreadable()
    self._checkpointer = self._open()
    self._until_closed = contextlib.ExitStack()
    self._until_closed.enter_context(ignore_followup_errors)

  def _open(self) -> ocp.training.Checkpointer:
    context, folder = ocp.Context(), self._folder
    # If folders were created in the background, a failure would surface only after a wait.
    context.asynchronous.create_directories_asynchronously = False
    if self._patience and jax.process_count() > 1:
      context.asynchronous.timeout_secs = max(math.ceil(self._patience), 10)
    if files.is_remote(folder):
      in_buckets.mend()
    else:
      context.asynchronous.post_finalization_callback = lambda: _sync_unnamed(folder)
    with _told(folder):
      return ocp.training.Checkpointer(
        folder, context=context, preservation_policy=self._preserve, cleanup_tmp_directories=True
      )

  @property
  def folder(self) -> str:
    return self._folder

  def kept(self) -> str:
    """Lists the complete checkpoints, for a message."""
    steps = folders.whole_steps(self._folder)
    return f"whole ones: {', '.join(map(str, steps))}" if steps else "there is no whole one yet"

  def latest(self) -> int | None:
    """Returns the step of the newest complete checkpoint, or None."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  def scores(self) -> dict[int, float | None]:
    """Returns the score of `keep_best`, or None, of every step, including the one being written."""
    stored = {checkpoint.step: checkpoint.metrics for checkpoint in self._checkpointer.checkpoints}
    return {step: cast(dict, scores or {}).get(self._score) for step, scores in stored.items()}

  def resume(
    self,
    abstract: TrainState,
    shardings: TrainState,
    check: Callable[[int, dict[str, Any]], object] = lambda step, run: None,
  ) -> Resumed | None:
    """Reads the newest good checkpoint; returns None if there are no checkpoints.

    Those after it are damaged: they are reported and set aside, since the run will write them again.

    Args:
      abstract, shardings: the state's shapes and dtypes, and the sharding of every leaf.
      check: called with step and run before the arrays are read; may raise to refuse a checkpoint.

    Raises:
      UserError: there are checkpoints, but none is good; they stay as they are.
    """
    why: dict[int, str] = {}
    for step in reversed([checkpoint.step for checkpoint in self._checkpointer.checkpoints]):
      run, error = _read_again(functools.partial(self.read_run, step))
      if error:
        why[step] = error
        continue
      check(step, run)
      state, error = _read_again(functools.partial(self.restore, step, abstract, shardings))
      if error:
        why[step] = error
        continue
      if why:
        self._checkpointer.close()
        self._set_aside(why)
        self._checkpointer = self._open()
      return Resumed(step, run, state)
    if why:
      raise reading.none_is_good(self._folder, why)
    return None

  def _make_room(self, step: int) -> None:
    """Sets a whole checkpoint aside until its step has been saved again. Collective."""
    self._checkpointer.close()
    if hosts.is_main():
      folders.make_room(self._path_of(step))
    hosts.wait_for_all("room for a checkpoint")
    self._checkpointer, self._made_room = self._open(), True

  def _set_aside_unreadable(self) -> None:
    """Renames unfinished and damaged steps, so that a run can write them again.

    Orbax takes any numbered folder for a checkpoint, and reads a part of every one. An unfinished step
    before a finished one was being deleted when a run was killed. All processes read the same and come
    to the same result; the main process acts on it.
    """
    paths = {step: self._path_of(step) for step in folders.numbered(self._folder)}
    finished = [step for step, path in paths.items() if folders.is_finished(path)]
    newest, damaged = max(finished, default=0), {}
    for step in finished:
      _, error = _read_again(functools.partial(reading.check_readable, paths[step]))
      if error:
        damaged[step] = error
    if damaged and len(damaged) == len(finished):
      raise reading.none_is_good(self._folder, damaged)
    hosts.wait_for_all("checkpoints looked at")
    unfinished = [step for step in paths if step not in finished]
    # In a bucket, a killed run leaves what it was writing under the checkpoint's own name.
    left = [step for step in unfinished if step < newest or files.is_remote(self._folder)]
    if hosts.is_main():
      for step in left:
        folders.remove(paths[step])
    why = "it was never finished, its last file isn't there"
    self._set_aside({step: why for step in unfinished if step not in left}, "unfinished")
    self._set_aside(damaged)

  def _set_aside(self, why: dict[int, str], suffix: str = "damaged") -> None:
    for step in why if hosts.is_main() else ():
      source = self._path_of(step)
      target = f"{source}.{suffix}"
      folders.remove(target)
      folders.move(source, target)
      self._say(f"checkpoint {step} is set aside as {target}: {why[step]}")
    hosts.wait_for_all(f"{suffix} checkpoints set aside")

  def save(
    self,
    state: TrainState,
    *,
    palette: np.ndarray | None,
    run: dict[str, Any],
    scores: dict[str, float] | None = None,
  ) -> None:
    """Begins to write `state` under its step; the arrays are copied before this returns.

    A step that is there already stays, unless it was stopped before it got the scores it has now.

    Args:
      state: training state, with or without a head.
      palette: float32 [k, 3], or None.
      run: as in `CheckpointInfo`, with "classes" if there is a head.
      scores: this step's scores, for `keep_best`.

    Raises:
      SAVE_ERRORS: it can't be written, or the one before wasn't; `reopen`, and try again.
    """
    step = int(state.step)
    again = step == self.latest()
    if again and (scores is None or self.scores().get(step) is not None):
      return
    self.wait()
    items = _items(state)
    run = run | {_SKIPPED: [int(n) for n in jax.device_get(state.skipped)]}
    if palette is not None:
      items["palette"] = {"centers": np.asarray(palette, np.float32)}
    metrics = None if scores is None else {**scores, "step": step}
    if again:
      self._make_room(step)
    self._begun = True
    sums = file_sums.of_items(items) | file_sums.of_metrics(metrics)
    stored_run = file_sums.with_sums(run, sums)
    # `force`: also if the step comes before an existing one.
    with _told(self._folder):
      self._checkpointer.save_checkpointables_async(
        step, items, force=True, custom_metadata=stored_run, metrics=metrics
      )

  def read_run(self, step: int) -> dict[str, Any]:
    """Reads the run that was saved at `step`."""
    with reading.reading(self._path_of(step)):
      return self._read_run_and_sums(step)[0]

  def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
    """Reads the state at `step` onto devices by `shardings`; another mesh may have written it.

    Raises:
      UserError: it can't be read, or isn't what was saved.
    """
    folder, loaded = self._path_of(step), {}
    with reading.reading(folder):
      run, sums = self._read_run_and_sums(step)
      # One item at a time: orbax doesn't await the others if one of several fails.
      for name, item in _items(reading.with_shardings(abstract, shardings)).items():
        loaded[name] = self._checkpointer.load_checkpointables(step, {name: item})[name]
    file_sums.check(folder, sums, loaded)
    skipped = np.asarray(run.get(_SKIPPED, (0, 0)), np.int32)
    return TrainState(
      params=loaded["params"] | loaded.get("head", {}),
      skipped=jax.device_put(skipped, shardings.skipped),
      **loaded["training"],
    )

  def failed(self) -> bool:
    """True if the last save is known to have failed; doesn't block. With several processes, use `wait`."""
    if not self._begun or jax.process_count() > 1 or self.is_saving():
      return False
    with contextlib.suppress(*SAVE_ERRORS):
      self.wait()
    return self._error is not None

  def is_saving(self) -> bool:
    """True while a save is being written in the background."""
    return self._checkpointer.is_saving_in_progress()

  def wait(self) -> None:
    """Waits until every save that was begun is on the disk.

    Raises:
      SAVE_ERRORS: a save has failed; `reopen`, and save again.
    """
    if self._error is None:
      try:
        # Not how long it took: goodput says so.
        with _told(self._folder), reading.quiet(logging.ERROR):
          self._checkpointer.wait()
      except SAVE_ERRORS as error:
        self._error = error  # orbax raises it only once
        # Keep ignoring follow-up errors, which may come at any time until the process ends.
        self._until_closed.pop_all()
    if self._error is not None:
      raise self._error
    self._begun = False
    if self._made_room and hosts.is_main():
      folders.put_back(self._folder)
    self._made_room = False

  def reopen(self) -> None:
    """Continues after an error: removes half-written checkpoints; complete ones stay."""
    self._checkpointer = self._open()
    self._begun, self._error = False, None

  def close(self) -> None:
    """Waits for the last save, and releases orbax' resources; raises SAVE_ERRORS as `wait`."""
    self.wait()
    self._checkpointer.close()
    self.let_go()

  def let_go(self) -> None:
    """Undoes process-wide changes, without waiting; call it when nothing is being saved any more."""
    self._until_closed.close()

  def _path_of(self, step: int) -> str:
    return os.path.join(self._folder, str(step))

  def _read_run_and_sums(self, step: int) -> tuple[dict[str, Any], dict[str, str]]:
    stored = self._checkpointer.checkpointables_metadata(step).custom_metadata
    return file_sums.without_sums(self._path_of(step), stored)


def _read_again(read: Callable[[], Any]) -> tuple[Any, str]:
  """Returns `read()`, or the error if it has failed twice on some process. Collective."""
  error: UserError | None = None
  for attempt in range(_READS):
    time.sleep(_PAUSE_SECONDS if attempt else 0)
    try:
      value, error = read(), None
    except NewerFormat:
      raise  # on every process; the checkpoint isn't damaged, so don't set it aside
    except UserError as caught:
      value, error = None, caught
    if not hosts.on_any(error is not None, "a look at a checkpoint"):
      return value, ""
  if hosts.on_any(isinstance(error, BucketError), "a look at the bucket"):  # nor is it damaged
    raise error or BucketError("checkpoint: another process can't read the bucket", errno.EIO)
  return None, str(error or "another process can't read it")
