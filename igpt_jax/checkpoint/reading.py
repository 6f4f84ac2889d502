"""Reading of checkpoints by any job: their description, parameters and head.

Everything that is read is compared with the checksum that was saved with it.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures import synchronization  # numbers operations; nothing public does

from igpt_jax.checkpoint import file_sums, folders
from igpt_jax.checkpoint.settled import settled
from igpt_jax.errors import NewerFormat, UserError
from igpt_jax.model.image_gpt import ImageGPTConfig, Params, abstract_params
from igpt_jax.training.state import HEAD, head_sharding, param_shardings


def with_shardings(abstract: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
    abstract,
    shardings,
  )


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
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
    sums: checksums of its items, where it has any.
  """

  path: str
  step: int
  config: ImageGPTConfig
  palette: np.ndarray | None
  run: dict[str, Any]
  format: str = "orbax"
  classes: tuple[str, ...] = ()
  sums: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(CheckpointInfo):
  """A trained model as the jobs use it: `params` are on the mesh, float32, in place."""

  params: Params


@contextlib.contextmanager
def quiet(level: int):
  """Silences orbax' log below `level`."""
  logger = logging.getLogger("absl")
  before = logger.level
  logger.setLevel(level)
  try:
    yield
  finally:
    logger.setLevel(before)


@contextlib.contextmanager
def reading(folder: str):
  """Makes one line of what orbax raises over damaged files, which it also logs with tracebacks."""
  try:
    with quiet(logging.CRITICAL), settled:
      yield
  except UserError:
    raise
  except Exception as error:  # damaged files raise errors of every kind
    first: BaseException = error
    while cause := first.__cause__ or first.__context__:
      first = cause
    raise UserError(
      f"checkpoint: {folder} can't be read ({type(first).__name__}: {str(first)[:200]!a}); expected "
      f"a whole checkpoint of this program; fix: {folders.advice(folder)}"
    ) from error


_numbers_alone = itertools.count(10**9)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
  """Lets a process read by itself: Orbax would have it wait for the others.

  Orbax numbers the operations of a process, and processes meet by those numbers. What one reads alone
  gets a number beside them, or it would wait forever at the next operation that all have in common.
  Not while something is being written in the background, which asks for the number of its own.
  """
  if jax.process_count() == 1:
    yield
    return
  context, this = ocp.Context(), jax.process_index()
  context.multiprocessing.primary_host = this
  context.multiprocessing.active_processes = {this}
  context.multiprocessing.barrier_sync_key_prefix = f"igpt_jax_{this}"
  numbers = synchronization.OperationIdGenerator
  of_all = numbers._operation_id_counter, numbers._operation_id
  numbers._operation_id_counter = _numbers_alone
  try:
    with context:
      yield
  finally:
    numbers._operation_id_counter, numbers._operation_id = of_all


def describe(path: str) -> CheckpointInfo:
  """Reads a checkpoint's description of itself, and its palette; no parameters.

  Args:
    path: a workdir, or one checkpoint in it.

  Raises:
    UserError: there is none, it is damaged, or another program's.
  """
  folder, step = folders.find(path)
  with reading(folder), _alone():
    stored = ocp.checkpointables_metadata(folder)
    run, sums_of_items = file_sums.without_sums(folder, stored.custom_metadata)
    if "model" not in run:
      raise UserError(
        f"checkpoint: {folder} was not written by igpt_jax: it doesn't name its model; "
        f"fix: {folders.advice(folder)}"
      )
    _check_names(sums_of_items, stored.metadata)
    config = ImageGPTConfig(**run["model"])
    palette = None
    if "palette" in stored.metadata:
      item = ocp.load_checkpointables(folder, {"palette": None})["palette"]
      file_sums.check(folder, sums_of_items, {"palette": item})
      palette = np.asarray(item["centers"])
    classes = tuple(run["classes"]) if "head" in stored.metadata else ()
  return CheckpointInfo(folder, step, config, palette, run, classes=classes, sums=sums_of_items)


