"""Reads checkpoints for any job: their description, parameters and head.

Everything read is compared with the checksum that was saved with it.
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
from orbax.checkpoint._src.futures import synchronization  # no public API numbers operations

from igpt_jax import bucket_errors, files
from igpt_jax.checkpoint import file_sums, folders, in_buckets
from igpt_jax.checkpoint.settled import settled
from igpt_jax.errors import NewerFormat, UserError
from igpt_jax.model.image_gpt import Params, abstract_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.training.state import HEAD, head_sharding, param_shardings


def with_shardings(abstract: Any, shardings: Any) -> Any:
  """Returns `abstract` as ShapeDtypeStructs with these shardings."""

  def placed(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(placed, abstract, shardings)


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
  """Description of a trained model of any origin, without its parameters.

  Attributes:
    path: the checkpoint's folder or file prefix.
    step: number of updates that it was trained for; 0 if unknown.
    config: the model.
    palette: float32 [k, 3] in [-1, 1]; None if it was trained on tokens without a palette.
    run: its training: "model", "objective", "mask_probability", "resolution"; if this program trained
      it, also "config", "data", …
    format: "orbax" for this program's own, or "openai", "huggingface".
    classes: names of a head's classes; () if there is no head.
    sums: checksums of its items; {} if it has none.
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
  """Trained model with `params` on the mesh, float32."""

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
  """Converts orbax' errors over damaged files to a UserError of one line, and silences its log."""
  if files.is_remote(folder):
    in_buckets.mend()
  try:
    with quiet(logging.CRITICAL), settled:
      yield
  except UserError:
    raise
  except Exception as error:  # damaged files raise errors of many kinds
    first: BaseException = error
    while cause := first.__cause__ or first.__context__:
      first = cause
    if files.is_remote(folder) and (unread := bucket_errors.failure(folder, first)):
      raise unread from error
    raise UserError(
      f"checkpoint: {folder} can't be read ({type(first).__name__}: {str(first)[:200]!a}); expected "
      f"a whole checkpoint of this program; fix: {folders.advice(folder)}"
    ) from error


_single_process_ids = itertools.count(10**9)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
  """Lets one process read without the others, for which Orbax would otherwise wait.

  Orbax numbers a process' operations, and processes synchronise by equal numbers. Reads of one process
  take numbers from another range, or it would wait forever at the next common operation. Don't use it
  during a write in the background, which asks for its own number.
  """
  if jax.process_count() == 1:
    yield
    return
  context, process = ocp.Context(), jax.process_index()
  context.multiprocessing.primary_host = process
  context.multiprocessing.active_processes = {process}
  context.multiprocessing.barrier_sync_key_prefix = f"igpt_jax_{process}"
  ids = synchronization.OperationIdGenerator
  before = ids._operation_id_counter, ids._operation_id
  ids._operation_id_counter = _single_process_ids
  try:
    with context:
      yield
  finally:
    ids._operation_id_counter, ids._operation_id = before


def describe(path: str) -> CheckpointInfo:
  """Reads the description and the palette of a checkpoint, but no parameters.

  Args:
    path: a workdir (its newest checkpoint), or one checkpoint.

  Raises:
    UserError: there is no checkpoint, or it is damaged or another program's.
  """
  folder, step = folders.find(path)
  with reading(folder), _alone():
    run, sums, has_head, palette = _read_small_items(folder)
    if "model" not in run:
      raise UserError(
        f"checkpoint: {folder} was not written by igpt_jax: it doesn't name its model; "
        f"fix: {folders.advice(folder)}"
      )
    config = ImageGPTConfig(**run["model"])
    classes = tuple(run["classes"]) if has_head else ()
    palette = None if palette is None else np.asarray(palette["centers"])
  return CheckpointInfo(folder, step, config, palette, run, classes=classes, sums=sums)


def check_readable(folder: str) -> None:
  """Raises UserError if the metadata, the palette or the scores of a checkpoint are damaged."""
  with reading(folder), _alone():
    _, sums, _, _ = _read_small_items(folder)
    file_sums.check_metrics(folder, sums)


def _read_small_items(folder: str) -> tuple[dict[str, Any], dict[str, str], bool, Any]:
  """Returns a checkpoint's run, its items' checksums, whether it has a head, and its palette's item."""
  stored = ocp.checkpointables_metadata(folder)
  run, sums = file_sums.without_sums(folder, stored.custom_metadata)
  for name in sums.keys() - stored.metadata.keys() - {file_sums.METRICS}:
    raise LookupError(f"{name} isn't there")
  items = {}
  if "palette" in stored.metadata:
    items = ocp.load_checkpointables(folder, {"palette": None})
    file_sums.check(folder, sums, items)
  return run, sums, "head" in stored.metadata, items.get("palette")


def newest(workdir: str) -> CheckpointInfo | None:
  """Describes the newest readable checkpoint of a workdir; returns None if there are no checkpoints.

  Raises:
    UserError: there are checkpoints, but none is readable.
  """
  folder, why = folders.folder_of_steps(files.place("workdir", workdir)), {}
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
  """Makes the error that no checkpoint is readable, with the reason for every step."""
  return UserError(
    f"checkpoint: none in {folder} can be gone on from:\n"
    + "\n".join(f"  {step}: {why[step]}" for step in sorted(why))
    + f"\nfix: copy one of them again, another --workdir, or remove {folder} to begin anew"
  )


def load_params(info: CheckpointInfo, mesh: Mesh) -> Params:
  """Reads the parameters onto the mesh, float32; another mesh may have written them."""
  target = with_shardings(abstract_params(info.config), param_shardings(info.config, mesh))
  with reading(info.path):
    return _load(info, {"params": target})["params"]


def load_head(info: CheckpointInfo, mesh: Mesh) -> jax.Array:
  """Reads a head's weights onto the mesh, float32 [n_classes, n_embd]; there must be `classes`."""
  shape = len(info.classes), info.config.n_embd
  target = jax.ShapeDtypeStruct(shape, np.float32, sharding=head_sharding(mesh))
  with reading(info.path):
    return _load(info, {"head": {HEAD: target}})["head"][HEAD]


def load_host_params(info: CheckpointInfo) -> Params:
  """Reads the parameters as numpy arrays of the stored dtype, without devices."""
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
    path: a workdir (its newest checkpoint), or one checkpoint.
    mesh: mesh of any shape; another one may have written the parameters.
    **model_overrides: fields of ImageGPTConfig that don't change the parameters (dtype, …).
  """
  info = describe(path)
  return with_params(info, load_params(info, mesh), **model_overrides)


def with_params(info: CheckpointInfo, params: Params, **model_overrides: Any) -> LoadedModel:
  """Adds parameters to a description; `model_overrides` as for `load_pretrained`."""
  fields = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
  fields["config"] = dataclasses.replace(info.config, **model_overrides)
  return LoadedModel(**fields, params=params)
