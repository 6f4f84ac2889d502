"""The workdir of a run: config.json is written when the run begins and compared when it is resumed."""

import os
import tempfile
from typing import Any

from igpt_jax import __version__, files, history
from igpt_jax.config import saved
from igpt_jax.config.fields import Settings, as_json, decides
from igpt_jax.errors import UserError
from igpt_jax.reporting import summary


def check(settings: Settings, workdir: str, kind: str = "pretraining") -> None:
  """Checks that a workdir holds no run but this one.

  Args:
    settings: this run's.
    workdir: the folder to check.
    kind: of training, "pretraining" or "finetuning"; settings that don't decide its numbers may differ.

  Raises:
    UserError: it holds a run with other settings, which are listed; or one of a newer version with
      settings that this one doesn't have.
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
  fix = "another --workdir, or the config that this run was begun with"
  files.check_same("workdir", f"{workdir} holds another config's run", theirs, ours, fix)


def read(workdir: str) -> dict[str, Any] | None:
  """Returns the settings of a workdir's run, "group.field" -> value, by today's names; None: no run.

  Raises:
    UserError: they can't be read, or are of a newer format.
  """
  return saved.read(os.path.join(workdir, saved.NAME), "workdir")


def claim(settings: Settings, workdir: str) -> None:
  """Writes config.json into a workdir that has none, which makes it this run's."""
  path = os.path.join(workdir, saved.NAME)
  if not os.path.exists(path):
    summary.write_json(path, {history.KEY: history.FORMAT, **as_json(settings)})


def open_workdir(workdir: str) -> None:
  """Makes the workdir and checks that it can be written to.

  Raises:
    UserError: it can't be made or written to.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
    # A random name: in containers, processes of several hosts may have the same pid.
    with tempfile.NamedTemporaryFile(dir=workdir, prefix=".writable."):
      pass
  except OSError as error:
    raise UserError(
      f"workdir: {workdir} can't be written to ({error.strerror}); fix: another --workdir"
    ) from None
