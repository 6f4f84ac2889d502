"""Mapping between foreign checkpoints' tensors and our parameters, common to all formats.

A format is a table of `Leaf`, one per array of our parameter tree, which lists the foreign tensors
it is made of and the conversions. Reading and writing share the table, so a checkpoint that we
write is one that we can read. File formats don't belong here.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from igpt_jax import units
from igpt_jax.errors import UserError
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.reporting import progress
from igpt_jax.units import data_size

Path = tuple[str, ...]
Report = Callable[[str], None]
Spec = tuple[tuple[int, ...], np.dtype | None]  # shape, dtype (None if unsupported)
WEIGHT_DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))


def _same(array: np.ndarray) -> np.ndarray:
  return array


@dataclasses.dataclass(frozen=True)
class Part:
  """One foreign tensor's share of a leaf: leaf[index] = to_ours(tensor), and back.

  `to_theirs` gets leaf[index]. It is None for a tensor made of several leaves, which the format
  writes itself.
  """

  name: str
  shape: tuple[int, ...]
  index: tuple[int, ...] = ()
  to_ours: Callable[[np.ndarray], np.ndarray] = _same
  to_theirs: Callable[[np.ndarray], np.ndarray] | None = _same


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of our parameter tree, and the foreign tensors it is made of."""

  path: Path
  shape: tuple[int, ...]
  parts: tuple[Part, ...]


