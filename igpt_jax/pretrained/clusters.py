"""Palettes that come with foreign checkpoints: float32 [k, 3] RGB centres in [-1, 1].

The release's `kmeans_centers.npy` and Hugging Face's `preprocessor_config.json` hold the same
numbers: a colour c in 0..255 is stored as c / 127.5 - 1. Only these two file formats belong here.
"""

import json
import math
import os
import stat
from typing import Any

import numpy as np

from igpt_jax.errors import UserError

NPY_NAME = "kmeans_centers.npy"
JSON_NAME = "preprocessor_config.json"
_MAX_COLOURS = 65536
_MAX_JSON_BYTES = 16 << 20


def read_json(path: str) -> dict[str, Any]:
  """Reads a JSON object of at most 16 MiB.

  Raises:
    UserError: the file isn't regular, can't be read, is too large, or isn't a JSON object.
  """
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
      raise UserError(f"file: {path}; expected a regular file")
    if status.st_size > _MAX_JSON_BYTES:
      raise UserError(f"file: {path}: {status.st_size} bytes; expected at most 16 MiB of JSON")
    with open(path, "rb") as file:
      value = json.loads(file.read(status.st_size))
  except OSError as error:
    raise UserError(f"file: {path}: {error.strerror}; expected a readable file") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"file: {path}: {str(error)[:200]}; expected JSON") from error
  if not isinstance(value, dict):
    raise UserError(f"file: {path}; expected a JSON object, not {type(value).__name__}")
  return value


def read_clusters(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads `kmeans_centers.npy` or `preprocessor_config.json`: float32 [k, 3] in [-1, 1].

  Raises:
    UserError: the file has another format, or its values aren't colours.
  """
  path = os.fspath(path)
  if path.endswith(".json"):
    config = read_json(path)
    if "clusters" not in config:
      raise UserError(f"palette: {path} has no clusters; expected an ImageGPTImageProcessor's file")
    for name in ("image_mean", "image_std"):
      if config.get(name) not in (None, [0.5, 0.5, 0.5]):
        raise UserError(
          f"palette: {path}: {name} {str(config[name])[:100]!a}; expected 0.5 for every channel, as "
          "Image GPT's colours are scaled to [-1, 1]"
        )
    try:
      with np.errstate(over="ignore"):  # overflow gives inf, refused below
        clusters = np.asarray(config["clusters"], dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
      raise UserError(
        f"palette: {path}: clusters: {str(error)[:200]!a}; expected [k, 3] numbers"
      ) from error
  else:
    clusters = _read_npy(path)
  if clusters.ndim != 2 or clusters.shape[1] != 3 or not 1 <= len(clusters) <= _MAX_COLOURS:
    raise UserError(f"palette: {path}: shape {list(clusters.shape)}; expected [k, 3]")
  if not np.all(np.abs(clusters) <= 1 + 1e-3):
    raise UserError(
      f"palette: {path}: centres from {clusters.min():g} to {clusters.max():g}; expected [-1, 1]; "
      "fix: RGB values of 0 to 255 become c / 127.5 - 1"
    )
  return clusters


def _read_npy(path: str) -> np.ndarray:
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise UserError(f"palette: {path}; expected a regular file")
    with open(path, "rb") as file:
      # Check the header first, so that a false one can't make numpy allocate a huge array.
      header = np.lib.format
      reader = {(1, 0): header.read_array_header_1_0, (2, 0): header.read_array_header_2_0}
      shape, _, dtype = reader[header.read_magic(file)](file)
      if dtype.kind not in "fiu" or len(shape) != 2 or not 0 < math.prod(shape) <= 3 * _MAX_COLOURS:
        raise UserError(f"palette: {path}: {dtype} {list(shape)[:5]}; expected [k, 3] numbers")
      file.seek(0)
      return np.load(file, allow_pickle=False).astype(np.float32)
  except OSError as error:
    raise UserError(f"palette: {path}: {error.strerror or error}; expected a .npy file") from error
  except UserError:
    raise
  except Exception as error:  # numpy evaluates the header as a literal, which can raise anything
    raise UserError(
      f"palette: {path}: {str(error)[:200]!a}; expected a .npy file of [k, 3] numbers"
    ) from error


def find_clusters(directory: str, n_vocab: int) -> tuple[np.ndarray | None, str]:
  """Returns the palette in a checkpoint's directory and its path, or (None, "").

  Raises:
    UserError: the palette is damaged, or its number of colours isn't `n_vocab`.
  """
  for name in (NPY_NAME, JSON_NAME):
    path = os.path.join(directory, name)
    if os.path.exists(path):
      clusters = read_clusters(path)
      if (k := len(clusters)) != n_vocab:
        raise UserError(f"palette: {path} has {k} colours; expected the model's {n_vocab}")
      return clusters, path
  return None, ""
