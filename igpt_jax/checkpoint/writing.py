"""Checkpoints of a training run: saving, resuming from the newest good one, setting damaged ones aside.

What is promised, and what isn't: a checkpoint gets its name when all of it is written, and older ones
are deleted only then, so that a killed run loses none. Its files are told to go to the disk (fsync)
before that, as far as the file system keeps such a promise (buckets and networks may not); the name
itself is not, so that a power cut may take the newest checkpoint away, or, on a file system without
such a promise, leave a damaged one. That one is noticed, and the one before is used.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from igpt_jax.checkpoint import file_sums, folders, reading
from igpt_jax.checkpoint.folders import FOLDER
from igpt_jax.checkpoint.process_wide import ignore_followup_errors
from igpt_jax.errors import NewerFormat, UserError
from igpt_jax.files import sync
from igpt_jax.parallel import hosts
from igpt_jax.training.state import HEAD, TrainState

# Raised by orbax and its storage layers when a disk or a bucket fails.
SAVE_ERRORS = (OSError, ValueError, RuntimeError)

# How often a checkpoint is read before it is set aside, and the seconds between.
_READS, _PAUSE_SECONDS = 2, 1

_SKIPPED = (
  "skipped"  # a field of the state that is stored in the run, since older checkpoints lack it
)


def _items(state: TrainState) -> dict[str, Any]:
  """Splits a state into stored items; model and head apart, so that the model can be read alone."""
  items = {
    "params": {name: leaf for name, leaf in state.params.items() if name != HEAD},
    "training": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
  }
  if HEAD in state.params:
    items["head"] = {HEAD: state.params[HEAD]}
  return items


@dataclasses.dataclass(frozen=True)
class Resumed:
  """A checkpoint that a run resumes from.

  Attributes:
    step: of the checkpoint.
    run: as it was saved.
    state: put where it was asked for.
  """

  step: int
  run: dict[str, Any]
  state: TrainState


def _sync_unnamed(folder: str) -> None:
  """Flushes a checkpoint's files to the disk before the checkpoint gets its name."""
  for name in os.listdir(folder):
    if ".orbax-checkpoint-tmp" in name:
      for parent, _, files in os.walk(os.path.join(folder, name)):
        for each in (*files, ""):
          sync(os.path.join(parent, each))


