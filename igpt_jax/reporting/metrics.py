"""Writers of metrics: metrics.jsonl always, TensorBoard and Weights & Biases if configured.

The latter two show images as well.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from igpt_jax import extras
from igpt_jax.errors import UserError
from igpt_jax.files import replacing, sync


class JsonlWriter:
  """Appends records to a JSON Lines file.

  Resuming at a step drops the records after it: they are computed again, to the same values. If the disk
  is full, records are kept in memory until the next write, or `sync`, which raises.
  """

  def __init__(self, path: str, resume_step: int):
    self.path = path
    if os.path.exists(path):
      with open(path, encoding="utf-8", errors="replace") as lines:
        kept = [line.rstrip("\n") + "\n" for line in lines if _belongs_before(line, resume_step)]
      with replacing(path) as partial, open(partial, "w", encoding="utf-8") as out:
        out.writelines(kept)
    self._file = open(path, "ab", buffering=0)
    self._waiting = b""

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    self._waiting += (json.dumps({"step": step, **values}) + "\n").encode()
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
    """Flushes all records to the disk.

    Raises:
      OSError: they can't be written; they are kept in memory.
    """
    self._append()
    sync(self.path)

  def close(self) -> None:
    self._append()
    self._file.close()


def read_jsonl(path: str) -> list[dict[str, Any]]:
  """Reads a metrics file; [] if there is none. A line that a crash cut short is left out."""
  records = []
  if not os.path.exists(path):
    return records
  with open(path, encoding="utf-8", errors="replace") as lines:
    for line in lines:
      with contextlib.suppress(ValueError):
        records.append(json.loads(line))
  return [record for record in records if isinstance(record, dict)]


def newest(path: str) -> dict[str, Any]:
  """Returns the newest value of every metric in a metrics file."""
  values = {name: value for record in read_jsonl(path) for name, value in record.items()}
  return {name: value for name, value in values.items() if name != "step"}


def _belongs_before(line: str, step: int) -> bool:
  try:
    return json.loads(line)["step"] <= step
  except (ValueError, KeyError, TypeError):
    return False  # a line that a crash cut short


class TensorBoardWriter:
  """Writes scalars as TensorBoard events, through tensorboardX."""

  def __init__(self, workdir: str, resume_step: int):
    try:
      import tensorboardX
    except ImportError:
      raise UserError(
        f"log.tensorboard: True needs tensorboardX; fix: {extras.install('tensorboard')}"
      ) from None
    self._writer = tensorboardX.SummaryWriter(
      os.path.join(workdir, "tensorboard"), purge_step=resume_step + 1
    )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
      if isinstance(value, int | float):
        self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    self._writer.add_image(name, image, step, dataformats="HWC")
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class WandbWriter:
  """Writes metrics to Weights & Biases; the run is named after the workdir and resumed with it."""

  def __init__(self, workdir: str, config: Mapping[str, Any], project: str):
    try:
      import wandb
    except ImportError:
      raise UserError(f"log.wandb: True needs wandb; fix: {extras.install('wandb')}") from None
    identity = os.path.join(workdir, "wandb_run_id")
    run_id = None
    if os.path.exists(identity):
      with open(identity, encoding="utf-8") as file:
        run_id = file.read().strip()
    name = os.path.basename(os.path.abspath(workdir))
    try:
      self._run = wandb.init(
        project=project, id=run_id, resume="allow", name=name, dir=workdir, config=dict(config)
      )
    except (wandb.errors.Error, OSError, ValueError) as error:  # no key, network or project
      raise UserError(
        f"log.wandb: True, but wandb.init failed ({' '.join(str(error).split())[:300]}); fix: "
        "`wandb login` or WANDB_API_KEY; or WANDB_MODE=offline, which is sent later by `wandb sync`; "
        "or --config.log.wandb=False"
      ) from None
    with open(identity, "w", encoding="utf-8") as file:
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
    """Flushes metrics.jsonl, which a resumed run goes on with, to the disk."""
    for writer in self._writers:
      if isinstance(writer, JsonlWriter):
        writer.sync()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()
