"""Cache of keys and values: its layout, parts and dtypes.

A layer's cache has two parts: the prompt's, once per image however many samples continue it, and the
drawn positions', once per sample. On an accelerator a loop over positions writes into a short block of the
latter and reads the positions before it unchanged: only that block is sliced and masked in the loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.model.image_gpt import ImageGPT
from igpt_jax.parallel import hardware
from igpt_jax.parallel.sharding import constrain

CACHE_DTYPES = ("float32", "bfloat16", "int8")


class KeysValues(NamedTuple):
  """Keys and values of some positions of one layer.

  XLA on a CPU reads them fastest where the axis that is summed over isn't innermost: keys end in
  positions, values in channels. An accelerator takes whole rows, one per position.

  Attributes:
    k: [N, n_head, head_dim, T], or rows [N, T, n_head * head_dim].
    v: [N, n_head, T, head_dim], or rows [N, T, n_head * head_dim].
    k_scale, v_scale: factors of int8 keys and values, float32 [N, n_head, T], or rows [N, T, n_head];
      None with other dtypes.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None

  @property
  def in_rows(self) -> bool:
    return self.k.ndim == 3

  @property
  def length(self) -> int:
    return self.k.shape[1] if self.in_rows else self.k.shape[3]


class Cache(NamedTuple):
  """Keys and values of one layer: of B prompts, and of N samples after those, filled from the left."""

  prompt: KeysValues
  drawn: KeysValues


def keeps_rows() -> bool:
  """True if `KeysValues` are rows on the platform that programs are compiled for."""
  return hardware.platform() != "cpu"


def _map_fields(function: Callable, *parts: KeysValues) -> KeysValues:
  """Maps function(axis of positions, *arrays) over the fields that aren't None."""
  axes = (1, 1, 1, 1) if parts[0].in_rows else (3, 2, 2, 2)
  fields = zip(axes, *parts, strict=True)
  mapped: Any = (None if xs[0] is None else function(axis, *xs) for axis, *xs in fields)
  return KeysValues(*mapped)


def _pin(kv: KeysValues) -> KeysValues:
  axes = ("batch", "length", "heads") if kv.in_rows else ("batch", "heads", None, None)
  return jax.tree.map(lambda x: constrain(x, *axes[: x.ndim]), kv)


def take(kv: KeysValues, start: int, end: int) -> KeysValues:
  """Returns positions start..end-1."""
  return _map_fields(lambda axis, x: jax.lax.slice_in_dim(x, start, end, axis=axis), kv)


def put(kv: KeysValues, part: KeysValues, at: jax.Array | int) -> KeysValues:
  """Returns `kv` with `part` written from position `at` on."""
  update = jax.lax.dynamic_update_slice_in_dim
  return _map_fields(lambda axis, x, new: update(x, new, at, axis=axis), kv, part)


def store(k_NxTxHxK: jax.Array, v_NxTxHxK: jax.Array, dtype: str) -> KeysValues:
  """Lays out keys and values for the cache; int8: scaled by the largest of every position and head."""
  k, v, scales = k_NxTxHxK, v_NxTxHxK, []
  if dtype == "int8":
    (k, k_scale), (v, v_scale) = _to_int8(k), _to_int8(v)
    scales = [k_scale, v_scale]
  k, v = k.astype(dtype), v.astype(dtype)
  if keeps_rows():
    shape = (*k.shape[:2], k.shape[2] * k.shape[3])
    return _pin(KeysValues(k.reshape(shape), v.reshape(shape), *scales))
  scales = [scale.swapaxes(1, 2) for scale in scales]
  return _pin(KeysValues(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), *scales))


def _to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127
  return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, -1)


def prefill(model: ImageGPT, prompt_BxP: jax.Array, dtype: str) -> list[KeysValues]:
  """Returns every layer's keys and values of positions 0..P-1, from one pass over the prompt.

  Position 0 is the start vector's, so the last pixel of the prompt is still to be fed.
  """
  config = model.config
  shape = (*prompt_BxP.shape[:2], config.n_head, config.head_dim)

  def keep(_, x, qkv_3xBxTxE):
    return store(qkv_3xBxTxE[1].reshape(shape), qkv_3xBxTxE[2].reshape(shape), dtype)

  _, stacked = model.hidden(model.embed(prompt_BxP), collect=keep)
  return [_pin(jax.tree.map(lambda x, at=layer: x[at], stacked)) for layer in range(config.n_layer)]


def repeat(caches: list[KeysValues], times: int) -> list[KeysValues]:
  """Returns every layer's keys and values with each image's rows repeated, side by side."""
  return [_pin(jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), kv)) for kv in caches]


def empty_cache(model: ImageGPT, n: int, length: int, dtype: str) -> list[KeysValues]:
  """Returns zeroed keys and values of n samples and `length` positions, for every layer."""
  config = model.config
  like = jax.ShapeDtypeStruct((n, length, config.n_head, config.head_dim), config.dtype)
  abstract = jax.eval_shape(lambda k, v: store(k, v, dtype), like, like)
  empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
  return [_pin(empty) for _ in range(config.n_layer)]