def check_readable(folder: str) -> None:
  """Reads the small items of a checkpoint, whatever it holds.

  Raises:
    UserError: it is damaged.
  """
  with reading(folder), _alone():
    stored = ocp.checkpointables_metadata(folder)
    _, sums_of_items = file_sums.without_sums(folder, stored.custom_metadata)
    _check_names(sums_of_items, stored.metadata)
    if "palette" in stored.metadata:
      file_sums.check(folder, sums_of_items, ocp.load_checkpointables(folder, {"palette": None}))
    file_sums.check_metrics(folder, sums_of_items)


def _check_names(expected: Mapping[str, str], stored: Mapping[str, Any]) -> None:
  for name in expected.keys() - stored.keys() - {file_sums.METRICS}:
    raise LookupError(f"{name} isn't there")


def newest(workdir: str) -> CheckpointInfo | None:
  """The newest checkpoint of a workdir that can be described; None: there is none at all.

  Raises:
    UserError: there are checkpoints, and none of them can be.
  """
  folder, why = folders.folder_of_steps(os.path.abspath(workdir)), {}
  for step in reversed(folders.numbered(folder)):
    path = os.path.join(folder, str(step))
    if folders.is_finished(path):
      try:
        return describe(path)
      except NewerFormat:
        raise
      except UserError as error:
        why[step] = str(error)
  if why:
    raise none_is_good(folder, why)
  return None


def none_is_good(folder: str, why: Mapping[int, str]) -> UserError:
  return UserError(
    f"checkpoint: none in {folder} can be gone on from:\n"
    + "\n".join(f"  {step}: {why[step]}" for step in sorted(why))
    + f"\nfix: copy one of them again, another --workdir, or remove {folder} to begin anew"
  )


def load_params(info: CheckpointInfo, mesh: Mesh) -> Params:
  """The parameters on the mesh, float32, whatever mesh wrote them."""
  target = with_shardings(abstract_params(info.config), param_shardings(info.config, mesh))
  with reading(info.path):
    return _load(info, {"params": target})["params"]


def load_head(info: CheckpointInfo, mesh: Mesh) -> jax.Array:
  """A head's weights on the mesh, float32 [n_classes, n_embd]; only where there are `classes`."""
  shape = len(info.classes), info.config.n_embd
  target = jax.ShapeDtypeStruct(shape, np.float32, sharding=head_sharding(mesh))
  with reading(info.path):
    return _load(info, {"head": {HEAD: target}})["head"][HEAD]


def load_host_params(info: CheckpointInfo) -> Params:
  """The parameters as numpy arrays of the stored dtype; no device is touched."""
  with reading(info.path), _alone():
    stored = ocp.checkpointables_metadata(info.path).metadata["params"]
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored)
    return _load(info, {"params": target})["params"]


def _load(info: CheckpointInfo, target: dict[str, Any]) -> dict[str, Any]:
  items = ocp.load_checkpointables(info.path, target)
  file_sums.check(info.path, info.sums, items)
  return items


def load_pretrained(path: str, mesh: Mesh, **model_overrides: Any) -> LoadedModel:
  """Reads a checkpoint's parameters (not its optimizer) onto the mesh.

  Args:
    path: a workdir, or one checkpoint in it.
    mesh: where the parameters go; any shape, whatever mesh wrote them.
    **model_overrides: fields of ImageGPTConfig that don't change the parameters (dtype, …).
  """
  info = describe(path)
  return with_params(info, load_params(info, mesh), **model_overrides)


def with_params(info: CheckpointInfo, params: Params, **model_overrides: Any) -> LoadedModel:
  """Adds parameters to a description; `model_overrides` as for `load_pretrained`."""
  fields = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
  fields["config"] = dataclasses.replace(info.config, **model_overrides)
  return LoadedModel(**fields, params=params)
