"""A job over every checkpoint of a run, beside its training, until that has ended.

What it leaves goes to WORKDIR/JOB/STEP, with made_from.json: the checkpoint's contents, by checksum, and
the settings that decide the results. A step that is there already, made from the same, isn't done
again. One that is of something else (the run went back and wrote that step again, or another setting
was asked for) is done again, and what was there is put aside as STEP.before. Only whole checkpoints are
looked at; one that the run deletes while it is being read is passed over.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from igpt_jax import checkpoint, files, history
from igpt_jax.config.fields import Settings
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import summary
from igpt_jax.workspace import provenance, rollbacks, weights
from igpt_jax.workspace import workdir as workdir_lib

MADE_FROM = "made_from.json"

# What decides a step's results: "checkpoint", "settings"; and whose it is: "run", "seeds".
MadeFrom = dict[str, Any]

_ENDED = -1
_NOTHING_NEW = -2


def run(
  settings: Settings,
  workdir: str,
  result: str,
  one: Callable[[Settings, str, str], None],
  decisive: Callable[[Settings], dict[str, Any]],
) -> MadeFrom | None:
  """Does `one` for the checkpoint that the settings name or, watching, for every one of a run.

  Args:
    settings: of the job.
    workdir: the job's.
    result: name of the JSON file that a job writes last.
    one: called with settings that name a checkpoint, the workdir, and where results go.
    decisive: all but the checkpoint that decides the results, JSON.

  Returns:
    What the results of the last checkpoint watched were made from; None: none was.

  Raises:
    UserError: there is nothing to watch.
  """
  if not settings.watch:
    workdir_lib.open_workdir(workdir)
    one(settings, workdir, workdir)
    return None
  watched = os.path.abspath(os.path.expanduser(settings.checkpoint or workdir))
  if not os.path.isdir(watched):
    raise UserError(
      f"config.watch: {watched} doesn't exist; expected the workdir of a run, begun already; "
      "fix: --workdir, or --config.checkpoint=WORKDIR"
    )
  workdir_lib.open_workdir(workdir)
  say(f"watching {watched}")
  watch = _Watch(settings, watched, os.path.join(workdir, settings.job), result, decisive(settings))
  while True:
    step = hosts.from_main(watch.next() if hosts.is_main() else 0)
    if step == _ENDED:
      return watch.last
    if step == _NOTHING_NEW:
      time.sleep(settings.watch_seconds)
      continue
    this = dataclasses.replace(settings, checkpoint=checkpoint.path_of(watched, step))
    try:
      one(this, workdir, watch.begin(step))
    except (UserError, OSError):
      if step in checkpoint.whole_steps(watched):
        raise
      watch.pass_over(step)


class _Watch:
  """Which steps of a run are done, and which is next: the main process says, all do.

  Args:
    settings: of the job.
    watched: the run's workdir.
    folder: where the steps' results go.
    result: name of the file that the job writes last.
    decisive: settings that decide the results.

  Attributes:
    last: what the newest checkpoint seen would be made from.
  """

  def __init__(
    self, settings: Settings, watched: str, folder: str, result: str, decisive: dict[str, Any]
  ):
    self._settings, self._patience = settings, settings.watch_patience
    self._watched, self._folder = watched, folder
    self._result, self._decisive = result, decisive
    self._gone: set[int] = set()
    self._news = time.monotonic()
    self._rollbacks = 0  # of the run, that have been acted upon
    self.last: MadeFrom = {}  # on the main process, from `next` on

  def next(self) -> int:
    """The first step that isn't done; or that there is none yet, or will be none any more."""
    self._put_abandoned_aside()
    # Looked at before the checkpoints: the last of them is written before this is.
    ended = _training_has_ended(self._watched)
    for step in checkpoint.whole_steps(self._watched):
      if step in self._gone:
        continue
      made_from = self._made_from(step)
      if made_from is None:
        continue
      self.last = made_from
      if not self._is_done(step, made_from):
        return step
    if ended:
      say(f"the training in {self._watched} has ended, every checkpoint of it is done")
      return _ENDED
    if self._patience and time.monotonic() - self._news > self._patience:
      say(f"no new checkpoint in {self._watched} for {self._patience:g} s: not watching any more")
      return _ENDED
    return _NOTHING_NEW

  def begin(self, step: int) -> str:
    """Where the results of the step that `next` said go: a folder that holds nothing of anything else.

    Raises:
      UserError, OSError: it can't be made; on all processes.
    """
    self._news = time.monotonic()
    out = os.path.join(self._folder, str(step))
    error: Exception | None = None
    if hosts.is_main():
      try:
        differing = _differing(out, self.last)
        if differing:
          _put_aside(out, "is of another checkpoint or other settings", differing)
        workdir_lib.open_workdir(out)
        summary.write_json(os.path.join(out, MADE_FROM), self.last)
      except (UserError, OSError) as caught:
        error = caught
    if hosts.on_any(error is not None):
      raise error or UserError(
        f"config.watch: {out} can't be begun by the main process; fix: see what that one says"
      )
    return out

  def _put_abandoned_aside(self) -> None:
    """Steps that the run went back behind have no numbers any more, until they are written again."""
    count = len(rollbacks.rollback_steps(self._watched))
    if count == self._rollbacks:
      return
    self._rollbacks = count
    names = os.listdir(self._folder) if os.path.isdir(self._folder) else []
    for step in (int(name) for name in names if name.isdigit()):
      out = os.path.join(self._folder, str(step))
      kept = _read_made_from(out)
      seeds = kept["seeds"] if kept else None
      if seeds and rollbacks.is_abandoned(self._watched, seeds[0], seeds[1], step):
        _put_aside(out, "is of a step that the run went back behind")

  def pass_over(self, step: int) -> None:
    """Leaves a step out from now on."""
    say(f"checkpoint {step} was deleted while it was being read: passed over")
    self._gone.add(step)

  def _made_from(self, step: int) -> MadeFrom | None:
    """What the step's results are to be made from; None: it has been deleted meanwhile."""
    try:
      found = checkpoint.describe(checkpoint.path_of(self._watched, step))
      found = weights.with_palette(found, self._settings)
      return {
        "checkpoint": provenance.of_checkpoint(found),
        "run": provenance.of_run(found),
        "seeds": provenance.seeds_of(found),
        "settings": self._decisive,
      }
    except (UserError, OSError):
      if step in checkpoint.whole_steps(self._watched):
        raise
      return None

  def _is_done(self, step: int, made_from: MadeFrom) -> bool:
    out = os.path.join(self._folder, str(step))
    return results(out, self._result) is not None and not _differing(out, made_from)


