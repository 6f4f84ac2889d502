"""Writers of metrics: metrics.jsonl always, TensorBoard and Weights & Biases if configured.

The latter two show images as well.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from igpt_jax import extras, files, scratch
from igpt_jax.errors import UserError
from igpt_jax.reporting import line_parts


class JsonlWriter:
  """Appends records to a JSON Lines file; in a bucket, to parts that follow it (`line_parts`).

  Resuming at a step drops the records after it: they are computed again, to the same values. If the disk
  is full, records are kept in memory until the next write, or `sync`, which raises.
  """

  def __init__(self, path: str, resume_step: int):
    self.path = path
    remote, contents = files.is_remote(path), line_parts.read(path)
    if contents is not None or remote:
      lines = _lines_of(contents or b"")
      kept = "".join(line + "\n" for line in lines if _belongs_before(line, resume_step))
      line_parts.rewrite(path, kept.encode())
    self._lines = line_parts.Parts(path) if remote else _Appended(path)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    self._lines.write((json.dumps({"step": step, **values}) + "\n").encode())

  def sync(self) -> None:
    """Flushes all records to the disk, or the bucket.

    Raises:
      OSError: they can't be written; they are kept in memory.
    """
    self._lines.sync()

  def close(self) -> None:
    self._lines.close()


class _Appended:
  """Appends lines to a file on a disk."""

  def __init__(self, path: str):
    self._path = path
    self._file = open(path, "ab", buffering=0)
    self._waiting = b""

  def write(self, lines: bytes) -> None:
    self._waiting += lines
    with contextlib.suppress(OSError):
      self._append()

  def _append(self) -> None:
    """Writes all waiting lines, or none."""
    end, left = self._file.seek(0, os.SEEK_END), self._waiting
    try:
      while left:
        left = left[self._file.write(left) :]
    except OSError:
      self._file.truncate(end)
      raise
    self._waiting = b""

  def sync(self) -> None:
    self._append()
    files.sync(self._path)

  def close(self) -> None:
    self._append()
    self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads a metrics file; [] if there is none. A line that a crash cut short is left out."""
  records = []
  for line in _lines_of(line_parts.read(os.fspath(path)) or b""):
    with contextlib.suppress(ValueError):
      records.append(json.loads(line))
  return [record for record in records if isinstance(record, dict)]


def _lines_of(contents: bytes) -> list[str]:
  """Returns the lines of a metrics file; bytes that are no text stand in for themselves."""
  return contents.decode("utf-8", "replace").removesuffix("\n").split("\n") if contents else []


def copy(source: str, target: str) -> None:
  """Copies a metrics file, with what a run that goes on has added to it, if there is one."""
  if (contents := line_parts.read(source)) is not None:
    line_parts.rewrite(target, contents)


def newest(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the newest value of every metric in a metrics file."""
  values = {name: value for record in read_jsonl(path) for name, value in record.items()}
  return {name: value for name, value in values.items() if name != "step"}


def _belongs_before(line: str, step: int) -> bool:
  try:
    return json.loads(line)["step"] <= step
  except (ValueError, KeyError, TypeError):
    return False  # a line that a crash cut short


class TensorBoardWriter:
  """Writes scalars as TensorBoard events, through tensorboardX.

  A bucket gets them by `sync`: what is after the checkpoint that a run resumes from counts for nothing.
  """

  def __init__(self, workdir: str, resume_step: int):
    try:
      import tensorboardX
    except ImportError:
      raise UserError(
        f"log.tensorboard: True needs tensorboardX; fix: {extras.install('tensorboard')}"
      ) from None
    self._folder = self._local = os.path.join(workdir, "tensorboard")
    if files.is_remote(workdir):
      self._local = scratch.path_for(self._folder)
      files.remove_folder(self._local)  # what a killed process has left there
    self._writer = tensorboardX.SummaryWriter(self._local, purge_step=resume_step + 1)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
      if isinstance(value, int | float):
        self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    self._writer.add_image(name, image, step, dataformats="HWC")
    self._writer.flush()

  def sync(self) -> None:
    """Copies the events into the bucket, if the run is in one.

    Raises:
      OSError: they can't be written there.
    """
    for name in files.names(self._local) if self._local != self._folder else ():
      files.copy(os.path.join(self._local, name), os.path.join(self._folder, name))

  def close(self) -> None:
    self._writer.close()
    self.sync()


class WandbWriter:
  """Writes metrics to Weights & Biases; the run is named after the workdir and resumed with it.

  Its own files of a run in a bucket lie in `config.scratch`.
  """

  def __init__(self, workdir: str, config: Mapping[str, Any], project: str):
    try:
      import wandb
    except ImportError:
      raise UserError(f"log.wandb: True needs wandb; fix: {extras.install('wandb')}") from None
    identity = os.path.join(workdir, "wandb_run_id")
    run_id = None
    if files.exists(identity):
      with files.opened(identity, "r") as file:
        run_id = file.read().strip()
    name = os.path.basename(os.path.abspath(workdir))
    local = scratch.make(scratch.path_for(workdir)) if files.is_remote(workdir) else workdir
    try:
      self._run = wandb.init(
        project=project, id=run_id, resume="allow", name=name, dir=local, config=dict(config)
      )
    except (wandb.errors.Error, OSError, ValueError) as error:  # no key, network or project
      raise UserError(
        f"log.wandb: True, but wandb.init failed ({' '.join(str(error).split())[:300]}); fix: "
        "`wandb login` or WANDB_API_KEY; or WANDB_MODE=offline, which is sent later by `wandb sync`; "
        "or --config.log.wandb=False"
      ) from None
    with files.replacing(identity) as partial, open(partial, "w", encoding="utf-8") as file:
      file.write(self._run.id)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    self._run.log(dict(values), step=step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    import wandb

    self._run.log({name: wandb.Image(image)}, step=step)

  def close(self) -> None:
    self._run.finish()


Listener = Callable[[int, Mapping[str, Any]], object]  # called with a step and its metrics


class ListenerWriter:
  """Hands metrics on to a function."""

  def __init__(self, listener: Listener):
    self.write = listener

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Does nothing: a listener is for numbers."""

  def close(self) -> None:
    """Does nothing: a listener has nothing open."""


class Writers:
  """All writers of a run; empty on processes other than 0."""

  def __init__(self, writers: list[Any]):
    self._writers = writers

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.write(step, values)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes an image, uint8 [H, W, 3], to those that show images."""
    for writer in self._writers:
      if not isinstance(writer, JsonlWriter):
        writer.image(step, name, image)

  def sync(self) -> None:
    """Flushes what a resumed run goes on with: metrics.jsonl, and TensorBoard's events in a bucket."""
    for writer in self._writers:
      if isinstance(writer, JsonlWriter | TensorBoardWriter):
        writer.sync()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()
