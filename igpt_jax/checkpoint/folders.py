"""Finds checkpoints' folders, and which of them are complete, by names and marker files alone.

A checkpoint is complete when its last file exists, unlike what an interrupted copy or a killed run has
left; checkpoints that were set aside have other names. On a disk, a checkpoint that is being written has
a temporary name; in a bucket, which can't rename, it only lacks its last file, and what moves or removes
a checkpoint writes that file last and removes it first.
"""

import os

from orbax.checkpoint import v1 as ocp

from igpt_jax import files
from igpt_jax.errors import UserError

FOLDER = "checkpoints"
_LAST_FILE = "commit_success.txt"  # orbax writes it last
_REPLACED = ".replaced"  # at the end of the name of one that is being saved again
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written to a disk


def is_finished(folder: str) -> bool:
  """Returns True if the folder's writer has finished."""
  return files.exists(os.path.join(folder, _LAST_FILE))


def is_unfinished(folder: str, name: str) -> bool:
  """Returns True if this name in a folder of checkpoints is that of one whose writing hasn't ended."""
  if files.is_remote(folder) and name.isdigit():
    return not is_finished(os.path.join(folder, name))
  return _UNFINISHED in name


def move(source: str, target: str) -> None:
  """Renames a checkpoint to a name that isn't taken; a reader sees a whole one or none."""
  files.move_folder(source, target, _LAST_FILE)


def copy(source: str, target: str) -> None:
  """Copies a checkpoint to a name that isn't taken."""
  files.copy_folder(source, target, _LAST_FILE)


def remove(folder: str) -> None:
  """Removes a checkpoint, if it is there; in a bucket, a reader sees a whole one or none."""
  files.remove_folder(folder, _LAST_FILE)


def make_room(folder: str) -> None:
  """Sets a whole checkpoint aside, so that its step can be saved again; `put_back` ends that."""
  move(folder, f"{folder}{_REPLACED}")


def put_back(folder: str) -> None:
  """Removes the checkpoints that `make_room` has set aside, or puts them back if they weren't saved again."""
  for name in files.names(folder):
    if name.endswith(_REPLACED):
      aside = os.path.join(folder, name)
      path = aside.removesuffix(_REPLACED)
      if is_finished(path):
        remove(aside)
      else:
        remove(path)
        move(aside, path)


def is_whole(folder: str) -> bool:
  """Returns True if a checkpoint is complete. (Orbax itself accepts any numbered folder.)"""
  return is_finished(folder) and ocp.is_orbax_checkpoint(folder)


def folder_of_steps(path: str) -> str:
  return path if os.path.basename(path) == FOLDER else os.path.join(path, FOLDER)


def numbered(folder: str) -> list[int]:
  """Returns the steps in a folder of checkpoints, complete or not, ascending."""
  return sorted(int(name) for name in files.names(folder) if name.isdigit())


def whole_steps(workdir: str) -> list[int]:
  """Returns the steps of a workdir's complete checkpoints, ascending; writes nothing."""
  folder = folder_of_steps(workdir)
  return [step for step in numbered(folder) if is_whole(os.path.join(folder, str(step)))]


def latest_step(workdir: str) -> int | None:
  """Returns the step of a workdir's newest complete checkpoint, or None; writes nothing."""
  return max(whole_steps(workdir), default=None)


def path_of(workdir: str, step: int) -> str:
  """Returns the folder of one checkpoint of a workdir."""
  return os.path.join(folder_of_steps(workdir), str(step))


def find(path: str) -> tuple[str, int]:
  """Returns a checkpoint's folder and step; `path` is a workdir (its newest one) or one checkpoint.

  Raises:
    UserError: there is no complete checkpoint.
  """
  path = files.place("checkpoint", path)
  if os.path.basename(path).isdigit() and is_whole(path):
    return path, int(os.path.basename(path))
  newest = latest_step(path)
  if newest is not None:
    return path_of(path, newest), newest
  raise UserError(
    f"checkpoint: no checkpoint in {path}; expected a workdir in which "
    "`--config.job=pretrain` has run; fix: --config.checkpoint=WORKDIR or WORKDIR/checkpoints/STEP"
  )


def advice(folder: str) -> str:
  """Returns advice on what to use instead of a checkpoint, with the complete ones beside it."""
  if os.path.isfile(folder):
    return "copy it again, or install igpt_jax again if it came with that"
  beside, name = os.path.split(folder)
  steps = [str(n) for n in whole_steps(beside)] if os.path.basename(beside) == FOLDER else []
  others = ", ".join(step for step in steps if step != name)
  return f"another step of the run{f' ({others})' if others else ''}, or copy it again"
