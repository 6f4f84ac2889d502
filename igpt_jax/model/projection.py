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
  out = _einsum(product.formula, x, whole, dtype=product.dtype)
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
  dx = constrain(_einsum(f"{of_out},{of_weight}->{of_x}", dout, whole), *x_axes)
  # Float32, and yet to be summed over devices.
  outer = functools.partial(_einsum, f"{of_x},{of_out}->{of_weight}", dtype="float32")
  dweight = sum_of_batch(outer, (x_axes, out_axes), weight_axes)(x, dout)
  return dx, dweight.astype(weight.dtype)


def _einsum(formula: str, *factors: jax.Array, dtype: str | None = None) -> jax.Array:
  """jnp.einsum, of matrices alone on a CPU.

  There XLA transposes a factor of three axes by a slow copy and reads a matrix either way: so the rows
  are all positions of all images, and stacked weights are multiplied one after the other. Not so on
  several devices: there each product would have its own collectives, of which XLA runs several at a
  time, and its CPU devices, with one thread each, then wait for each other for ever.
  """
  if hardware.platform() != "cpu":
    return jnp.einsum(formula, *factors, preferred_element_type=dtype)
  *of_factors, of_out = formula.replace("->", ",").split(",")
  stack = next((letter for letter in "sc" if letter in formula), None)
  if stack is None or jax.sharding.get_abstract_mesh().size > 1:
    return _flat_einsum(formula, *factors, dtype=dtype)
  axes = [of.find(stack) for of in of_factors]
  n = max(x.shape[axis] for x, axis in zip(factors, axes, strict=True) if axis >= 0)

  def product(at: int, dtype: str | None) -> jax.Array:
    parts = [
      x if axis < 0 else jax.lax.index_in_dim(x, at, axis, keepdims=False)
      for x, axis in zip(factors, axes, strict=True)
    ]
    return _flat_einsum(formula.replace(stack, ""), *parts, dtype=dtype)

  if stack in of_out:
    return jnp.stack([product(at, dtype) for at in range(n)], of_out.index(stack))
  summed = functools.reduce(jnp.add, (product(at, "float32") for at in range(n)))
  return summed.astype(dtype or factors[0].dtype)


def _flat_einsum(formula: str, *factors: jax.Array, dtype: str | None) -> jax.Array:
  """jnp.einsum whose images and positions, "bt", are one axis."""
  *of_factors, of_out = formula.replace("->", ",").split(",")
  terms = list(zip(of_factors, factors, strict=True))
  size = {letter: n for of, x in terms for letter, n in zip(of, x.shape, strict=True)}
  rows = size["b"] * size["t"]
  flat = [
    x.reshape([rows if letter == "b" else size[letter] for letter in of if letter != "t"])
    for of, x in terms
  ]
  out = jnp.einsum(formula.replace("bt", "n"), *flat, preferred_element_type=dtype)
  return out.reshape([size[letter] for letter in of_out])


def _backward(product, residuals, dout):
  x, weight = residuals
  return sharded_einsum_gradients(product, x, weight, dout)


_sharded_einsum.defvjp(_forward, _backward)
