"""Checksums of everything in a checkpoint: computed when it is saved, compared when it is read.

Orbax stores no checksums of arrays, so it wouldn't notice a flipped bit. They are stored in the
checkpoint's metadata; a checkpoint without them (older, or another program's) is read unchecked.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from igpt_jax import files, history
from igpt_jax.checkpoint import folders
from igpt_jax.checkpoint.checksum import checksum
from igpt_jax.errors import UserError

_KEY = "checksums"
_RUN = "run"
METRICS = "metrics"  # orbax' name for scores, which aren't among the items that it lists


def with_sums(run: Mapping[str, Any], sums: Mapping[str, str]) -> dict[str, Any]:
  """Returns the run as stored: with the format's number, the items' checksums, and the run's own."""
  run = {**run, history.KEY: history.FORMAT}
  return {**run, _KEY: {**sums, _RUN: files.digest([run, sums])}}


def without_sums(folder: str, stored: object) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns the run, its config with today's names, and the items' checksums, {} if there are none.

  Raises:
    NewerFormat: a newer version wrote it.
    UserError: it isn't what was saved.
  """
  if not stored or not isinstance(stored, dict):
    raise UserError(
      f"checkpoint: {folder} says nothing of its run: it is damaged, or not written by igpt_jax; "
      f"fix: {folders.advice(folder)}"
    )
  number = history.format_of(stored, f"checkpoint: {folder}")
  run = dict(stored)
  sums = run.pop(_KEY, {})
  if sums:
    sums = dict(sums) if isinstance(sums, dict) else {}
    if sums.pop(_RUN, None) != files.digest([run, sums]):
      raise _differs(folder, _RUN)
  if "config" in run:
    run["config"] = history.upgraded(run["config"], number)
  return run, sums


def of_items(items: Mapping[str, Any]) -> dict[str, str]:
  """Computes the checksum of every item, on the devices that hold its arrays."""
  return {name: checksum(item) for name, item in items.items()}


def of_metrics(metrics: Mapping[str, float] | None) -> dict[str, str]:
  """Returns the checksum of the scores by which Orbax keeps the best; {} if there are none."""
  return {METRICS: files.digest(metrics)} if metrics else {}


def check_metrics(folder: str, sums: Mapping[str, str]) -> None:
  """Reads the scores as orbax will, and compares them with what was saved.

  Raises:
    OSError, ValueError: they can't be read.
    UserError: they differ.
  """
  path = os.path.join(folder, METRICS, METRICS)
  if files.exists(path) or METRICS in sums:
    with files.opened(path, "r") as file:
      metrics = json.load(file)
    if METRICS in sums and sums[METRICS] != files.digest(metrics):
      raise _differs(folder, METRICS)


def check(folder: str, sums: Mapping[str, str], items: Mapping[str, Any]) -> None:
  """Raises UserError for the first item that differs from what was saved."""
  for name, item in items.items():
    if name in sums and checksum(item) != sums[name]:
      raise _differs(folder, name)


def _differs(folder: str, item: str) -> UserError:
  return UserError(
    f"checkpoint: {folder} is damaged: its {item} isn't what was saved (another checksum); "
    f"fix: {folders.advice(folder)}"
  )