class Source(Protocol):
  """An opened checkpoint: shapes and dtypes of its tensors, and a reader of one tensor."""

  @property
  def specs(self) -> Mapping[str, Spec]: ...

  def read(self, name: str) -> np.ndarray: ...

  def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Foreign:
  """A foreign checkpoint, opened and checked, its weights not yet read. Close it, or use `with`.

  Attributes:
    format: "openai" or "huggingface".
    path: the checkpoint's prefix or directory.
    config: the checkpoint's model and objective; fields that checkpoints don't store (dtype of
      computation, remat, attention) have their defaults.
    table: every leaf of our parameters.
    source: the file reader.
    clusters: the palette beside the weights, float32 [n_vocab, 3] in [-1, 1], or None.
    notes: lines for the user, about skipped tensors, a tied head and the palette's file.
  """

  format: str
  path: str
  config: ImageGPTConfig
  table: tuple[Leaf, ...]
  source: Source
  clusters: np.ndarray | None = None
  notes: tuple[str, ...] = ()

  def __enter__(self) -> "Foreign":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    self.source.close()

  def dtype_of(self, leaf: Leaf) -> np.dtype:
    """Returns the dtype of the leaf's tensors; float32 if they differ."""
    dtypes = {self.source.specs[part.name][1] for part in leaf.parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return np.dtype(np.float32) if dtype is None else dtype

  def load(
    self,
    *,
    place: Callable[[Path, np.ndarray], Any] | None = None,
    dtype: Any = None,
    report: Report | None = None,
  ) -> dict[str, Any]:
    """Reads all parameters into our nested dict.

    Reads the largest leaf first: if `place` copies every leaf to its devices, the host never holds two
    copies of a large leaf while all the others are in memory.

    Args:
      place: maps a leaf's path and array to the tree's leaf; called before the next leaf is read. None
        keeps numpy arrays.
      dtype: dtype of the arrays; None keeps the checkpoint's.
      report: called with a line of progress every few seconds, and one at the end.
    """
    dtype = None if dtype is None else np.dtype(dtype)
    if place is None:
      counts = (math.prod(leaf.shape) for leaf in self.table)
      check_memory(sum(counts) * (dtype or self.dtype_of(self.table[0])).itemsize, self.path)

    def size(leaf: Leaf) -> int:
      return math.prod(leaf.shape) * (dtype or self.dtype_of(leaf)).itemsize

    total, largest = sum(map(size, self.table)), max(map(size, self.table))
    check_memory(largest, f"the largest array of {self.path}")
    params: dict[str, Any] = {}
    done, start = 0, time.monotonic()
    clock = progress.Countdown("reading", total, report or (lambda line: None), show=data_size)
    for leaf in sorted(self.table, key=size, reverse=True):
      out = np.empty(leaf.shape, dtype or self.dtype_of(leaf))
      for part in leaf.parts:
        out[part.index] = part.to_ours(self.source.read(part.name))
      done += out.nbytes
      node = params
      for key in leaf.path[:-1]:
        node = node.setdefault(key, {})
      node[leaf.path[-1]] = out if place is None else place(leaf.path, out)
      del out
      clock.tick(done)
    if report:
      taken = units.seconds(time.monotonic() - start)
      report(f"read {data_size(done)} in {taken} from {self.path}")
    return params


def placer(shardings: Mapping[str, Any]) -> Callable[[Path, np.ndarray], jax.Array]:
  """Returns a `place` for `Foreign.load` that puts a leaf onto its devices, on any number of hosts.

  Args:
    shardings: our nested dict with a `jax.sharding.Sharding` for every leaf.
  """

  def place(path: Path, array: np.ndarray) -> jax.Array:
    sharding: Any = shardings
    for key in path:
      sharding = sharding[key]
    placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    placed.block_until_ready()
    # JAX frees the host's array only at its next call. Make one now, since otherwise the next leaf
    # is read into memory beside this one.
    jax.device_put(0)
    return placed

  return place


def check_memory(size: int, what: str) -> None:
  """Raises UserError if `size` bytes exceed the memory; a sparse file can claim any size."""
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if size > memory:
    raise UserError(
      f"memory: {what} takes {data_size(size)}, this machine has {data_size(memory)}; "
      "fix: check that this is the right checkpoint, or use a machine with more memory"
    )


def check_specs(table: tuple[Leaf, ...], specs: Mapping[str, Spec], where: str) -> None:
  """Raises UserError listing tensors that are missing, misshaped or not of a float type."""
  problems = {}
  for leaf in table:
    for part in leaf.parts:
      if part.name not in specs:
        problems[part.name] = "missing"
        continue
      shape, dtype = specs[part.name]
      if shape != part.shape:
        problems[part.name] = f"has shape {list(shape)}, expected {list(part.shape)}"
      elif dtype not in WEIGHT_DTYPES:
        problems[part.name] = "isn't float32, float16 or bfloat16"
  if problems:
    raise UserError(
      f"tensors of {where}: {listing(f'{shown(name)} {what}' for name, what in problems.items())}; "
      "expected an Image GPT's; fix: check that this is the right checkpoint, and complete"
    )


def shown(value: Any) -> str:
  """Returns a file's value as short printable text for a message."""
  text = value if isinstance(value, str) and value.isprintable() and value else ascii(value)
  return text if len(text) <= 100 else text[:100] + "…"


def listing(names: Iterable[str]) -> str:
  """Returns the first five names and the number of the others as text."""
  names = list(names)
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return "; ".join(map(shown, names[:5])) + more


def foreign_tensors(
  table: tuple[Leaf, ...],
  params: Mapping[str, Any],
  *,
  fetch: Callable[[Any], np.ndarray] = np.asarray,
  report: Report | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array) of every foreign tensor, with one leaf on the host at a time.

  Args:
    table: the format's leaves; parts without `to_theirs` are skipped.
    params: our nested dict; leaves may be numpy or jax arrays.
    fetch: copies one leaf to this host as a numpy array.
    report: called with a line of progress every few seconds.

  Raises:
    UserError: a leaf is missing, or its shape isn't the table's.
  """
  clock = progress.Countdown("writing: arrays", len(table), report or (lambda line: None))
  for i, leaf in enumerate(table):
    clock.tick(i)
    parts = [(part, part.to_theirs) for part in leaf.parts if part.to_theirs]
    if not parts:
      continue
    array = fetch(lookup(params, leaf))
    for part, to_theirs in parts:
      yield part.name, np.ascontiguousarray(to_theirs(array[part.index]))
    del array


def lookup(params: Mapping[str, Any], leaf: Leaf) -> Any:
  """Returns the leaf's array in our tree; raises UserError if it is missing or misshaped."""
  node: Any = params
  for key in leaf.path:
    if not isinstance(node, Mapping) or key not in node:
      raise UserError(f"parameter: {'/'.join(leaf.path)} is missing; expected it of this model")
    node = node[key]
  if tuple(node.shape) != leaf.shape:
    raise UserError(
      f"parameter: {'/'.join(leaf.path)} has shape {list(node.shape)}; expected {list(leaf.shape)}"
    )
  return node
