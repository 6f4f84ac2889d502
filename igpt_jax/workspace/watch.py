"""Runs a job on every checkpoint of a training run, beside the training, until that has ended.

Results go to WORKDIR/FOLDER/STEP (the folder is the job's name or one that it chooses), with made_from.json: the checkpoint's contents, by checksum, and the
settings that decide the results. A step whose results were made from the same isn't repeated. If they
were made from something else (the run went back and wrote that step again, or settings changed), they
are moved to STEP.before and the step is repeated. Only complete checkpoints are used; one that is
deleted while it is being read is skipped.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from igpt_jax import checkpoint, files, history
from igpt_jax.config.fields import Settings
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import summary
from igpt_jax.workspace import branches, checkpoint_tokens, provenance, rollbacks
from igpt_jax.workspace import workdir as workdir_lib

MADE_FROM = "made_from.json"

# What a step's results were made from: "checkpoint", "settings", and the "run" and its "seeds".
MadeFrom = dict[str, Any]

_ENDED = -1
_NOTHING_NEW = -2


def run(
  settings: Settings,
  workdir: str,
  result: str,
  one: Callable[[Settings, str, str], None],
  decisive: Callable[[Settings], dict[str, Any]],
  folder: str = "",
) -> MadeFrom | None:
  """Runs `one` on the checkpoint that the settings name or, if they say watch, on every one of a run.

  Args:
    settings: the job's.
    workdir: the job's.
    result: the name of the JSON file that the job writes last.
    one: called with settings that name a checkpoint, the workdir, and the folder of results, which it
      makes once the checkpoint is found, unless it watches.
    decisive: returns all that decides the results except the checkpoint, as JSON.
    folder: the workdir's folder of the watched checkpoints' results; "": the job's name.

  Returns:
    What the results of the last watched checkpoint were made from; None: none was watched.

  Raises:
    UserError: there is nothing to watch.
  """
  if not settings.watch:
    one(settings, workdir, workdir)
    return None
  watched = files.place("config.checkpoint", settings.checkpoint or workdir)
  _wait_for_run(settings, watched)
  workdir_lib.open_workdir(workdir)
  say(f"watching {watched}")
  folder = os.path.join(workdir, folder or settings.job)
  watch = _Watch(settings, watched, folder, result, decisive(settings))
  while True:
    step = hosts.from_main(watch.next() if hosts.is_main() else 0, "the next checkpoint")
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


def _wait_for_run(settings: Settings, watched: str) -> None:
  """Waits until a workdir is there, `watch_patience` seconds at most; 0: not at all.

  Raises:
    UserError: it isn't.
  """
  began, patience = time.monotonic(), settings.watch_patience
  if patience and not files.is_folder(watched):
    say(f"waiting for a run to begin in {watched}, {patience:g} s at most")
  while not files.is_folder(watched):
    if time.monotonic() - began >= patience:
      raise UserError(
        f"config.watch: {watched} doesn't exist; expected the workdir of a run, begun already; "
        "fix: --workdir, or --config.checkpoint=WORKDIR; or wait for it, with --config.watch_patience=SECONDS"
      )
    time.sleep(settings.watch_seconds)


class _Watch:
  """The steps of a run that are done, and the next one, which the main process chooses.

  Attributes:
    last: what the results of the newest checkpoint are made from.
  """

  def __init__(
    self, settings: Settings, watched: str, folder: str, result: str, decisive: dict[str, Any]
  ):
    self._settings, self._patience = settings, settings.watch_patience
    self._watched, self._folder = watched, folder
    self._result, self._decisive = result, decisive
    self._gone: set[int] = set()
    self._news = time.monotonic()
    self._turns = (0, 0)  # of the run's rollbacks and decays put aside, those handled so far
    self.last: MadeFrom = {}  # on the main process, from `next` on

  def next(self) -> int:
    """Returns the first step that isn't done, _NOTHING_NEW, or _ENDED."""
    self._put_abandoned_aside()
    # Asked before the checkpoints are listed: the last one is written before the run ends.
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
    """Makes the folder for the results of the step that `next` returned, without older results.

    Raises:
      UserError, OSError: it can't be made; on all processes.
    """
    self._news = time.monotonic()
    out = os.path.join(self._folder, str(step))
    error: Exception | None = None
    if hosts.is_main():
      try:
        if differing := _differing(out, self.last):
          _put_aside(out, "is of another checkpoint or other settings", differing)
        workdir_lib.open_workdir(out)
        summary.write_json(os.path.join(out, MADE_FROM), self.last)
      except (UserError, OSError) as caught:
        error = caught
    if hosts.on_any(error is not None, "the beginning of a checkpoint's results"):
      raise error or UserError(
        f"config.watch: {out} can't be begun by the main process; fix: see what that one says"
      )
    return out

  def _put_abandoned_aside(self) -> None:
    """Moves results of steps away that the run went back behind, after bad numbers or to train longer."""
    back, decays = rollbacks.rollback_steps(self._watched), branches.put_aside(self._watched)
    turns = len(back), sum(map(len, decays.values()))
    if turns == self._turns:
      return
    self._turns = turns
    self._gone.clear()  # the run makes these steps again
    for step in (int(name) for name in files.names(self._folder) if name.isdigit()):
      out = os.path.join(self._folder, str(step))
      kept = _read_made_from(out)
      seed, order = kept["seeds"] if kept else (0, 0)
      if kept and rollbacks.is_abandoned(self._watched, seed, order, step):
        _put_aside(out, "is of a step that the run went back behind")
      elif kept and kept["checkpoint"]["parameters"] in map(_checksum, decays.get(step, ())):
        _put_aside(out, "is of a decay that the run has put aside")

  def pass_over(self, step: int) -> None:
    """Skips a step from now on."""
    say(f"checkpoint {step} was deleted while it was being read: passed over")
    self._gone.add(step)

  def _made_from(self, step: int) -> MadeFrom | None:
    """Returns what the step's results will be made from; None: it has been deleted."""
    try:
      info = checkpoint.describe(checkpoint.path_of(self._watched, step))
      info = checkpoint_tokens.with_palette(info, self._settings)
      return {
        "checkpoint": provenance.of_checkpoint(info),
        "run": provenance.of_run(info),
        "seeds": provenance.seeds_of(info),
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
  """Returns a step's results if they are of the same run, settings and palette; else None."""
  same = {name: made_from[name] for name in ("run", "settings")}
  same["checkpoint"] = {"palette": made_from["checkpoint"]["palette"]}
  return None if _differing(out, same) else results(out, result)


def results(out: str, result: str) -> dict[str, Any] | None:
  """Returns a step's results; None: there are none, or they are damaged."""
  try:
    return files.read_json(os.path.join(out, result))
  except FileNotFoundError:
    return None
  except ValueError as error:
    say(f"{os.path.join(out, result)} is damaged ({error})")
    return None


def _differing(out: str, made_from: MadeFrom) -> list[str]:
  """Returns lines that say how a folder of results was made from something else; [] if it wasn't."""
  kept = _read_made_from(out)
  if kept is None:
    return ["  it doesn't say what of"] if files.names(out) else []
  return files.differing(kept, made_from)


def _read_made_from(out: str) -> MadeFrom | None:
  """Returns what a folder's results were made from; None: unknown."""
  try:
    kept = files.read_json(os.path.join(out, MADE_FROM))
  except (FileNotFoundError, ValueError):
    return None
  if not kept.keys() >= {"checkpoint", "run", "seeds", "settings"}:
    return None
  return {**kept, "settings": history.with_todays_names(kept["settings"])}


def _checksum(path: str) -> str:
  return provenance.of_checkpoint(checkpoint.describe(path))["parameters"]


def _put_aside(out: str, why: str, lines: Sequence[str] = ()) -> None:
  before = f"{out}.before"
  files.remove_folder(before)
  files.move_folder(out, before)
  say("\n".join([f"{out} {why}: put aside as {before}", *lines]))


def _training_has_ended(watched: str) -> bool:
  """True if the run there has made all its steps.

  Raises:
    UserError: its training.json is damaged.
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
  settings = workdir_lib.read(watched)
  return settings is not None and made >= settings["train.steps"]
