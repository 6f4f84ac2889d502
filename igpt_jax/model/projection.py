"""Einsums of activations with a weight that is sharded over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from igpt_jax.parallel import hardware
from igpt_jax.parallel.sharding import constrain, gather_weight, sum_of_batch

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Einsum:
  """Einsum of activations and a weight.

  Attributes:
    formula: such as "btd,de->bte".
    x_axes, weight_axes, out_axes: logical axes (`parallel.sharding.RULES`).
    dtype: the result's; None: that of the activations.
  """

  formula: str
  x_axes: Axes
  weight_axes: Axes
  out_axes: Axes
  dtype: str | None = None


def sharded_einsum(product: Einsum, x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns the einsum, its factors in the activations' dtype and summed in float32.

  Forward and backward both gather the weight's parts, so the gathered weight is never kept; its
  gradient is summed and scattered in one operation.
  """
  return _sharded_einsum(product, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sharded_einsum(product, x, weight):
  whole = gather_weight(weight.astype(x.dtype), *product.weight_axes)
  out = jnp.einsum(product.formula, x, whole, preferred_element_type=product.dtype)
  return constrain(out, *product.out_axes)


def _forward(product, x, weight):
  return _sharded_einsum(product, x, weight), (x, weight)


def sharded_einsum_gradients(
  product: Einsum, x: jax.Array, weight: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of x and the weight, from the result's gradient `dout`."""
  dout = dout.astype(x.dtype)
  x_axes, weight_axes, out_axes = product.x_axes, product.weight_axes, product.out_axes
  of_x, of_weight, of_out = product.formula.replace("->", ",").split(",")
  whole = gather_weight(weight.astype(x.dtype), *weight_axes)
  dx = constrain(jnp.einsum(f"{of_out},{of_weight}->{of_x}", dout, whole), *x_axes)
  outer = functools.partial(_outer, of_x, of_out, of_weight)
  dweight = sum_of_batch(outer, (x_axes, out_axes), weight_axes)(x, dout)
  return dx, dweight.astype(weight.dtype)


def _outer(of_x: str, of_out: str, of_weight: str, x: jax.Array, dout: jax.Array) -> jax.Array:
  """Σ x dout over images and positions, float32; yet to be summed over devices.

  XLA on a CPU transposes the first factor by a slow copy. Where x is the larger one, the factors are
  swapped and the result is transposed instead (the barrier keeps XLA from undoing that).
  """
  if hardware.platform() != "cpu" or x.size <= dout.size:
    return jnp.einsum(f"{of_x},{of_out}->{of_weight}", x, dout, preferred_element_type="float32")
  formula = f"{of_out},{of_x}->{of_weight[::-1]}"
  transposed = jnp.einsum(formula, dout, x, preferred_element_type="float32")
  return jax.lax.optimization_barrier(transposed).T


def _backward(product, residuals, dout):
  x, weight = residuals
  return sharded_einsum_gradients(product, x, weight, dout)


_sharded_einsum.defvjp(_forward, _backward)
