"""A run's reaction to bad numbers: updates that aren't finite, and losses that jump.

A step whose loss or gradient isn't finite changes only the step's number, decided on the device
(`training.step.update`). Here its metrics are counted, reported and finally acted upon, at every log.
Going back means: to the last checkpoint before the trouble, with other data from there on. Records
stay in WORKDIR/incidents.
"""

import collections
import math
import os
import statistics
from collections.abc import Callable, Mapping

import jax
import numpy as np

from igpt_jax import checkpoint, files
from igpt_jax.config.run_fields import GuardConfig
from igpt_jax.model.image_gpt import Params
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import summary
from igpt_jax.training.bad_numbers import BadNumbers
from igpt_jax.training.state import TrainState
from igpt_jax.workspace import rollbacks

FOLDER = "incidents"
_SPIKE_WINDOW = 20  # logged losses that the median is taken over
_MIN_LOSSES = 5  # without so many, no loss is a spike
_FIXES = {
  "pretrain": "a lower train.learning_rate, train.clip_norm=1, or model.dtype=float32",
  "finetune": "a lower finetune.learning_rate, train.clip_norm=1, or model.dtype=float32",
  "probe": "lower probe.learning_rates, or model.dtype=float32",
}


class Guard:
  """Checks the metrics of one run.

  Args:
    config: how to react.
    folder: the run's folder; None: nothing is recorded.
    job: whose settings an error names.
  """

  def __init__(self, config: GuardConfig, folder: str | None, job: str = "pretrain"):
    self._config, self._folder, self._job = config, folder, job
    self._losses: collections.deque[float] = collections.deque(maxlen=_SPIKE_WINDOW)
    self._spiking_since: int | None = None
    self._well: int | None = None

  def look(
    self,
    step: int,
    values: dict[str, float],
    state: Callable[[], TrainState],
    batch: Mapping[str, np.ndarray],
  ) -> None:
    """Checks what was logged at `step`.

    Args:
      step: the metrics' step.
      values: `loss`, `grad_norm`, `skipped_updates`, `skipped_in_row`.
      state: returns the newest state, whose parameters are described in a record.
      batch: this process's rows of that step's batch, saved with a record.

    Raises:
      BadNumbers: the configured reaction is to go back or to stop.
    """
    loss, in_row = values.get("loss", 0.0), round(values.get("skipped_in_row", 0))
    if in_row:
      self._skipped(step, in_row, values, state, batch)
      return
    median = statistics.median(self._losses) if len(self._losses) >= _MIN_LOSSES else math.inf
    if self._config.spike and loss > median + self._config.spike:
      self._spiked(step, median, values, state, batch)
      return
    self._well, self._spiking_since = step, None
    self._losses.append(loss)

  def _skipped(self, step, in_row, values, state, batch) -> None:
    self._well = step - in_row if self._well is None else max(self._well, step - in_row)
    what = (
      f"step {step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}: not finite; "
      f"{in_row} updates in a row were left out, {round(values['skipped_updates'])} in all"
    )
    if in_row < self._config.in_row or self._config.then == "warn":
      say(what)
      return
    self._act(what, "not finite", self._config.then, step, self._well, values, state, batch)

  def _spiked(self, step, median, values, state, batch) -> None:
    since = step - 1 if self._well is None else self._well
    what = (
      f"step {step}: the loss jumped to {values['loss']:.4f} nats/token, from a median of "
      f"{median:.4f}; gradient norm {values['grad_norm']:.4g}"
    )
    if self._config.spike_then == "warn":
      if self._spiking_since is None:
        say(f"{what}; config.guard.spike_then='rollback' would go back")
        rollbacks.record(self._folder, {"step": step, "what": "spike", **_numbers(values)})
      self._spiking_since = step
      return
    self._act(what, "spike", self._config.spike_then, step, since, values, state, batch)

  def _act(self, what, kind, then, step, since, values, state, batch) -> None:
    message = f"training: {what}"
    if self._folder is not None:
      dump = os.path.join(self._folder, FOLDER, str(step))
      newest = state()
      parameters = describe(newest.params)
      files.make_folder(dump)
      # A process has only its own rows, and the bad image may be among any process's.
      of_host = "" if hosts.is_main() else f"_of_host_{jax.process_index()}"
      path = os.path.join(dump, f"batch{of_host}.npz")
      with files.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **batch)
      if hosts.is_main():
        diagnosis = {
          "step": step,
          "what": what,
          "well_until": since,
          "metrics": _numbers(values),
          "losses_before": list(self._losses),
          "parameters_of_step": int(newest.step),  # metrics arrive a step late
          "parameters": parameters,
        }
        summary.write_json(os.path.join(dump, "diagnosis.json"), diagnosis)
      rollbacks.record(self._folder, {"step": step, "what": kind, **_numbers(values)})
      message += f"; wrote {dump}"
    raise BadNumbers(f"{message}; fix: {_FIXES[self._job]}", step, since, then == "rollback")


def describe(params: Params) -> dict[str, dict[str, float]]:
  """Returns every parameter's largest absolute value, mean square and number of non-finite entries."""

  @jax.jit
  def numbers(params):
    return jax.tree.map(
      lambda leaf: {
        "largest": abs(leaf).max(),
        "mean_square": (leaf * leaf).mean(),
        "not_finite": (~jax.numpy.isfinite(leaf)).sum(),
      },
      params,
    )

  flat = jax.tree_util.tree_flatten_with_path(jax.device_get(numbers(params)))[0]
  described: dict[str, dict[str, float]] = {}
  for path, value in flat:
    described.setdefault(jax.tree_util.keystr(path[:-1]), {})[path[-1].key] = float(value)
  return described


def go_back(bad: BadNumbers, config: GuardConfig, folder: str) -> None:
  """Moves checkpoints since the trouble began away, and records a rollback, which changes the data order.

  Raises:
    BadNumbers: there is no checkpoint to go back to, or `config.rollbacks` is reached.
  """
  before = len(rollbacks.rollback_steps(folder))
  steps = checkpoint.whole_steps(folder)
  good = [step for step in steps if step <= bad.since]
  hosts.wait_for_all("checkpoints listed")
  if before >= config.rollbacks or not good:
    why = (
      f"it went back {before} times already (config.guard.rollbacks)"
      if good
      else f"there is no checkpoint of step {bad.since} or before to go back to"
    )
    raise BadNumbers(f"{bad}; {why}", bad.step, bad.since, False) from bad
  if hosts.is_main():
    for step in (step for step in steps if step > max(good)):
      path = checkpoint.path_of(folder, step)
      checkpoint.remove(f"{path}.rolled_back")
      checkpoint.move(path, f"{path}.rolled_back")
  # Recorded last: a run that is killed before hasn't gone back.
  rollbacks.record(folder, {"step": bad.step, "what": "rollback", "to": max(good)})
  hosts.wait_for_all("gone back")
  say(f"{bad}\ngoing back to step {max(good)}, with other data (rollback {before + 1})")


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
  return {
    name: value if math.isfinite(value) else str(value)
    for name, value in values.items()
    if isinstance(value, int | float)
  }
