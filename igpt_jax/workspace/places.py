"""Checks of the workdir: a folder, outside of those that the job's inputs are read from."""

import fnmatch
import glob
import os
import pathlib

from igpt_jax import buckets, files
from igpt_jax.config.fields import FIELDS, Settings, value_of
from igpt_jax.data import photo_folder
from igpt_jax.errors import UserError

_GRID = "grid.png"  # job `complete` writes it into the workdir itself


def check(settings: Settings, workdir: str) -> None:
  """Checks the workdir of any job, before anything is read or made.

  Args:
    settings: of the job.
    workdir: its absolute path.

  Raises:
    UserError: a file is in the way, its name isn't UTF-8, or a job would read its results as input.
  """
  try:
    workdir.encode()
  except UnicodeEncodeError:
    raise UserError(
      f"--workdir: {files.printable(workdir)} isn't UTF-8; expected a name that checkpoints can be written under; fix: "
      "another --workdir"
    ) from None
  _check_buckets(settings, workdir)
  above = workdir
  while not (files.is_remote(above) or os.path.lexists(above)):
    above = os.path.dirname(above)
  if buckets.is_object(above) if files.is_remote(above) else not os.path.isdir(above):
    raise UserError(
      f"--workdir: {workdir}: {above} isn't a folder; expected one, or a path where one can be made; "
      "fix: another --workdir"
    )
  images = settings.complete.images
  if settings.job == "complete" and images and _would_read(images, workdir):
    raise UserError(
      f"--workdir: {workdir} lies within config.complete.images {images}: the results would be read "
      "as images; fix: another --workdir"
    )
  data = settings.data
  if data.name == "folder" and files.is_remote(data.path):  # all of it is copied
    if _is_within(workdir, data.path):
      raise UserError(
        f"--workdir: {workdir} lies within data.path {data.path}: the results would be read as images; "
        "fix: another --workdir"
      )
  elif data.name == "folder" and not files.is_remote(workdir):
    inside = os.path.relpath(os.path.realpath(workdir), _real(data.path)).split(os.sep)
    is_read = _is_within(workdir, data.path)
    # The run's own images mustn't make classes of splits.
    also = inside[0] if is_read and inside[0] != "." else ""
    if photo_folder.has_splits(pathlib.Path(_real(data.path)), data.validation_split, also):
      is_read = inside[0] in (*photo_folder.SPLIT_FOLDERS, data.validation_split)
    if is_read:
      raise UserError(
        f"--workdir: {workdir} lies within data.path {data.path}: the results would be read as "
        f"images{'' if inside[0] == '.' else f' of {inside[0]}'}; fix: another --workdir"
      )


def _check_buckets(settings: Settings, workdir: str) -> None:
  """Raises BucketError if a bucket that the job reads or writes isn't there or can't be read."""
  files.check_reachable("--workdir", workdir)
  for name, declaration in FIELDS.items():
    if declaration.bucket and settings.job in declaration.jobs:
      files.check_reachable(f"config.{name}", value_of(settings, name))


def _would_read(images: str, workdir: str) -> bool:
  """True if a file, a glob or a folder of images includes what the workdir will hold."""
  if files.is_remote(images) != files.is_remote(workdir):
    return False
  if files.is_folder(os.path.expanduser(images)):
    return _is_within(workdir, images)
  if not glob.has_magic(images) or files.is_file(os.path.expanduser(images)):
    return False
  folder, name = os.path.split(images)
  if not glob.has_magic(folder):
    same = _is_within(workdir, folder) and _is_within(folder, workdir)
    return _is_within(workdir, folder) if name == "**" else same and fnmatch.fnmatch(_GRID, name)
  while glob.has_magic(folder):
    folder = os.path.dirname(folder)
  return _is_within(workdir, folder)


def _is_within(path: str, folder: str) -> bool:
  if files.is_remote(path) or files.is_remote(folder):
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")
  folder = _real(folder)
  return os.path.commonpath([os.path.realpath(path), folder]) == folder


def _real(path: str) -> str:
  return os.path.realpath(os.path.expanduser(path))