def results_like(out: str, result: str, made_from: MadeFrom) -> dict[str, Any] | None:
  """What a job left of a step of the same run with the same settings and colours; None: nothing."""
  same = {name: made_from[name] for name in ("run", "settings")}
  same["checkpoint"] = {"palette": made_from["checkpoint"]["palette"]}
  return None if _differing(out, same) else results(out, result)


def results(out: str, result: str) -> dict[str, Any] | None:
  """What a job left of a step; None: nothing, or it is damaged."""
  try:
    return files.read_json(os.path.join(out, result))
  except FileNotFoundError:
    return None
  except ValueError as error:
    say(f"{os.path.join(out, result)} is damaged ({error})")
    return None


def _differing(out: str, made_from: MadeFrom) -> list[str]:
  """How a folder of results, if there is one, is of something else than this, in lines."""
  kept = _read_made_from(out)
  if kept is None:
    return ["  it doesn't say what of"] if os.path.isdir(out) and os.listdir(out) else []
  return files.differing(kept, made_from)


def _read_made_from(out: str) -> MadeFrom | None:
  """What a folder of results says it was made from; None: it doesn't say."""
  try:
    kept = files.read_json(os.path.join(out, MADE_FROM))
  except (FileNotFoundError, ValueError):
    return None
  if not kept.keys() >= {"checkpoint", "run", "seeds", "settings"}:
    return None
  return {**kept, "settings": history.with_todays_names(kept["settings"])}


def _put_aside(out: str, why: str, lines: Sequence[str] = ()) -> None:
  before = f"{out}.before"
  shutil.rmtree(before, ignore_errors=True)
  os.rename(out, before)
  say("\n".join([f"{out} {why}: put aside as {before}", *lines]))


def _training_has_ended(watched: str) -> bool:
  """Whether the run there has made all its steps.

  Raises:
    UserError: what says so is damaged.
  """
  path = os.path.join(watched, "training.json")
  try:
    made = int(files.read_json(path)["step"])
  except FileNotFoundError:
    return False
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"config.watch: {path} is damaged ({type(error).__name__}: {error}); fix: copy it again, or "
      "run the training again, which writes it"
    ) from None
  of_run = workdir_lib.read(watched)
  return of_run is not None and made >= of_run["train.steps"]
