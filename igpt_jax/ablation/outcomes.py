"""What the runs of an ablation have come to, read from their workdirs."""

import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from igpt_jax import checkpoint
from igpt_jax.ablation.entries import Entry, read_json
from igpt_jax.parallel import hosts
from igpt_jax.reporting import metrics, summary
from igpt_jax.runner import pretraining
from igpt_jax.training.bad_numbers import BadNumbers

DIVERGED = "diverged.json"  # in the workdir of a run that bad numbers have ended
FINISHED, UNFINISHED = "finished", "unfinished"


@dataclasses.dataclass(frozen=True)
class Point:
  """An evaluation of a run: its step, the seconds of training steps until then, its loss."""

  step: int
  seconds: float
  loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """All that is known of a run with one seed.

  Attributes:
    entry: the run.
    status: FINISHED, UNFINISHED, or in words why there is no loss: "diverged at step N".
    step_seconds: median seconds of a training step, its wait for data included; nan: none was timed.
    train_loss: mean of the last logged losses; nan: unknown.
    validation_loss, test_loss: after the last step; nan: not measured.
    probe_accuracy: test accuracy of the layer that is best on validation; nan: not measured.
    curve: its evaluations.
    unit: that of all losses.
  """

  entry: Entry
  status: str
  step_seconds: float = math.nan
  train_loss: float = math.nan
  validation_loss: float = math.nan
  test_loss: float = math.nan
  probe_accuracy: float = math.nan
  curve: tuple[Point, ...] = ()
  unit: str = "nats/token"

  @property
  def finished(self) -> bool:
    return self.status == FINISHED

  @property
  def ended(self) -> bool:
    """True if there is nothing left to train."""
    return self.status != UNFINISHED


def result_of(entry: Entry) -> Result:
  """Reads a run's workdir.

  Raises:
    UserError: a file in it is damaged.
  """
  records = metrics.read_jsonl(os.path.join(entry.folder, "metrics.jsonl"))
  seconds = step_seconds(records, entry.settings.train.batch_size)
  steps, until = [0], [0.0]
  for step, each in seconds:
    until.append(until[-1] + (step - steps[-1]) * each)
    steps.append(step)
  values = {
    "step_seconds": statistics.median(each for _, each in seconds) if seconds else math.nan,
    "curve": tuple(
      Point(
        record["step"], float(np.interp(record["step"], steps, until)), record["validation_loss"]
      )
      for record in records
      if "validation_loss" in record
    ),
  }
  trained = read_json(os.path.join(entry.folder, pretraining.RESULT))
  if trained.get("step") == entry.steps == checkpoint.latest_step(entry.folder):
    if "validation_loss" not in trained:
      return Result(entry=entry, status="without a loss on validation", **values)
    loss = trained["validation_loss"]
    if not math.isfinite(loss):
      return Result(entry=entry, status=f"diverged at step {entry.steps}", **values)
    return Result(
      entry=entry, status=FINISHED, validation_loss=loss,
      train_loss=loss - trained.get("validation_gap", math.nan), **values,
    )  # fmt: skip
  diverged = read_json(os.path.join(entry.folder, DIVERGED))
  if diverged and diverged.get("made_from") == entry.made_from:
    return Result(entry=entry, status=f"diverged at step {diverged['step']}", **values)
  return Result(entry=entry, status=UNFINISHED, **values)


def in_one_unit(results: Sequence[Result]) -> list[Result]:
  """Returns results, with losses in bits per dimension if all are of raw RGB: its kinds differ in their tokens."""
  if any(result.entry.model.bits_per_dim(1.0) is None for result in results):
    return list(results)
  return [_in_bits(result) for result in results]


def _in_bits(result: Result) -> Result:
  bits = result.entry.model.bits_per_dim
  losses = {
    name: bits(getattr(result, name)) for name in ("train_loss", "validation_loss", "test_loss")
  }
  curve = tuple(dataclasses.replace(point, loss=bits(point.loss)) for point in result.curve)
  return dataclasses.replace(result, curve=curve, unit="bits/dim", **losses)


def step_seconds(records: Sequence[dict[str, Any]], batch_size: int) -> list[tuple[int, float]]:
  """Returns (step, seconds of a step since the one before) for every logged speed.

  Compiling, evaluations and checkpoints are excluded, and what a killed process did after its last
  checkpoint has been dropped from the metrics: the sum is that of a run that was never interrupted.
  """
  return [
    (record["step"], batch_size / record["images_per_second"])
    for record in records
    if record.get("images_per_second")
  ]


def mark_diverged(entry: Entry, bad: BadNumbers) -> None:
  """Notes that bad numbers have ended a run, so that the job doesn't train it again, unless by other settings."""
  if hosts.is_main():
    values = {"step": bad.step, "what": str(bad), "made_from": entry.made_from}
    summary.write_json(os.path.join(entry.folder, DIVERGED), values)
  hosts.wait_for_all("diverged")
