"""Primitives of a block: the four einsums with their logical axes, the norm, the activation."""

import jax
import jax.numpy as jnp

from igpt_jax.model.projection import Einsum

STREAM = ("batch", "length", "channels")  # logical axes of the activations between blocks
HEADS = ("batch", "length", "heads")
QKV = ("qkv", *HEADS)
INNER = ("batch", "length", "mlp")

TO_QKV = Einsum("btd,sde->sbte", STREAM, ("qkv", "embed", "heads"), QKV)
FROM_HEADS = Einsum("bte,ed->btd", HEADS, ("heads_rows", "channels"), STREAM)
TO_INNER = Einsum("btd,de->bte", STREAM, ("embed", "mlp"), INNER)
FROM_INNER = Einsum("bte,ed->btd", INNER, ("mlp_rows", "channels"), STREAM)

NORM_EPSILON = 1e-5


def activation(hidden: jax.Array) -> jax.Array:
  """x·sigmoid(1.702x)."""
  return hidden * jax.nn.sigmoid(1.702 * hidden)


def inverse_rms(x: jax.Array, axis: int = -1) -> jax.Array:
  """rsqrt(mean(x²) + 1e-5) over channels, float32 [..., 1]."""
  squares = jnp.square(x.astype(jnp.float32))
  return jax.lax.rsqrt(jnp.mean(squares, axis=axis, keepdims=True) + NORM_EPSILON)


def rms_norm(x: jax.Array, gain: jax.Array, axis: int = -1) -> jax.Array:
  """x · rsqrt(mean(x²) + 1e-5) · gain, computed in float32, returned in x's dtype; channels on `axis`."""
  return scaled_norm(x, inverse_rms(x, axis), gain)


def scaled_norm(x: jax.Array, scale: jax.Array, gain: jax.Array) -> jax.Array:
  """`rms_norm` of x with a precomputed inverse RMS `scale`."""
  return (x.astype(jnp.float32) * scale * gain).astype(x.dtype)
