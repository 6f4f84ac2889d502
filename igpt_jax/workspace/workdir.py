"""Whose run a workdir holds: its config.json, written when a run begins, compared when one goes on."""

import json
import os
import tempfile
from typing import Any

from igpt_jax import __version__, files, history
from igpt_jax.config.fields import Settings, as_json, decides
from igpt_jax.errors import UserError
from igpt_jax.reporting import summary


def check(settings: Settings, workdir: str, kind: str = "pretraining") -> None:
  """Checks that a workdir which holds a run holds this one.

  Args:
    settings: of this run.
    workdir: to look into.
    kind: of training, "pretraining" or "finetuning": what doesn't decide its numbers may differ.

  Raises:
    UserError: it holds another config's run, the fields that differ are listed; or a newer version's,
      that had settings which this one can't heed.
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
  mine = {name: ours[name] for name in decisive}
  fix = "another --workdir, or the config that this run was begun with"
  files.check_same("workdir", f"{workdir} holds another config's run", theirs, mine, fix)


def read(workdir: str) -> dict[str, Any] | None:
  """The settings of a workdir's run, "part.field" -> value, by today's names; None: it holds none.

  Raises:
    UserError: they can't be read, or are of a newer format.
  """
  path = os.path.join(workdir, "config.json")
  try:
    with open(path, encoding="utf-8") as file:
      config = json.load(file)
    number = history.format_of(config, f"workdir: {path}")
    return files.flatten(history.upgraded(config, number))
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f"workdir: {path} can't be read ({error.strerror}); expected a file") from None
  except (ValueError, TypeError, AttributeError) as error:  # what isn't JSON, or not of this shape
    raise UserError(f"workdir: {path} is damaged ({error}); fix: another --workdir") from None


def claim(settings: Settings, workdir: str) -> None:
  """Writes config.json into a workdir that has none: from now on it is this run's."""
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    summary.write_json(path, {history.KEY: history.FORMAT, **as_json(settings)})


def open_workdir(workdir: str) -> None:
  """Makes the workdir.

  Raises:
    UserError: it can't be made or written to.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
    # A name of its own: in containers the processes of all hosts may have one number.
    with tempfile.NamedTemporaryFile(dir=workdir, prefix=".writable."):
      pass
  except OSError as error:
    raise UserError(
      f"workdir: {workdir} can't be written to ({error.strerror}); fix: another --workdir"
    ) from None
