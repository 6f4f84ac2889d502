"""Entry points for foreign checkpoints: detects a path's format, reads it and writes it.

Only the choice between formats belongs here. Our own checkpoints are recognised, but opened by
`igpt_jax.checkpoint`.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from igpt_jax import files
from igpt_jax.errors import UserError
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained import clusters as palettes
from igpt_jax.pretrained import huggingface, openai
from igpt_jax.pretrained.leaves import Foreign, Path, Report
from igpt_jax.pretrained.weight_files import is_safetensors

FORMATS = ("openai", "huggingface", "orbax", "safetensors")
OWN = ("orbax", "safetensors")  # this program's
_BUNDLE_FILE = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
_ORBAX_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt", "descriptor")


def detect(path: str | os.PathLike[str]) -> str:
  """Returns the format of a checkpoint: "openai", "huggingface", "orbax" or "safetensors".

  Args:
    path: a TensorFlow checkpoint's prefix, one of its files, or a directory with just that
      checkpoint; a Hugging Face model directory or its config.json; a directory that Orbax wrote,
      or a run's workdir; a model of this program in one file.

  Raises:
    UserError: the path doesn't exist, or its format is unknown.
  """
  path = files.local("checkpoint", os.fspath(path))
  if _bundle_prefix(path):
    return "openai"
  if os.path.isfile(path) and os.path.basename(path) == "config.json":
    return "huggingface"
  if os.path.isfile(path) and is_safetensors(path):
    return "safetensors"
  if not os.path.isdir(path):
    what = "a file of no known format" if os.path.exists(path) else "nothing is there"
    raise UserError(
      f"checkpoint: {path}: {what}; expected a TensorFlow checkpoint's prefix (model.ckpt-N), a "
      "Hugging Face directory, a workdir of this program, a model in one file, or one of the Hugging Face hub "
      "(OWNER/NAME, and where a folder OWNER lies here OWNER/NAME@main)"
    )
  names = set(os.listdir(path))
  if names & set(_ORBAX_FILES) or any(_holds_orbax(os.path.join(path, name)) for name in names):
    return "orbax"
  if "config.json" in names:
    # A workdir that has no checkpoint yet keeps its run's settings in a file of the same name.
    config = palettes.read_json(os.path.join(path, "config.json"))
    return "orbax" if "job" in config else "huggingface"
  raise UserError(
    f"checkpoint: {path} holds {', '.join(sorted(names)[:8]) or 'nothing'}; expected a TensorFlow "
    "checkpoint (model.ckpt-N.index and .data files), config.json with safetensors, or a checkpoint "
    "of this program"
  )


def _holds_orbax(path: str) -> bool:
  """True for the directory of one step, or a directory of such directories."""
  if not os.path.isdir(path):
    return False
  names = os.listdir(path)
  return any(name in _ORBAX_FILES for name in names) or any(
    os.path.exists(os.path.join(path, name, file)) for name in names for file in _ORBAX_FILES
  )


def _bundle_prefix(path: str) -> str | None:
  """Returns the TensorFlow checkpoint prefix of `path`, or None; a directory may hold just one."""
  prefix = _BUNDLE_FILE.sub("", path)
  if os.path.exists(prefix + ".index"):
    return prefix
  if not os.path.isdir(path):
    return None
  indices = sorted(name for name in os.listdir(path) if name.endswith(".index"))
  if len(indices) > 1:
    raise UserError(
      f"checkpoint: {path} holds {len(indices)}: {', '.join(indices[:5])}; "
      "fix: name one, without .index"
    )
  return os.path.join(path, indices[0].removesuffix(".index")) if indices else None


def open_foreign(path: str | os.PathLike[str]) -> Foreign:
  """Opens an OpenAI or Hugging Face checkpoint and checks all of it except the weights' values.

  Raises:
    UserError: the path is no such checkpoint, is damaged, or holds another model than Image GPT.
  """
  path = os.fspath(path)
  kind = detect(path)
  if kind in OWN:
    raise UserError(
      f"checkpoint: {path} is this program's own; expected OpenAI's or Hugging Face's"
    )
  if kind == "huggingface":
    is_file = os.path.isfile(path)
    return huggingface.open_directory(os.path.dirname(path) or "." if is_file else path)
  prefix = _bundle_prefix(path)
  assert prefix is not None, "`detect` returned openai, so a prefix exists"
  foreign = openai.open_checkpoint(prefix)
  directory = os.path.dirname(prefix) or "."
  try:
    clusters, palette_path = palettes.find_clusters(directory, foreign.config.n_vocab)
  except BaseException:
    foreign.close()
    raise
  if clusters is None:
    return foreign
  notes = (*foreign.notes, f"palette from {palette_path}")
  return dataclasses.replace(foreign, clusters=clusters, notes=notes)


class Loaded(NamedTuple):
  """Content of a foreign checkpoint; `leaves.Foreign` describes config, clusters and notes."""

  config: ImageGPTConfig
  params: dict[str, Any]
  clusters: np.ndarray | None
  notes: tuple[str, ...]


def load(
  path: str | os.PathLike[str],
  *,
  place: Callable[[Path, np.ndarray], Any] | None = None,
  dtype: Any = None,
  report: Report | None = None,
) -> Loaded:
  """Reads a foreign checkpoint; the host holds one leaf at a time if `place` moves it to a device.

  Args:
    path: as for `detect`.
    place: maps (path in our tree, array) to the tree's leaf, e.g. the array on its devices.
    dtype: dtype of the arrays; None keeps the checkpoint's.
    report: called with every note, and as `leaves.Foreign.load` does.
  """
  with open_foreign(path) as foreign:
    if report:
      for note in foreign.notes:
        report(note)
    params = foreign.load(place=place, dtype=dtype, report=report)
    return Loaded(foreign.config, params, foreign.clusters, foreign.notes)


def check_holds(format: str, config: ImageGPTConfig) -> None:
  """Raises UserError if a format can't hold the model: others' code would compute another."""
  if format not in OWN and not config.tokens.needs_palette:
    raise UserError(
      f"format: {format}, but the model was made with data.token_kind={config.token_kind}: its tokens are raw "
      "RGB, and others' Image GPT has those of a palette; expected the paper's model; fix: orbax or "
      "safetensors, this program's own formats"
    )
  if format not in OWN and config.options:
    chosen = ", ".join(f"model.{name}={value}" for name, value in config.options.items())
    raise UserError(
      f"format: {format}, but the model was made with {chosen}, which others' Image GPT doesn't compute; "
      "expected the paper's model; fix: orbax or safetensors, this program's own formats"
    )


def save(
  path: str | os.PathLike[str],
  format: str,
  config: ImageGPTConfig,
  params: Mapping[str, Any],
  *,
  clusters: np.ndarray | None = None,
  num_shards: int = 1,
  fetch: Callable[[Any], np.ndarray] = np.asarray,
  report: Report | None = None,
) -> None:
  """Writes parameters as "openai" (path: prefix) or "huggingface" (path: directory).

  Args:
    clusters: palette, float32 [n_vocab, 3] in [-1, 1], written to kmeans_centers.npy beside the
      prefix, or to preprocessor_config.json.
    num_shards: number of OpenAI's data files. Hugging Face's files are split at 2 GB.
    fetch: copies one leaf to this host as a numpy array.
    report: called with a line of progress every few seconds.

  Raises:
    UserError: the target exists, or the format can't hold this model.
  """
  check_holds(format, config)
  if format == "huggingface":
    huggingface.write_directory(path, config, params, clusters=clusters, fetch=fetch, report=report)
  elif format == "openai":
    prefix = os.fspath(path)
    palette = os.path.join(os.path.dirname(prefix), palettes.NPY_NAME)
    if clusters is not None and os.path.exists(palette):
      raise UserError(f"palette to write: {palette} exists; fix: name another target directory")
    with contextlib.ExitStack() as undo:
      # The palette goes first, so that a complete checkpoint always has its palette.
      if clusters is not None:
        try:
          with files.replacing(palette) as partial, open(partial, "wb") as file:
            np.save(file, np.asarray(clusters, np.float32), allow_pickle=False)
        except OSError as error:
          raise UserError(
            f"palette to write: {palette}: {error.strerror}; expected a place to write to"
          ) from error
        undo.callback(os.remove, palette)
      openai.write_checkpoint(
        prefix, config, params, num_shards=num_shards, fetch=fetch, report=report
      )
      undo.pop_all()
  else:
    raise UserError(f"format: {format!r}; expected one of openai, huggingface")
