"""The workdir of a run: config.json is written when the run begins and compared when it is resumed.

Two things may change: a start that came to no checkpoint leaves nothing that binds the next one, and a
run may be given more steps, or fewer that it hasn't made yet, or another decay.
"""

import contextlib
import os
import tempfile
from typing import Any

from igpt_jax import __version__, buckets, checkpoint, files, history
from igpt_jax.config import saved
from igpt_jax.config.fields import Settings, as_json, decides, value_of
from igpt_jax.errors import BucketError, UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress, summary

# The setting that says how long a run of a kind is.
STEPS = {"pretraining": "train.steps", "finetuning": "finetune.steps"}
_OF_WSD = ("train.decay_steps", "train.decay_shape")
# The settings that say how it ends, which may change.
LENGTH = {
  "pretraining": (STEPS["pretraining"], *_OF_WSD),
  "finetuning": (STEPS["finetuning"],),
}
# A run resumes wherever the same data lies, and later jobs look for it there.
_PLACES_OF_DATA = ("data.path", "data.data_dir")
PROGRESS = "progress"  # folder of what a run makes of held-out images while it trains
_SKEW_SECONDS = 60  # by which a host's clock may differ from the bucket's without a word


def is_used(name: str, schedule: str) -> bool:
  """Returns False for a setting of the decay if the run's schedule has none."""
  return schedule == "wsd" or name not in _OF_WSD


def check(settings: Settings, workdir: str, kind: str = "pretraining") -> None:
  """Checks that a workdir holds no run but this one.

  Args:
    settings: this run's.
    workdir: the folder to check.
    kind: of training, "pretraining" or "finetuning"; settings that don't decide its numbers may differ.

  Raises:
    UserError: it holds a run with other settings, which are listed; one of a newer version with
      settings that this one doesn't have; or one that has made more steps than the settings'.
  """
  theirs = read(workdir)
  if theirs is None:
    return
  ours = files.flatten(as_json(settings))
  decisive = [name for name in sorted(ours.keys() | theirs.keys()) if decides(name, kind)]
  unknown = [f"  {name}: {theirs[name]}" for name in decisive if name not in ours]
  if unknown:
    raise UserError(
      f"workdir: {workdir} holds a run with settings that igpt_jax {__version__} doesn't have:\n"
      + "\n".join(unknown)
      + "\nfix: the newer igpt_jax that began it, or another --workdir"
    )
  ours = {name: ours[name] for name in decisive}
  made = checkpoint.latest_step(workdir)
  if made is not None and (name := STEPS[kind]) in theirs:
    before, steps = theirs[name], ours[name]
    for each in LENGTH[kind]:
      theirs.pop(each, None)
      ours.pop(each)
    if steps < made:
      raise UserError(
        f"config.{name}: {steps:,}; the run in {workdir} has made {made:,} steps; expected {made:,} or "
        f"more; fix: --config.{name}={before} goes on as it was begun; or another --workdir"
      )
  fix = "another --workdir, or the config that this run was begun with"
  files.check_same("workdir", f"{workdir} holds another config's run", theirs, ours, fix)


def read(workdir: str) -> dict[str, Any] | None:
  """Returns the settings of a workdir's run, "group.field" -> value, by today's names; None: no run.

  Raises:
    UserError: they can't be read, or are of a newer format.
  """
  return saved.read(os.path.join(workdir, saved.NAME), "workdir")


def claim(settings: Settings, workdir: str) -> None:
  """Writes config.json into a workdir without a begun run, which makes it this run's."""
  path = os.path.join(workdir, saved.NAME)
  if not (files.exists(path) and has_begun(workdir)):
    summary.write_json(path, {history.KEY: history.FORMAT, **as_json(settings)})


