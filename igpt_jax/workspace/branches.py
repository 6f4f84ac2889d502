"""Branches of a run: the decays that a WSD run has left to train longer, and runs that go on elsewhere.

With train.schedule=wsd a run is a trunk, which is the same at every length, and a decay. To train longer
it goes on from the trunk's end. The decay that it leaves becomes a workdir of its own, which any job
reads:

  WORKDIR/decays/FROM-STEPS-SHAPE/  with -2, -3, … if the run has left one like it before
    checkpoints, progress           those after the trunk's last checkpoint
    config.json, metrics.jsonl, …   as they were at its end
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

from igpt_jax import checkpoint, files
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import metrics
from igpt_jax.training.optimizer import OptimizerConfig
from igpt_jax.workspace import rollbacks
from igpt_jax.workspace import workdir as workdir_lib

FOLDER = "decays"
# What a run is, beside its checkpoints; and what it has told of itself.
_OF_RUN = ("config.json", "palette.npy", "palette.json", "sizing.json", "metrics.jsonl")
_TOLD = ("incidents.jsonl", "goodput.json", "loss.png", "summary.md")
_RESULT = "training.json"


def trunk_ends(config: OptimizerConfig) -> tuple[int, ...]:
  """Returns the steps at which a run's decay begins; () with a schedule that has none."""
  return () if config.decays_from is None else (config.decays_from,)


def put_aside(workdir: str) -> dict[int, list[str]]:
  """Returns the paths of checkpoints in decays that a run has left, by their steps."""
  folder, paths = os.path.join(workdir, FOLDER), {}
  for name in files.names(folder):
    for step in checkpoint.whole_steps(os.path.join(folder, name)):
      paths.setdefault(step, []).append(checkpoint.path_of(os.path.join(folder, name), step))
  return paths


def leave_decay(
  workdir: str, config: OptimizerConfig, check: Callable[[int, dict[str, Any]], object]
) -> None:
  """Puts the decay that a run is in, or has ended with, aside if the run is to have another.

  Its checkpoints are moved one by one, the oldest first: a run that is killed meanwhile can still go
  on as it was, or do this again. Collective.

  Args:
    workdir: the run's, locked, with its checkpoints not yet opened.
    config: what the run is to be from now on.
    check: (step, run); raises UserError to refuse the checkpoint that the run is to go on from.

  Raises:
    UserError: no checkpoint of the trunk is left, or the new decay would begin before the newest.
  """
  if config.decays_from is None:
    return
  old, after, trunk = None, [], None
  for step in reversed(checkpoint.whole_steps(workdir)):
    try:
      run = checkpoint.describe(checkpoint.path_of(workdir, step)).run
    except UserError:  # damaged: opening the checkpoints says so
      after.append(step)
      continue
    theirs = _ending(run)
    if old is None and theirs == _ending_of(config):
      return
    if step <= theirs[0]:
      trunk = step
      check(step, run)
      break
    old = old or theirs
    after.append(step)
  _refuse(workdir, config, trunk, old)
  decayed = [] if old is None else sorted(step for step in after if step > old[0])
  target = "" if old is None else _place(workdir, old, decayed[0])
  hosts.wait_for_all("decay looked at")
  if old is None:
    return
  if hosts.is_main():
    _move(workdir, target, old[0], decayed)
  hosts.wait_for_all("decay put aside")
  say(
    f"going back to step {trunk:,}, before the decay; that from step {old[0]:,} to {decayed[-1]:,} is put "
    f"aside as {target}, a workdir of its own"
  )


def _ending(run: dict[str, Any]) -> tuple[int, int, str]:
  """Returns where the decay of a checkpoint's run begins, where it ends, and its shape."""
  train = run["config"]["train"]
  names = ("steps", "schedule", "decay_steps", "decay_shape")
  return _ending_of(OptimizerConfig(learning_rate=1.0, **{name: train[name] for name in names}))


def _ending_of(config: OptimizerConfig) -> tuple[int, int, str]:
  assert config.decays_from is not None
  return config.decays_from, config.steps, config.decay_shape


