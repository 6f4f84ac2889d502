"""Attention of one query per sample over the cached positions before it."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from igpt_jax.model.decoding.cache import KeysValues
from igpt_jax.parallel.sharding import axis_share, parts_around


def attend(
  q_NxHxK: jax.Array, prompt: KeysValues, done: KeysValues, block: KeysValues, last: jax.Array
) -> jax.Array:
  """Returns the attention of one query per sample, float32 [N, H, K].

  Args:
    q_NxHxK: queries.
    prompt: keys and values of B prompts, which N / B samples share.
    done: those of the samples' positions before the block.
    block: those of the positions from there on; what comes after `last` is masked.
    last: index into the block of the newest position.
  """
  dtype = q_NxHxK.dtype
  q_NxHxK = q_NxHxK.astype(jnp.float32) * q_NxHxK.shape[-1] ** -0.5
  parts = [part for part in (prompt, done, block) if part.length]
  scores = [_scores(q_NxHxK, part, dtype) for part in parts]
  scores[-1] = jnp.where(jnp.arange(block.length) <= last, scores[-1], -jnp.inf)
  ends = list(itertools.accumulate(part.length for part in parts[:-1]))
  scores = jnp.concatenate(scores, axis=-1)
  at_once = block.in_rows
  weights = jnp.exp(scores - _over_positions(jnp.max, scores, at_once))
  total = _over_positions(jnp.sum, weights, at_once)
  weights = jnp.split(weights, ends, axis=-1)
  return sum(_mix(*pair, dtype) for pair in zip(weights, parts, strict=True)) / total


def _scores(q_NxHxK: jax.Array, kv: KeysValues, dtype) -> jax.Array:
  """q k, float32 [N, H, T], of B images' keys; int8 keys in rows are cast to `dtype`."""
  if kv.in_rows:
    k = _grouped(_floats(kv.k, dtype))
    q = _by_group(_in_places(q_NxHxK), len(k)).astype(k.dtype)
    scores = jnp.einsum("bgme,btge->bgmt", q, k, preferred_element_type="float32")
    scores = _by_head(scores, q_NxHxK.shape[1])
    return scores if kv.k_scale is None else _scaled(scores, kv.k_scale.swapaxes(1, 2))
  k = kv.k.astype(jnp.float32)
  if _multiplies(q_NxHxK, kv):
    scores = _by_sample(jnp.einsum("bhsk,bhkt->bhst", _by_image(q_NxHxK, len(k)), k))
  else:
    scores = jnp.sum(q_NxHxK[..., None] * k, axis=2)
  return scores if kv.k_scale is None else _scaled(scores, kv.k_scale)


def _mix(weights_NxHxT: jax.Array, kv: KeysValues, dtype) -> jax.Array:
  """Weighted sum of the values, float32 [N, H, K]; the counterpart of `_scores`."""
  if kv.v_scale is not None:
    scale = kv.v_scale.swapaxes(1, 2) if kv.in_rows else kv.v_scale
    weights_NxHxT = _scaled(weights_NxHxT, scale)
  if kv.in_rows:
    v = _grouped(_floats(kv.v, dtype))
    weights = _by_group(weights_NxHxT, len(v)).astype(v.dtype)
    mixed = jnp.einsum("bgmt,btge->bgme", weights, v, preferred_element_type="float32")
    return _from_places(_by_head(mixed, weights_NxHxT.shape[1]))
  v = kv.v.astype(jnp.float32)
  if _multiplies(weights_NxHxT, kv):
    weights = _by_image(weights_NxHxT, len(v))
    return _by_sample(jnp.einsum("bhst,bhtk->bhsk", weights, v))
  products = _split(weights_NxHxT, 8)[..., None] * _split(v, 8)
  return jnp.sum(jax.lax.optimization_barrier(jnp.sum(products, axis=3)), axis=2)


def _multiplies(x_NxHxA: jax.Array, kv: KeysValues) -> bool:
  """True if XLA on a CPU is to multiply matrices; False: to sum up, which casts each number as it reads it.

  Before a product it would write out a whole cast, and of a device's only sample or head a whole copy.
  """
  n, n_head, _ = x_NxHxA.shape
  alone = 1 in (axis_share("batch", n), axis_share("heads", n_head))
  return len(kv.k) < n or (kv.k.dtype == jnp.float32 and not alone)


# XLA on a CPU writes out all numbers that a long sum is of, and reduces an innermost axis number by number.
# In two steps, kept apart by a barrier, it computes vectors of what it reads: the first step is over a few
# positions (`_mix`), or over those so many apart.


