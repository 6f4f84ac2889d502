"""Checkpoints: the only module that imports orbax.

One checkpoint is everything a run needs to go on and everything another job needs to use it:

  WORKDIR/checkpoints/STEP/
    params     the model's parameters
    head       a classifier's weights, where there is one
    training   step, optimizer state, RNG
    palette    the colours, float32 [k, 3] in [-1, 1], so that a checkpoint alone can be sampled from
    (metadata) the run as JSON: model, objective, config, data position, elapsed time

Writes are asynchronous and atomic: a step's folder appears when it is whole. An imported checkpoint
has no `training`: every job can read it, but no run can go on from it.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import warnings
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import ImageGPTConfig, Params, abstract_params
from igpt_jax.training.state import HEAD, TrainState, head_sharding, param_shardings

FOLDER = "checkpoints"
_LAST_FILE = "commit_success.txt"  # what orbax writes when all else is there


def _with_shardings(abstract: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
    abstract,
    shardings,
  )


def _items(state: TrainState) -> dict[str, Any]:
  """A state as it is stored: model and head apart, so that the model is found alone."""
  items = {
    "params": {name: leaf for name, leaf in state.params.items() if name != HEAD},
    "training": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
  }
  if HEAD in state.params:
    items["head"] = {HEAD: state.params[HEAD]}
  return items


def _is_whole(folder: str) -> bool:
  """Orbax takes any folder with a number for a checkpoint, also one that was copied halfway."""
  return os.path.exists(os.path.join(folder, _LAST_FILE)) and ocp.is_orbax_checkpoint(folder)


def _set_aside_unfinished(folder: str) -> None:
  """Takes the number from steps that aren't whole, so that a run can write them again."""
  if jax.process_index() == 0 and os.path.isdir(folder):
    for name in os.listdir(folder):
      step = os.path.join(folder, name)
      if name.isdigit() and not _is_whole(step):
        shutil.rmtree(f"{step}.unfinished", ignore_errors=True)
        os.rename(step, f"{step}.unfinished")
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("igpt_jax: unfinished checkpoints set aside")


