"""Where checkpoints lie, and which of them count: names and marks, none of their contents.

A checkpoint counts from when its last file is there. What a stopped copy or a killed run left behind
doesn't; nor does what was set aside, which has another name.
"""

import os

from orbax.checkpoint import v1 as ocp

from igpt_jax.errors import UserError

FOLDER = "checkpoints"
_LAST_FILE = "commit_success.txt"  # what orbax writes when all else is there


def is_finished(folder: str) -> bool:
  """Whether its writer came to the end."""
  return os.path.exists(os.path.join(folder, _LAST_FILE))


def is_whole(folder: str) -> bool:
  """Orbax takes any folder with a number for a checkpoint, also one that was copied halfway."""
  return is_finished(folder) and ocp.is_orbax_checkpoint(folder)


def folder_of_steps(path: str) -> str:
  return path if os.path.basename(path) == FOLDER else os.path.join(path, FOLDER)


def numbered(folder: str) -> list[int]:
  """What has a step's name in a folder of steps, whole or not, ascending."""
  if not os.path.isdir(folder):
    return []
  return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def whole_steps(workdir: str) -> list[int]:
  """Steps of a workdir's whole checkpoints, ascending; makes and removes nothing there."""
  folder = folder_of_steps(workdir)
  return [step for step in numbered(folder) if is_whole(os.path.join(folder, str(step)))]


def latest_step(workdir: str) -> int | None:
  """Step of the newest whole checkpoint in a workdir; makes and removes nothing there."""
  return max(whole_steps(workdir), default=None)


def path_of(workdir: str, step: int) -> str:
  """The folder of one checkpoint of a workdir."""
  return os.path.join(folder_of_steps(workdir), str(step))


def find(path: str) -> tuple[str, int]:
  """The folder of one checkpoint, and its step; `path` is a workdir or one checkpoint in it.

  Raises:
    UserError: there is none.
  """
  path = os.path.abspath(os.path.expanduser(path))
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
  """What to do where a checkpoint can't be used; names the whole ones beside it."""
  beside, name = os.path.split(folder)
  steps = [str(n) for n in whole_steps(beside)] if os.path.basename(beside) == FOLDER else []
  among = ", ".join(step for step in steps if step != name)
  return f"another step of the run{f' ({among})' if among else ''}, or copy it again"
