"""A run's returns to older checkpoints, kept in its incidents.jsonl, and the data order after each."""

import json
import os
import re
from typing import Any

import numpy as np

from igpt_jax import files
from igpt_jax.parallel import hosts

_RECORD = "incidents.jsonl"


def record(folder: str | None, values: dict[str, Any]) -> None:
  if folder is not None and hosts.is_main():
    files.append_line(os.path.join(folder, _RECORD), json.dumps(values))


def rollback_steps(folder: str) -> list[int]:
  """Returns the steps that the run in `folder` went back to, in order."""
  path = os.path.join(folder, _RECORD)
  if not files.exists(path):
    return []
  with files.opened(path, "r") as file:
    return _steps_in(file.read())


def copy(folder: str, target: str, step: int) -> None:
  """Copies the record of what decided the data order from `step` on: up to the last return to it or before."""
  path, kept, waiting = os.path.join(folder, _RECORD), [], []
  if not files.exists(path):
    return
  with files.opened(path, "r") as file:
    for line in file:
      waiting.append(line)
      if any(to <= step for to in _steps_in(line)):
        kept, waiting = kept + waiting, []
  with files.replacing(os.path.join(target, _RECORD)) as partial:
    with open(partial, "w", encoding="utf-8") as out:
      out.writelines(kept)


def _steps_in(text: str) -> list[int]:
  return [int(step) for step in re.findall(r'"what": "rollback", "to": (\d+)}', text)]


def order_seeds(folder: str, seed: int) -> list[int]:
  """Returns the seeds of the data order: the settings' and one for each rollback."""
  after = range(1, len(rollback_steps(folder)) + 1)
  return [seed, *(int(np.random.SeedSequence((seed, n)).generate_state(1)[0]) for n in after)]


def is_abandoned(folder: str, seed: int, order: int, step: int) -> bool:
  """True if the run in `folder` has gone back behind the checkpoint `step` since it was written.

  Args:
    folder: the run's folder.
    seed: the seed in its settings.
    order: the seed of the data order when it was at `step`.
    step: the checkpoint's step.
  """
  seeds = order_seeds(folder, seed)
  since = seeds.index(order) if order in seeds else 0
  return any(back_to < step for back_to in rollback_steps(folder)[since:])