def _refuse(workdir: str, config: OptimizerConfig, trunk: int | None, old: Any) -> None:
  """Raises UserError if a run can't come to this decay from its newest checkpoint before the old one."""
  assert config.decays_from is not None
  begins = (
    f"train.steps: {config.steps}; its decay of {config.steps - config.decays_from} begins at step "
    f"{config.decays_from}"
  )
  if old is not None and trunk is None:
    raise UserError(
      f"{begins}; the run in {workdir} has no checkpoint from before its decay, at step {old[0]}; "
      "expected one to go on from; fix: the settings that it was begun with, or another --workdir"
    )
  if trunk is not None and trunk > config.decays_from:
    most = config.steps - trunk
    fewer = f"train.decay_steps={most}, or more train.steps" if most else "more train.steps"
    raise UserError(
      f"{begins}; the run in {workdir} has made {trunk} steps without decay; expected one that begins "
      f"there or later; fix: {fewer}; or another --workdir"
    )


def _place(workdir: str, ending: tuple[int, int, str], first: int) -> str:
  """Returns the workdir for a decay whose oldest checkpoint is `first`: a free one, or where a move was begun."""
  target = os.path.join(workdir, FOLDER, "-".join(map(str, ending)))
  names = itertools.chain([target], (f"{target}-{n}" for n in itertools.count(2)))
  # The oldest are moved first: a killed move has left older ones there.
  return next(name for name in names if all(s < first for s in checkpoint.whole_steps(name)))


def _move(workdir: str, target: str, since: int, steps: Iterable[int]) -> None:
  """Moves these checkpoints, and images after the step `since`, into another workdir, beside copies."""
  files.make_folder(os.path.join(target, checkpoint.FOLDER))
  _copy(workdir, target, (*_OF_RUN, *_TOLD))
  with contextlib.suppress(FileNotFoundError):  # moved first: for watchers the run hasn't ended
    files.move(os.path.join(workdir, _RESULT), os.path.join(target, _RESULT))
  drawn, images = (os.path.join(each, workdir_lib.PROGRESS) for each in (workdir, target))
  for name in files.names(drawn):
    if (step := os.path.splitext(name)[0]).isdigit() and int(step) > since:
      files.make_folder(images)
      files.move(os.path.join(drawn, name), os.path.join(images, name))
  for step in steps:
    checkpoint.move(checkpoint.path_of(workdir, step), checkpoint.path_of(target, step))
  files.sync(os.path.join(target, checkpoint.FOLDER))


def _copy(workdir: str, target: str, names: Iterable[str]) -> None:
  for name in names:
    source, copy = os.path.join(workdir, name), os.path.join(target, name)
    if name == "metrics.jsonl":
      metrics.copy(source, copy)
    elif files.exists(source):
      files.copy(source, copy)


def branch(workdir: str, step: int, target: str) -> None:
  """Copies a run, as it was at one of its checkpoints, into a new workdir, where it can go on otherwise.

  `runner.pretraining.pretrain` with the run's settings, and other `train.steps` or another decay, then
  goes on there as the run itself would: with the same parameters, optimizer, data order and metrics. The
  run may be training meanwhile. Collective; nothing is left if it fails, but in a bucket if it is killed.

  Args:
    workdir: the run's.
    step: the checkpoint's; with train.schedule=wsd one from before the decay.
    target: the new workdir, which mustn't exist.

  Raises:
    UserError: the checkpoint doesn't exist, or was deleted meanwhile; or `target` exists.
  """
  source = checkpoint.path_of(workdir, step)
  steps = checkpoint.whole_steps(workdir)
  if step not in steps:
    kept = ", ".join(map(str, steps)) or "none"
    raise UserError(f"checkpoint: {source} doesn't exist; expected a step of the run's: {kept}")
  hosts.wait_for_all("checkpoint found")
  if hosts.is_main():
    with files.new_folder(target, "workdir") as part:
      _copy(workdir, part, _OF_RUN)
      metrics.JsonlWriter(os.path.join(part, "metrics.jsonl"), step).close()
      rollbacks.copy(workdir, part, step)
      try:
        checkpoint.copy(source, checkpoint.path_of(part, step))
      except OSError:
        if step in checkpoint.whole_steps(workdir):
          raise
      if step not in checkpoint.whole_steps(workdir):
        raise UserError(f"checkpoint: {source} was deleted while it was copied; fix: a kept one")
  hosts.wait_for_all("branched")
