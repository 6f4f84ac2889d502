"""A trained model as one safetensors file, to be handed on: parameters, palette, description of the run.

Tensors have the names of their places, "params/blocks/attn/qkv" and "palette/centers"; the file's
metadata holds the run as JSON, with the step and the checksums of all, as a checkpoint's does. There is no
pickle in it, every platform reads it, and the same model makes the same bytes. No run can resume from it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save as to_bytes

from igpt_jax import files
from igpt_jax.checkpoint import file_sums, folders, reading
from igpt_jax.checkpoint.reading import CheckpointInfo
from igpt_jax.config.fields import FIELDS
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import Params, abstract_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained.leaves import Foreign, Leaf, Part, Path, Report, check_specs
from igpt_jax.pretrained.weight_files import open_safetensors

FORMAT = "safetensors"
_KEY = "igpt_jax"  # of the run in the file's metadata, which is text by text
_STEP = "step"
_PARAMS, _COLOURS = "params", "palette/centers"


def save(path: str, params: Params, info: CheckpointInfo) -> None:
  """Writes, all or nothing, a model into one file.

  Args:
    path: the file's; what is there is replaced.
    params: numpy arrays of any float type, which is kept.
    info: the model's description; its path and format are ignored.

  Raises:
    OSError: it can't be written.
  """
  items: dict[str, Any] = {_PARAMS: params}
  if info.palette is not None:
    items["palette"] = {"centers": np.asarray(info.palette, np.float32)}
  run = {**_without_places(info.run), _STEP: info.step}
  stored = json.dumps(file_sums.with_sums(run, file_sums.of_items(items)), sort_keys=True)
  leaves = jax.tree_util.tree_flatten_with_path(items)[0]
  tensors = {_name(keys): np.ascontiguousarray(leaf) for keys, leaf in leaves}
  with files.replacing(path) as partial, open(partial, "wb") as file:
    file.write(to_bytes(tensors, metadata={_KEY: stored}))


def describe(path: str) -> CheckpointInfo:
  """Reads the description and the palette of a model in one file, but no parameters.

  Raises:
    UserError: it is damaged, or holds no model of this program.
  """
  path = os.path.abspath(path)
  with reading.reading(path), _opened(path) as (source, stored):
    run, sums = file_sums.without_sums(path, stored)
    if _PARAMS not in sums:
      raise LookupError("checksums are missing")
    step, config = run.pop(_STEP), ImageGPTConfig(**run["model"])
    _check_run(path, run, step, config)
    palette = None
    if "palette" in sums:
      palette = source.read(_COLOURS)
      file_sums.check(path, sums, {"palette": {"centers": palette}})
      if palette.shape != (config.n_vocab, 3) or palette.dtype != np.float32:
        raise UserError(
          f"checkpoint: {path}: its palette is {palette.dtype.name} {list(palette.shape)}; expected "
          f"float32 [{config.n_vocab}, 3], the model's colours"
        )
    check_specs(_table(config), source.specs, path)
  return CheckpointInfo(path, step, config, palette, run, FORMAT, sums=sums)


def _check_run(path: str, run: Any, step: Any, config: ImageGPTConfig) -> None:
  """Raises UserError if what a file says of its training doesn't fit its model: anybody may write one."""
  probability = run.get("mask_probability")
  for name, value, fits, expected in (
    ("step", step, type(step) is int and step >= 0, "a number of updates"),
    (
      "resolution", run.get("resolution"),
      type(run.get("resolution")) is int
      and config.tokens.n_positions(run["resolution"]) == config.n_positions,
      f"the side of an image of {config.n_positions} positions",
    ),
    (
      "objective", run.get("objective"),
      run.get("objective") == ("autoregressive" if config.causal else "masked"),
      "autoregressive" if config.causal else "masked",
    ),
    (
      "mask_probability", probability,
      isinstance(probability, int | float) and 0 < probability < 1, "a number within (0, 1)",
    ),
  ):  # fmt: skip
    if not fits:
      raise UserError(
        f"checkpoint: {path}: its {name} is {value!r:.80}; expected {expected}; fix: "
        f"{folders.advice(path)}"
      )


def load(
  info: CheckpointInfo,
  *,
  place: Callable[[Path, np.ndarray], Any] | None = None,
  dtype: Any = None,
  report: Report | None = None,
) -> Params:
  """Reads the parameters and compares them with their checksum; arguments as of `leaves.Foreign.load`."""
  with _opened(info.path) as (source, _):
    foreign = Foreign(FORMAT, info.path, info.config, _table(info.config), source)
    params = foreign.load(place=place, dtype=dtype, report=report)
  file_sums.check(info.path, info.sums, {_PARAMS: params})
  return params


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
  """Yields the source of the file's tensors, and the run that its metadata holds.

  Raises:
    UserError: it is damaged, or another program's.
  """
  folder, name = os.path.split(path)
  with contextlib.closing(open_safetensors(folder, [name])) as source:
    text = source.metadata.get(_KEY)
    if text is None:
      raise UserError(
        f"checkpoint: {path} doesn't say which model of this program it holds; expected what "
        "--config.convert.format=safetensors writes; fix: of a Hugging Face model, name the folder, with "
        "its config.json"
      )
    try:
      stored = json.loads(text)
    except ValueError as error:
      raise UserError(
        f"checkpoint: {path}: its description is damaged ({error}); fix: {folders.advice(path)}"
      ) from error
    yield source, stored


def _table(config: ImageGPTConfig) -> tuple[Leaf, ...]:
  """Returns a model's parameters, each stored as one tensor."""
  table = []
  for keys, leaf in jax.tree_util.tree_flatten_with_path({_PARAMS: abstract_params(config)})[0]:
    part = Part(_name(keys), leaf.shape)
    table.append(Leaf(tuple(key.key for key in keys[1:]), leaf.shape, (part,)))
  return tuple(table)


def _name(keys: tuple[Any, ...]) -> str:
  return "/".join(key.key for key in keys)


def _without_places(run: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the run without paths of the machine it was made on: nobody else's files lie there."""
  run = json.loads(json.dumps(run))
  config = run.get("config", {})
  for name, declaration in FIELDS.items():
    group, _, field = name.rpartition(".")
    values = config.get(group, {}) if group else config
    if declaration.path and os.path.dirname(values.get(field, "")):
      values[field] = declaration.default
  return _without_absolute(run)


def _without_absolute(value: Any) -> Any:
  """Returns a value of JSON with "" for absolute paths."""
  if isinstance(value, dict):
    return {name: _without_absolute(item) for name, item in value.items()}
  if isinstance(value, list):
    return [_without_absolute(item) for item in value]
  return "" if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)) else value