class Checkpoints:
  """The checkpoints of one training run.

  Args:
    workdir: of the run.
    keep: how many of the newest to keep.
    keep_every: keep those whose step is a multiple of this, too; 0: none.
    keep_best: keep, too, the first of those whose score of this name is largest; "": by no score.
    say: told what is set aside, and why.
    patience: seconds that one of several processes waits for the others while a save is written; 0:
      orbax' own 20 minutes.

  Raises:
    UserError: there are checkpoints, and none of them can be read.
  """

  def __init__(
    self,
    workdir: str,
    *,
    keep: int = 3,
    keep_every: int = 0,
    keep_best: str = "",
    say: Callable[[str], None] = lambda message: None,
    patience: float = 0.0,
  ):
    self._folder = os.path.join(os.path.abspath(workdir), FOLDER)
    self._say, self._patience = say, patience
    policies = ocp.training.preservation_policies
    preserve: list[Any] = [policies.LatestN(keep)]
    if keep_every:
      preserve.append(policies.EveryNSteps(keep_every))
    if keep_best:
      preserve.append(
        policies.BestN(
          # Any comparable value will do.
          get_metric_fn=cast(Any, lambda scores: (scores[keep_best], -scores["step"])),
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._preserve: Any = policies.AnyPreservationPolicy(preserve)
    self._score = keep_best
    self._begun = False
    self._error: BaseException | None = None
    self._set_aside_unreadable()
    self._checkpointer = self._open()
    self._until_closed = contextlib.ExitStack()
    self._until_closed.enter_context(ignore_followup_errors)

  def _open(self) -> ocp.training.Checkpointer:
    context, folder = ocp.Context(), self._folder
    # Created in the background, a folder's failure would surface only after a wait.
    context.asynchronous.create_directories_asynchronously = False
    if self._patience and jax.process_count() > 1:
      context.asynchronous.timeout_secs = max(math.ceil(self._patience), 10)
    context.asynchronous.post_finalization_callback = lambda: _sync_unnamed(folder)
    return ocp.training.Checkpointer(
      self._folder,
      context=context,
      preservation_policy=self._preserve,
      cleanup_tmp_directories=True,
    )

  @property
  def folder(self) -> str:
    return self._folder

  def kept(self) -> str:
    """Describes the complete checkpoints in words."""
    steps = folders.whole_steps(self._folder)
    return f"whole ones: {', '.join(map(str, steps))}" if steps else "there is no whole one yet"

  def latest(self) -> int | None:
    """Step of the newest whole checkpoint."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  def scores(self) -> dict[int, float | None]:
    """The score of `keep_best` by step, of whole checkpoints and the one being written; None: it has none."""
    stored = {checkpoint.step: checkpoint.metrics for checkpoint in self._checkpointer.checkpoints}
    return {step: cast(dict, scores or {}).get(self._score) for step, scores in stored.items()}

  def resume(
    self,
    abstract: TrainState,
    shardings: TrainState,
    check: Callable[[int, dict[str, Any]], object] = lambda step, run: None,
  ) -> Resumed | None:
    """The newest good checkpoint; None: there is none at all.

    Those after it are damaged: they are told and set aside, for the run will write them again.

    Args:
      abstract, shardings: of the state, and where each leaf of it goes.
      check: may refuse a checkpoint's step and run before its arrays are read.

    Raises:
      UserError: there are checkpoints, and none is good; they stay as they are.
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

  def _set_aside_unreadable(self) -> None:
    """Renames incomplete steps, so that a run can write them again.

    Orbax takes any folder with a number for a checkpoint, and reads a little of each. What isn't
    finished and older than what is, was being deleted when a run was killed. All processes read the
    same, and know what is good; one of them acts.
    """
    unfinished: dict[int, str] = {}
    deleted: list[str] = []
    damaged: dict[int, str] = {}
    steps = folders.numbered(self._folder)
    finished = {n for n in steps if folders.is_finished(os.path.join(self._folder, str(n)))}
    for step in steps:
      path = os.path.join(self._folder, str(step))
      if step not in finished:
        if step < max(finished, default=0):
          deleted.append(path)
          continue
        unfinished[step] = "it was never finished, its last file isn't there"
        continue
      _, error = _read_again(functools.partial(reading.check_readable, path))
      if error:
        damaged[step] = error
    if damaged and len(damaged) == len(finished):
      raise reading.none_is_good(self._folder, damaged)
    hosts.wait_for_all("checkpoints looked at")
    for path in deleted if jax.process_index() == 0 else ():
      shutil.rmtree(path, ignore_errors=True)
    self._set_aside(unfinished, "unfinished")
    self._set_aside(damaged)

  def _set_aside(self, why: dict[int, str], suffix: str = "damaged") -> None:
    for step in why if jax.process_index() == 0 else ():
      source = os.path.join(self._folder, str(step))
      target = f"{source}.{suffix}"
      shutil.rmtree(target, ignore_errors=True)
      os.rename(source, target)
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

    Args:
      state: with or without a head.
      palette: the colours, if known.
      run: of `CheckpointInfo`; "classes" names those of a head.
      scores: of this step, for `keep_best`.

    Raises:
      SAVE_ERRORS: it can't be written, or the one before wasn't; `reopen`, and try again.
    """
    step = int(state.step)
    if step == self.latest():
      return
    self.wait()
    items = _items(state)
    run = run | {_SKIPPED: [int(n) for n in jax.device_get(state.skipped)]}
    if palette is not None:
      items["palette"] = {"centers": np.asarray(palette, np.float32)}
    metrics = None if scores is None else {**scores, "step": step}
    self._begun = True
    self._checkpointer.save_checkpointables_async(
      step,
      items,
      force=True,  # also if the step comes before an existing one
      custom_metadata=file_sums.with_sums(
        run, file_sums.of_items(items) | file_sums.of_metrics(metrics)
      ),
      metrics=metrics,
    )

  def read_run(self, step: int) -> dict[str, Any]:
    """The run as it was saved at `step`."""
    folder = os.path.join(self._folder, str(step))
    with reading.reading(folder):
      return file_sums.without_sums(
        folder, self._checkpointer.checkpointables_metadata(step).custom_metadata
      )[0]

  def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
    """The state at `step`, each leaf put where `shardings` says, whatever mesh wrote it.

    Raises:
      UserError: it can't be read, or isn't what was saved.
    """
    folder = os.path.join(self._folder, str(step))
    target = _items(reading.with_shardings(abstract, shardings))
    with reading.reading(folder):
      stored = self._checkpointer.checkpointables_metadata(step).custom_metadata
      # Orbax reads items one after the other, too, but leaves coroutines about when one of them fails.
      loaded = {
        name: self._checkpointer.load_checkpointables(step, {name: item})[name]
        for name, item in target.items()
      }
    run, expected = file_sums.without_sums(folder, stored)
    file_sums.check(folder, expected, loaded)
    skipped = np.asarray(run.get(_SKIPPED, (0, 0)), np.int32)
    return TrainState(
      params=loaded["params"] | loaded.get("head", {}),
      skipped=jax.device_put(skipped, shardings.skipped),
      **loaded["training"],
    )

  def failed(self) -> bool:
    """Non-blocking: True if the last save is known to have failed. With several processes only `wait` knows."""
    if not self._begun or jax.process_count() > 1 or self._checkpointer.is_saving_in_progress():
      return False
    with contextlib.suppress(*SAVE_ERRORS):
      self.wait()
    return self._error is not None

  def wait(self) -> None:
    """Returns when everything that was begun is on disk.

    Raises:
      SAVE_ERRORS: it isn't, and won't be; `reopen`, and save again.
    """
    if self._error is None:
      try:
        self._checkpointer.wait()
      except SAVE_ERRORS as error:
        self._error = error  # orbax raises it only once
        # Its follow-up errors may come at any time until the process ends.
        self._until_closed.pop_all()
    if self._error is not None:
      raise self._error
    self._begun = False

  def reopen(self) -> None:
    """Continues after an error: removes half-written checkpoints; complete ones stay."""
    self._checkpointer = self._open()
    self._begun, self._error = False, None

  def close(self) -> None:
    """Waits for the last save, and releases orbax' resources.

    Raises:
      SAVE_ERRORS: as `wait`.
    """
    self.wait()
    self._checkpointer.close()
    self.let_go()

  def let_go(self) -> None:
    """Undoes process-wide changes, without waiting; for when nothing is being saved any more."""
    self._until_closed.close()


def _read_again(read: Callable[[], Any]) -> tuple[Any, str]:
  """Returns `read()` of every process, or its error after two attempts: a network may fail once."""
  error = ""
  for attempt in range(_READS):
    time.sleep(_PAUSE_SECONDS if attempt else 0)
    try:
      value, error = read(), ""
    except NewerFormat:
      raise  # on every process; the checkpoint itself is complete, so it isn't set aside
    except UserError as caught:
      value, error = None, str(caught)
    if not hosts.on_any(bool(error)):
      return value, ""
  return None, error or "another process can't read it"
