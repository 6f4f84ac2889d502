"""A job over every checkpoint of a run, beside its training, until that has ended.

What it leaves goes to WORKDIR/JOB/STEP; a step that is there already isn't done again. Only whole
checkpoints are looked at; one that the run deletes while it is being read is passed over.
"""

import json
import os
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from igpt_jax import checkpoint
from igpt_jax.errors import UserError
from igpt_jax.jobs import common
from igpt_jax.jobs.common import say

_ENDED = -1
_NOTHING_NEW = -2


def run(
  config: ConfigDict, workdir: str, result: str, one: Callable[[ConfigDict, str, str], None]
) -> None:
  """Does `one` for the checkpoint that the config names or, watching, for every one of a run.

  Args:
    config: of the job.
    workdir: the job's.
    result: name of the file that a job writes last.
    one: called with a config that names a checkpoint, the workdir, and where results go.

  Raises:
    UserError: there is nothing to watch.
  """
  if not config.watch:
    common.open_workdir(workdir)
    one(config, workdir, workdir)
    return
  watched = os.path.abspath(os.path.expanduser(config.checkpoint or workdir))
  if not os.path.isdir(watched):
    raise UserError(
      f"config.watch: {watched} doesn't exist; expected the workdir of a run, begun already; "
      "fix: --workdir, or --config.checkpoint=WORKDIR"
    )
  common.open_workdir(workdir)
  say(f"watching {watched}")
  news = time.monotonic()
  gone: set[int] = set()
  while True:
    step = _agree(_next(config, watched, workdir, result, gone, news))
    if step == _ENDED:
      return
    if step == _NOTHING_NEW:
      time.sleep(config.watch_seconds)
      continue
    news = time.monotonic()
    out = os.path.join(workdir, config.job, str(step))
    this = config.copy_and_resolve_references()
    this.checkpoint = checkpoint.path_of(watched, step)
    common.open_workdir(out)
    try:
      one(this, workdir, out)
    except (UserError, OSError):
      if step in checkpoint.whole_steps(watched):
        raise
      say(f"checkpoint {step} was deleted while it was being read: passed over")
      gone.add(step)


def _next(
  config: ConfigDict, watched: str, workdir: str, result: str, gone: set[int], news: float
) -> int:
  """The first step that isn't done; or that there is none yet, or will be none any more."""
  # Looked at before the checkpoints: the last of them is written before this is.
  ended = _training_has_ended(watched)
  for step in checkpoint.whole_steps(watched):
    done = os.path.exists(os.path.join(workdir, config.job, str(step), result))
    if not done and step not in gone:
      return step
  if ended:
    say(f"the training in {watched} has ended, every checkpoint of it is done")
    return _ENDED
  if config.watch_patience and time.monotonic() - news > config.watch_patience:
    say(f"no new checkpoint in {watched} for {config.watch_patience:g} s: not watching any more")
    return _ENDED
  return _NOTHING_NEW


def _training_has_ended(watched: str) -> bool:
  """Whether the run there has made all its steps."""
  found = {}
  for name in ("training.json", "config.json"):
    try:
      with open(os.path.join(watched, name), encoding="utf-8") as file:
        found[name] = json.load(file)
    except FileNotFoundError:
      return False
  return found["training.json"]["step"] >= found["config.json"]["train"]["steps"]


def _agree(step: int) -> int:
  """What the main process saw, on all."""
  if jax.process_count() == 1:
    return step
  return int(multihost_utils.broadcast_one_to_all(np.int32(step)))
