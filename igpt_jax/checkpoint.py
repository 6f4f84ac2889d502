"""Checkpoints: the only module that imports orbax.

One checkpoint is everything a run needs to go on and everything another job needs to use it:

  WORKDIR/checkpoints/STEP/
    params     the parameters
    training   step, optimizer state, RNG
    palette    the colours, float32 [k, 3] in [-1, 1], so that a checkpoint alone can be sampled from
    (metadata) the run as JSON: model, objective, config, data position, elapsed time

Writes are asynchronous and atomic: a step's folder appears when it is whole.
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import ImageGPTConfig, Params, abstract_params
from igpt_jax.training.state import TrainState, param_shardings

FOLDER = "checkpoints"


def _with_shardings(abstract: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
    abstract,
    shardings,
  )


class Checkpoints:
  """The checkpoints of one training run.

  Args:
    workdir: of the run.
    keep: how many of the newest to keep.
    keep_every: keep those whose step is a multiple of this, too; 0: none.
  """

  def __init__(self, workdir: str, *, keep: int = 3, keep_every: int = 0):
    policies = ocp.training.preservation_policies
    preserve: list[Any] = [policies.LatestN(keep)]
    if keep_every:
      preserve.append(policies.EveryNSteps(keep_every))
    self._checkpointer = ocp.training.Checkpointer(
      os.path.join(os.path.abspath(workdir), FOLDER),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=policies.AnyPreservationPolicy(preserve),
      cleanup_tmp_directories=True,
    )

  def latest(self) -> int | None:
    """Step of the newest whole checkpoint."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  def save(self, state: TrainState, *, palette: np.ndarray | None, run: dict[str, Any]) -> None:
    """Begins to write `state` under its step; the arrays are copied before this returns."""
    step = int(state.step)
    if step == self.latest():
      return
    items: dict[str, Any] = {
      "params": state.params,
      "training": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
    }
    if palette is not None:
      items["palette"] = {"centers": np.asarray(palette, np.float32)}
    self._checkpointer.save_checkpointables_async(step, items, custom_metadata=run)

  def read_run(self, step: int) -> dict[str, Any]:
    """The run as it was saved at `step`."""
    return self._checkpointer.checkpointables_metadata(step).custom_metadata

  def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
    """The state at `step`, each leaf put where `shardings` says, whatever mesh wrote it."""
    target = _with_shardings(abstract, shardings)
    loaded = self._checkpointer.load_checkpointables(
      step,
      {
        "params": target.params,
        "training": {"step": target.step, "opt_state": target.opt_state, "rng": target.rng},
      },
    )
    return TrainState(params=loaded["params"], **loaded["training"])

  def wait(self) -> None:
    """Returns when everything that was begun is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.wait()
    self._checkpointer.close()


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A trained model, as the other jobs use it.

  Attributes:
    path: where it came from.
    step: updates it was trained for.
    config: its model.
    params: on the mesh, in place.
    palette: float32 [k, 3] in [-1, 1], or None if it was trained on bare tokens.
    run: what the run wrote about itself: "model", "objective", "resolution", "config", …
  """

  path: str
  step: int
  config: ImageGPTConfig
  params: Params
  palette: np.ndarray | None
  run: dict[str, Any]


def find(path: str) -> tuple[str, int]:
  """The folder of one checkpoint, and its step; `path` is a workdir or one checkpoint in it.

  Raises:
    UserError: there is none.
  """
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.basename(path).isdigit() and ocp.is_orbax_checkpoint(path):
    return path, int(os.path.basename(path))
  folder = path if os.path.basename(path) == FOLDER else os.path.join(path, FOLDER)
  if os.path.isdir(folder):
    with ocp.training.Checkpointer(folder) as checkpointer:
      newest = checkpointer.latest
    if newest is not None:
      return os.path.join(folder, str(newest.step)), newest.step
  raise UserError(
    f"checkpoint: no checkpoint in {path}; expected a workdir in which "
    "`--config.job=pretrain` has run; fix: --config.checkpoint=WORKDIR or WORKDIR/checkpoints/STEP"
  )


def load_pretrained(path: str, mesh: Mesh, **model_overrides: Any) -> Pretrained:
  """Reads a checkpoint's parameters (not its optimizer) onto the mesh.

  Args:
    path: a workdir, or one checkpoint in it.
    mesh: where the parameters go; any shape, whatever mesh wrote them.
    **model_overrides: fields of ImageGPTConfig that don't change the parameters (dtype, …).
  """
  folder, step = find(path)
  run = ocp.checkpointables_metadata(folder).custom_metadata
  if not run or "model" not in run:
    raise UserError(f"checkpoint: {folder} was not written by igpt_jax: it doesn't name its model")
  config = dataclasses.replace(ImageGPTConfig(**run["model"]), **model_overrides)
  target = _with_shardings(abstract_params(config), param_shardings(config, mesh))
  names = ocp.checkpointables_metadata(folder).metadata
  wanted: dict[str, Any] = {"params": target}
  if "palette" in names:
    wanted["palette"] = None
  loaded = ocp.load_checkpointables(folder, wanted)
  palette = np.asarray(loaded["palette"]["centers"]) if "palette" in names else None
  return Pretrained(folder, step, config, loaded["params"], palette, run)
