"""Primitives of a block: the four einsums with their logical axes, the norm, the activation, tables of codes."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from igpt_jax.model.projection import Einsum
from igpt_jax.parallel.sharding import lookup
from igpt_jax.tokens import TokenSpec

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


def inverse_rms(x: jax.Array) -> jax.Array:
  """rsqrt(mean(x²) + 1e-5) over channels, float32 [..., 1]."""
  squares = jnp.square(x.astype(jnp.float32))
  return jax.lax.rsqrt(jnp.mean(squares, axis=-1, keepdims=True) + NORM_EPSILON)


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
  """x · rsqrt(mean(x²) + 1e-5) · gain, computed in float32, returned in x's dtype."""
  return scaled_norm(x, inverse_rms(x), gain)


def norm_gradients(
  x: jax.Array, scale: jax.Array, gain: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Gradients of `scaled_norm` through its scale, float32: of x, and of the gain, yet to be summed over positions.

  Args:
    x: the norm's input; channels last.
    scale: its inverse RMS.
    gain: [D].
    dout: the gradient of the norm's output.
  """
  unit = x.astype(jnp.float32) * scale
  dout = dout.astype(jnp.float32)
  dunit = dout * gain
  return scale * (dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True)), dout * unit


def scaled_norm(x: jax.Array, scale: jax.Array, gain: jax.Array) -> jax.Array:
  """`rms_norm` of x with a precomputed inverse RMS `scale`."""
  return (x.astype(jnp.float32) * scale * gain).astype(x.dtype)


def lookup_codes(
  spec: TokenSpec, table: jax.Array, tokens: jax.Array, out_axes: Sequence[str | None]
) -> jax.Array:
  """Returns the sum of the rows of a position's codes, [B, T, D].

  Args:
    spec: what the tokens are.
    table: [spec.rows, D]: the rows of one code after those of the other.
    tokens: int32 [B, T], or [B, T, codes].
    out_axes: logical axes of the result.
  """
  if spec.codes == 1:
    return lookup(table, tokens, out_axes)
  return sum_of_rows(table, rows_of_codes(spec, tokens), out_axes)


def sum_of_rows(
  table: jax.Array, rows: Sequence[jax.Array], out_axes: Sequence[str | None]
) -> jax.Array:
  """Returns the sum of several rows of a table, [..., D]; arguments are those of `sharding.lookup`."""
  return functools.reduce(operator.add, (lookup(table, row, out_axes) for row in rows))


def rows_of_codes(spec: TokenSpec, tokens: jax.Array) -> list[jax.Array]:
  """Returns each code's row of a table [spec.rows, D], int32 [...] of tokens [..., codes]."""
  return [tokens[..., code] + code * spec.n_vocab for code in range(spec.codes)]
