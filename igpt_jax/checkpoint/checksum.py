"""Checksums of parameter trees, the same on every mesh and host."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PIECE = 1 << 22  # elements of a leaf that `checksum_on_host` processes at a time


def checksum(tree: Any) -> str:
  """Hashes names, shapes and bits of all leaves, on the devices that hold them: 16 hexadecimal digits.

  Detects mistakes, not forgery: sums hashes of every leaf's elements and their indices modulo 2**32.
  Floats are hashed as float32, to which they must convert without loss, integers modulo 2**32.
  """
  if all(_is_here(leaf) for leaf in jax.tree.leaves(tree)):
    return checksum_on_host(tree)
  return _digest(tree, lambda leaves: jax.device_get(_sums(leaves)))


def checksum_on_host(tree: Any) -> str:
  """Returns `checksum` of numpy arrays, computed by numpy without devices and with little memory."""
  return _digest(tree, lambda leaves: [_sum_on_host(np.asarray(leaf)) for leaf in leaves])


class Summed:
  """Shape and sum of an array that needn't be kept, a leaf for `checksum_of_summed`."""

  def __init__(self, leaf: np.ndarray):
    self.shape, self.total = leaf.shape, _sum_on_host(leaf)


def checksum_of_summed(tree: Any) -> str:
  """Returns `checksum` of the tree whose arrays were replaced by `Summed`."""
  return _digest(tree, lambda leaves: [leaf.total for leaf in leaves])


def _is_here(leaf: Any) -> bool:
  """Returns True if the leaf is in this process' memory, so that numpy can hash it without compiling."""
  if not isinstance(leaf, jax.Array):
    return True
  return leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())


def _digest(tree: Any, sums_of: Callable[[list], Sequence[Any]]) -> str:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  sums = sums_of([leaf for _, leaf in leaves])
  parts = [
    f"{jax.tree_util.keystr(path)} {leaf.shape} {int(total)}"
    for (path, leaf), total in zip(leaves, sums, strict=True)
  ]
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_sum(leaf) for leaf in leaves]


def _sum(leaf: jax.Array) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jnp.floating):
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
  else:
    bits = leaf.astype(jnp.uint32)
  index = jnp.zeros(leaf.shape, jnp.uint32)
  for axis in range(leaf.ndim):
    along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    index = _mixed(index + along + jnp.uint32(axis + 1))
  return jnp.sum(_mixed(bits ^ index), dtype=jnp.uint32)


def _sum_on_host(leaf: np.ndarray) -> int:
  if not leaf.ndim:
    leaf, indices = leaf[None], np.zeros(1, np.uint32)
  else:
    indices = _mixed(np.arange(leaf.shape[0], dtype=np.uint32) + np.uint32(1))
  total = 0
  rows = max(_PIECE * len(leaf) // max(leaf.size, 1), 1)
  for first in range(0, len(leaf), rows):
    part, index = leaf[first : first + rows], indices[first : first + rows]
    for axis in range(1, leaf.ndim):
      along = np.arange(leaf.shape[axis], dtype=np.uint32)
      index = _mixed(index[..., None] + along + np.uint32(axis + 1))
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      bits = np.ascontiguousarray(part, np.float32).view(np.uint32)
    else:
      bits = part.astype(np.uint32)
    total += int(_mixed(bits ^ index).sum(dtype=np.uint64))
  return total % 2**32


def _mixed(x: Any) -> Any:
  """Hashes uint32 so that every bit depends on every bit of x (MurmurHash3's final mix)."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> shift)) * np.uint32(factor)
  return x ^ (x >> 16)
