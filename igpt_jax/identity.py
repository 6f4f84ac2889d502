"""What is kept is known by what decided it, not by where it lies: digests, and differences in words.

Ground floor.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

ABSENT = "absent"


def digest(value: Any) -> str:
  """16 hexadecimal digits of a value that JSON can hold."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def of_palette(centers: np.ndarray | None) -> str | None:
  """16 hexadecimal digits of colours, float [k, 3]; None: there are none."""
  if centers is None:
    return None
  return hashlib.sha256(np.ascontiguousarray(centers, np.float32).tobytes()).hexdigest()[:16]


def of_file(path: str) -> str:
  """16 hexadecimal digits of a file's contents."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
  """A JSON object that was kept.

  Raises:
    OSError: it can't be read.
    ValueError: it isn't a JSON object.
  """
  with open(path, encoding="utf-8") as file:
    values = json.load(file)
  if not isinstance(values, dict):
    raise ValueError("not a JSON object")
  return values


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """The leaves of a tree of mappings, by their names joined with dots."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat.update(flatten(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat


def differing(theirs: Any, mine: Mapping[str, Any]) -> list[str]:
  """A line for each value of `mine` that `theirs`, which was read from JSON, hasn't got."""
  kept = flatten(theirs) if isinstance(theirs, Mapping) else {}
  wanted = flatten(json.loads(json.dumps(mine)))
  return [
    f"  {name}: {kept.get(name, ABSENT)} there, {value} here"
    for name, value in wanted.items()
    if name not in kept or kept[name] != value
  ]