def keep_current(settings: Settings, workdir: str, kind: str) -> None:
  """Notes in config.json how a resumed run ends, and where its data lies, from now on."""
  stored = read(workdir)
  if stored is None:
    return
  names = (*LENGTH[kind], *_PLACES_OF_DATA)
  current = {name: value_of(settings, name) for name in names}
  if current != {name: stored.get(name) for name in names}:
    path = os.path.join(workdir, saved.NAME)
    config = files.read_json(path)
    config = history.upgraded(config, history.format_of(config, f"workdir: {path}"))
    for name, value in current.items():
      group, field = name.split(".")
      config[group][field] = value
    summary.write_json(path, {history.KEY: history.FORMAT, **config})


def forget_unbegun(settings: Settings, workdir: str, kind: str) -> None:
  """Removes what a start with other settings has left here, if it never came to a checkpoint.

  Collective: every process must call it.
  """
  if hosts.is_main() and files.exists(os.path.join(workdir, saved.NAME)):
    try:
      check(settings, workdir, kind)
    except UserError:
      if not has_begun(workdir):
        say(f"workdir: {workdir}: a start with other settings has left no checkpoint: begun afresh")
        for name in (*_palette_of_run(workdir), "metrics.jsonl", "goodput.json", saved.NAME):
          files.remove(os.path.join(workdir, name), missing_ok=True)
        files.remove_folder(os.path.join(workdir, PROGRESS))
  hosts.wait_for_all("workdir looked at")


def has_begun(workdir: str) -> bool:
  """True if a run here has made a checkpoint, even if it is damaged or has been deleted since."""
  folder = os.path.join(workdir, checkpoint.FOLDER)
  if any(not checkpoint.is_unfinished(folder, name) for name in files.names(folder)):
    return True
  if any(files.exists(os.path.join(workdir, name)) for name in ("training.json", "finetune.json")):
    return True
  try:
    return bool(files.read_json(os.path.join(workdir, "goodput.json"))["saved"])
  except FileNotFoundError:
    return False
  except (ValueError, LookupError, TypeError):
    return True


def _palette_of_run(workdir: str) -> tuple[str, ...]:
  """Returns the files of a palette that the run here has chosen; () if job fit_palette or a person did."""
  names = ("palette.npy", "palette.json")
  try:
    fitted = files.read_json(os.path.join(workdir, "palette.json"))
    return () if "mse_per_channel" in fitted else names
  except FileNotFoundError:
    pass
  except ValueError:
    return names
  with contextlib.suppress(UserError):
    stored = read(workdir) or {}
    return names if stored.get("palette.path") or stored.get("init_from") else ()
  return ()


def own_palette(workdir: str) -> str:
  """Returns the path of the palette that job fit_palette or a person has put into a workdir; "": there is none."""
  path = os.path.join(workdir, "palette.npy")
  return path if files.exists(path) and not _palette_of_run(workdir) else ""


def open_workdir(workdir: str) -> None:
  """Makes the workdir and checks that it can be written to.

  Raises:
    UserError: it can't be made or written to.
  """
  if files.is_remote(workdir):
    _check_bucket(workdir)
    return
  try:
    os.makedirs(workdir, exist_ok=True)
    # A random name: in containers, processes of several hosts may have the same pid.
    with tempfile.NamedTemporaryFile(dir=workdir, prefix=".writable."):
      pass
  except OSError as error:
    raise UserError(
      f"workdir: {workdir} can't be written to ({error.strerror}); fix: another --workdir"
    ) from None


def _check_bucket(workdir: str) -> None:
  """Checks that a workdir's bucket can be written to, and says if this host's clock differs from its.

  Raises:
    BucketError: it can't.
  """
  try:
    ahead = buckets.check_writable(workdir)
  except BucketError as error:
    raise BucketError(f"workdir: {error}", error.errno or 0) from None
  if abs(ahead) > _SKEW_SECONDS:
    say(
      f"workdir: this host's clock is {progress.format_seconds(abs(ahead))} "
      f"{'ahead of' if ahead > 0 else 'behind'} the bucket's; times in goodput.json are wrong by that, and "
      "credentials may be refused; fix: set the clock (chronyd, or ntpd)"
    )