def _over_positions(
  reduce: Callable[..., jax.Array], x_NxHxT: jax.Array, at_once: bool
) -> jax.Array:
  """Maximum or sum, [N, H, 1]."""
  if not at_once:
    x_NxHxT = jax.lax.optimization_barrier(reduce(_split(x_NxHxT, 32), axis=2))
  return reduce(x_NxHxT, axis=-1, keepdims=True)


def _split(x_NxHxT: jax.Array, most: int) -> jax.Array:
  """[N, H, T, ...] -> [N, H, T / n, n, ...], n being the largest divisor of both T and `most`."""
  n, n_head, length, *rest = x_NxHxT.shape
  return x_NxHxT.reshape(n, n_head, -1, math.gcd(length, most), *rest)


def _scaled(x_NxHxT: jax.Array, scale_BxHxT: jax.Array) -> jax.Array:
  by_image = x_NxHxT.reshape(len(scale_BxHxT), -1, *x_NxHxT.shape[1:])
  return (by_image * scale_BxHxT[:, None]).reshape(x_NxHxT.shape)


def _by_image(x_NxHxA: jax.Array, n_images: int) -> jax.Array:
  """-> [B, H, samples of an image, A], so that an image's keys are read once for all its samples."""
  return x_NxHxA.reshape(n_images, -1, *x_NxHxA.shape[1:]).swapaxes(1, 2)


def _by_sample(x_BxHxSxA: jax.Array) -> jax.Array:
  x_BxSxHxA = x_BxHxSxA.swapaxes(1, 2)
  return x_BxSxHxA.reshape(-1, *x_BxSxHxA.shape[2:])


# Rows hold all heads side by side. Taken apart, every head and sample would be a product of one row,
# which accelerators have no units for: they'd cast all keys to float32 first. So a head's query is a
# row as wide as all heads, zero outside its own channels, and an image's samples and heads are the
# rows of one product that reads the keys in place; the zeros cost less than the reading. Heads that
# are split over devices form as many separate groups, [B, G, M = S H / G, E / G].


def _floats(x: jax.Array, dtype) -> jax.Array:
  return x.astype(dtype) if x.dtype == jnp.int8 else x  # exact in bfloat16, too


def _grouped(rows_BxTxE: jax.Array) -> jax.Array:
  """-> [B, T, G, E / G]."""
  return rows_BxTxE.reshape(*rows_BxTxE.shape[:2], parts_around("heads"), -1)


def _by_group(x_NxHxA: jax.Array, n_images: int) -> jax.Array:
  """-> [B, G, M, A]."""
  n, n_head, last = x_NxHxA.shape
  n_groups = parts_around("heads")
  x = x_NxHxA.reshape(n_images, n // n_images, n_groups, n_head // n_groups, last)
  return x.swapaxes(1, 2).reshape(n_images, n_groups, -1, last)


def _by_head(x_BxGxMxA: jax.Array, n_head: int) -> jax.Array:
  """-> [N, H, A]: the inverse of `_by_group`."""
  n_images, n_groups, _, last = x_BxGxMxA.shape
  x = x_BxGxMxA.reshape(n_images, n_groups, -1, n_head // n_groups, last)
  return x.swapaxes(1, 2).reshape(-1, n_head, last)


def _places(n_head: int, head_dim: int) -> jax.Array:
  """One-hot map of the h heads of a group to their own channels, [h, E / G]."""
  return jnp.repeat(jnp.eye(n_head // parts_around("heads")), head_dim, axis=1)


def _in_places(x_NxHxK: jax.Array) -> jax.Array:
  """-> [N, H, E / G]: every head's channels at their place in its group's rows, zeros elsewhere."""
  n, n_head, head_dim = x_NxHxK.shape
  places = _places(n_head, head_dim)
  wide = x_NxHxK.reshape(n, -1, 1, places.shape[1]) * places
  return wide.reshape(n, n_head, -1)


def _from_places(x_NxHxE: jax.Array) -> jax.Array:
  """-> [N, H, K]: every head's own channels; cross-head products are discarded."""
  n, n_head, _ = x_NxHxE.shape
  width = x_NxHxE.shape[2] * parts_around("heads")
  places = _places(n_head, width // n_head)
  own = jnp.sum(x_NxHxE.reshape(n, -1, *places.shape) * places, axis=2)
  return own.reshape(n, n_head, -1)