class Checkpoints:
  """The checkpoints of one training run.

  Args:
    workdir: of the run.
    keep: how many of the newest to keep.
    keep_every: keep those whose step is a multiple of this, too; 0: none.
    keep_best: keep, too, the first of those whose score of this name is largest; "": by no score.
  """

  def __init__(self, workdir: str, *, keep: int = 3, keep_every: int = 0, keep_best: str = ""):
    folder = os.path.join(os.path.abspath(workdir), FOLDER)
    _set_aside_unfinished(folder)
    policies = ocp.training.preservation_policies
    preserve: list[Any] = [policies.LatestN(keep)]
    if keep_every:
      preserve.append(policies.EveryNSteps(keep_every))
    if keep_best:
      preserve.append(
        policies.BestN(
          get_metric_fn=lambda scores: (scores[keep_best], -scores["step"]),
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._checkpointer = ocp.training.Checkpointer(
      folder,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=policies.AnyPreservationPolicy(preserve),
      cleanup_tmp_directories=True,
    )

  def latest(self) -> int | None:
    """Step of the newest whole checkpoint."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  def save(
    self,
    state: TrainState,
    *,
    palette: np.ndarray | None,
    run: dict[str, Any],
    scores: dict[str, float] | None = None,
  ) -> None:
    """Begins to write `state` under its step; the arrays are copied before this returns.

    Args:
      state: with or without a head.
      palette: the colours, if known.
      run: of `Described`; "classes" names those of a head.
      scores: of this step, for `keep_best`.
    """
    step = int(state.step)
    if step == self.latest():
      return
    items = _items(state)
    if palette is not None:
      items["palette"] = {"centers": np.asarray(palette, np.float32)}
    self._checkpointer.save_checkpointables_async(
      step, items, custom_metadata=run, metrics=None if scores is None else {**scores, "step": step}
    )

  def read_run(self, step: int) -> dict[str, Any]:
    """The run as it was saved at `step`."""
    return self._checkpointer.checkpointables_metadata(step).custom_metadata

  def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
    """The state at `step`, each leaf put where `shardings` says, whatever mesh wrote it."""
    target = _items(_with_shardings(abstract, shardings))
    loaded = self._checkpointer.load_checkpointables(step, target)
    return TrainState(params=loaded["params"] | loaded.get("head", {}), **loaded["training"])

  def wait(self) -> None:
    """Returns when everything that was begun is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.wait()
    self._checkpointer.close()


@dataclasses.dataclass(frozen=True)
class Described:
  """A trained model of any origin, its parameters not read yet.

  Attributes:
    path: where it is.
    step: updates it was trained for; 0 if unknown.
    config: its model.
    palette: float32 [k, 3] in [-1, 1], or None if it was trained on bare tokens.
    run: what is known of its training: "model", "objective", "mask_probability", "resolution", and
      of a run of this program "config", "data", …
    format: "orbax" for this program's own, or "openai", "huggingface".
    classes: names of a head's classes; () where there is no head.
  """

  path: str
  step: int
  config: ImageGPTConfig
  palette: np.ndarray | None
  run: dict[str, Any]
  format: str = "orbax"
  classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(Described):
  """A trained model as the jobs use it: `params` are on the mesh, float32, in place."""

  params: Params


def _folder_of_steps(path: str) -> str:
  return path if os.path.basename(path) == FOLDER else os.path.join(path, FOLDER)


def whole_steps(workdir: str) -> list[int]:
  """Steps of a workdir's whole checkpoints, ascending; makes and removes nothing there."""
  folder = _folder_of_steps(workdir)
  if not os.path.isdir(folder):
    return []
  steps = sorted(int(name) for name in os.listdir(folder) if name.isdigit())
  return [step for step in steps if _is_whole(os.path.join(folder, str(step)))]


def latest_step(workdir: str) -> int | None:
  """Step of the newest whole checkpoint in a workdir; makes and removes nothing there."""
  return max(whole_steps(workdir), default=None)


def path_of(workdir: str, step: int) -> str:
  """The folder of one checkpoint of a workdir."""
  return os.path.join(_folder_of_steps(workdir), str(step))


def find(path: str) -> tuple[str, int]:
  """The folder of one checkpoint, and its step; `path` is a workdir or one checkpoint in it.

  Raises:
    UserError: there is none.
  """
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.basename(path).isdigit() and _is_whole(path):
    return path, int(os.path.basename(path))
  newest = latest_step(path)
  if newest is not None:
    return path_of(path, newest), newest
  raise UserError(
    f"checkpoint: no checkpoint in {path}; expected a workdir in which "
    "`--config.job=pretrain` has run; fix: --config.checkpoint=WORKDIR or WORKDIR/checkpoints/STEP"
  )


@contextlib.contextmanager
def _quiet(level: int):
  """Only what is of `level` or worse is heard of orbax' log."""
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  before = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(level)
  try:
    yield
  finally:
    for logger, own in zip(loggers, before, strict=True):
      logger.setLevel(own)


def _deaf_to_stragglers(hook):
  """A sys.unraisablehook that passes on all but what comes of other reads when one has failed.

  They are still under way in threads of their own, and find orbax' event loop closed.
  """

  def hear(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  return hear


@contextlib.contextmanager
def _reading(folder: str):
  """Makes one line of what orbax raises over damaged files, which it also logs with tracebacks."""
  hook = sys.unraisablehook
  sys.unraisablehook = _deaf_to_stragglers(hook)
  try:
    with _quiet(logging.CRITICAL):
      yield
    # Not after a failure: nobody knows when the last of the reads ends.
    sys.unraisablehook = hook
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    first: BaseException = error
    while first.__cause__ or first.__context__:
      first = first.__cause__ or first.__context__
    raise UserError(
      f"checkpoint: {folder} can't be read ({type(first).__name__}: {str(first)[:200]!a}); expected "
      "a whole checkpoint of this program; fix: another step of the run, or copy it again"
    ) from error


def _sparing_memory() -> ocp.Context:
  """Without a second copy of all that is on this host, and in pieces that can be read singly.

  Orbax' default, OCDBT, gathers whatever is to be written in memory first; a file for every piece is
  written as it comes. Reading makes no difference between the two.
  """
  context = ocp.Context()
  context.array.saving.use_ocdbt = False
  context.array.saving.storage_options.chunk_byte_size = 64 << 20
  context.memory.deepcopy_host_arrays = False
  return context


def describe(path: str) -> Described:
  """What a checkpoint of this program says about itself, and its palette.

  Args:
    path: a workdir, or one checkpoint in it.

  Raises:
    UserError: there is none, it is damaged, or another program's.
  """
  folder, step = find(path)
  with _reading(folder):
    found = ocp.checkpointables_metadata(folder)
    run = found.custom_metadata
    if not run or "model" not in run:
      raise UserError(
        f"checkpoint: {folder} was not written by igpt_jax: it doesn't name its model"
      )
    config = ImageGPTConfig(**run["model"])
    palette = None
    if "palette" in found.metadata:
      palette = np.asarray(
        ocp.load_checkpointables(folder, {"palette": None})["palette"]["centers"]
      )
    classes = tuple(run["classes"]) if "head" in found.metadata else ()
  return Described(folder, step, config, palette, run, classes=classes)


def load_params(found: Described, mesh: Mesh) -> Params:
  """The parameters on the mesh, float32, whatever mesh wrote them."""
  target = _with_shardings(abstract_params(found.config), param_shardings(found.config, mesh))
  with _reading(found.path):
    return ocp.load_checkpointables(found.path, {"params": target})["params"]


def load_head(found: Described, mesh: Mesh) -> jax.Array:
  """A head's weights on the mesh, float32 [n_classes, n_embd]; only where there are `classes`."""
  shape = len(found.classes), found.config.n_embd
  target = jax.ShapeDtypeStruct(shape, np.float32, sharding=head_sharding(mesh))
  with _reading(found.path):
    return ocp.load_checkpointables(found.path, {"head": {HEAD: target}})["head"][HEAD]


def load_host_params(found: Described) -> Params:
  """The parameters as numpy arrays of the stored dtype; no device is touched."""
  with _reading(found.path):
    stored = ocp.checkpointables_metadata(found.path).metadata["params"]
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored)
    return ocp.load_checkpointables(found.path, {"params": target})["params"]


def save_params(workdir: str, params: Params, found: Described) -> str:
  """Writes a workdir with one checkpoint without a training state, whole or not at all.

  Args:
    workdir: to make; nothing may be there.
    params: numpy arrays, of any float type.
    found: what the checkpoint says about itself; its path and format are left out.

  Returns:
    The checkpoint's folder.
  """
  workdir = os.path.abspath(workdir)
  if os.path.lexists(workdir):
    raise UserError(f"checkpoint to write: {workdir} exists; fix: name another target")
  items: dict[str, Any] = {"params": params}
  if found.palette is not None:
    items["palette"] = {"centers": np.asarray(found.palette, np.float32)}
  part = f"{workdir}.part-{os.getpid()}"
  try:
    os.makedirs(part)  # orbax would leave threads waiting where this fails
    with _sparing_memory(), _quiet(logging.ERROR):  # it warns that there is no OCDBT to merge
      ocp.save_checkpointables(
        os.path.join(part, FOLDER, str(found.step)), items, custom_metadata=found.run
      )
    os.rename(part, workdir)
  except OSError as error:
    raise UserError(f"checkpoint to write: {workdir}: {error.strerror or error}") from error
  finally:
    shutil.rmtree(part, ignore_errors=True)
  return os.path.join(workdir, FOLDER, str(found.step))


def load_pretrained(path: str, mesh: Mesh, **model_overrides: Any) -> Pretrained:
  """Reads a checkpoint's parameters (not its optimizer) onto the mesh.

  Args:
    path: a workdir, or one checkpoint in it.
    mesh: where the parameters go; any shape, whatever mesh wrote them.
    **model_overrides: fields of ImageGPTConfig that don't change the parameters (dtype, …).
  """
  found = describe(path)
  return with_params(found, load_params(found, mesh), **model_overrides)


def with_params(found: Described, params: Params, **model_overrides: Any) -> Pretrained:
  """What was described, now with its parameters; `model_overrides` as for `load_pretrained`."""
  fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
  fields["config"] = dataclasses.replace(found.config, **model_overrides)
  return Pretrained(**fields, params=params)
