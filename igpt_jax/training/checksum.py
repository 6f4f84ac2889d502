"""A number that tells one set of parameters from another, the same on every mesh and host."""

import hashlib

import jax
import jax.numpy as jnp

from igpt_jax.model.image_gpt import Params


def checksum(params: Params) -> str:
  """16 hexadecimal digits of the names, shapes and bits of float32 leaves; exact, where they lie.

  Against mistakes, not against forgery: of each leaf, hashes of its numbers and their places are summed
  modulo 2**32.
  """
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
  said = [
    f"{jax.tree_util.keystr(path)} {leaf.shape} {int(total)}"
    for (path, leaf), total in zip(leaves, sums, strict=True)
  ]
  return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_sum(leaf) for leaf in leaves]


def _sum(leaf: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
  place = jnp.zeros(leaf.shape, jnp.uint32)
  for axis in range(leaf.ndim):
    along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    place = _mixed(place + along + jnp.uint32(axis + 1))
  return jnp.sum(_mixed(bits ^ place), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
  """Every bit of the result depends on every bit of x (MurmurHash3's last step)."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)
