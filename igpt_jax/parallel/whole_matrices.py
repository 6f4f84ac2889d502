"""Matrices that are split over devices, each made whole on one of them for a while."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from igpt_jax.parallel.sharding import MESH_AXES, mesh_axes, per_device, slice_size

# The TPU's compiler exchanges along the first axis; for another it would copy more, in float32.


def _gather_side(parts: jax.Array, side: int, names: tuple[str, ...]) -> jax.Array:
  """Gathers the axis `side` of matrices [n, rows, columns] over mesh axes, and keeps a share of them."""
  devices = jax.lax.axis_size(names)
  parts = jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=0, tiled=True)
  parts = jnp.moveaxis(parts.reshape(devices, -1, *parts.shape[1:]), 0, side)
  return parts.reshape(*parts.shape[:side], -1, *parts.shape[side + 2 :])


def _scatter_side(parts: jax.Array, side: int, names: tuple[str, ...]) -> jax.Array:
  """Undoes `_gather_side`."""
  devices = jax.lax.axis_size(names)
  parts = parts.reshape(*parts.shape[:side], devices, -1, *parts.shape[side + 1 :])
  parts = jnp.moveaxis(parts, side, 0)
  parts = parts.reshape(-1, *parts.shape[2:])
  return jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=0, tiled=True)


def on_whole_matrices(function: Callable, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Returns `function` of matrices that are split over devices; each is made whole on one of them.

  All devices of a slice share the work, those too that hold the same numbers; every slice does all of
  it, so that nothing crosses the network. Left to itself the partitioner computes every matrix in parts,
  with a sum over devices after each product. The matrices change places by all-to-all, and by an
  all-gather to the copies in the end; if they don't divide among the devices, there are zeros among them.

  Args:
    function: maps [n, rows, columns] to as many, each by itself; zeros to anything finite.
    x: matrices [..., rows, columns], split along the last two axes alone.
    axes: logical axes of `x`, and of the result.
  """

  def stacked(part: jax.Array) -> jax.Array:
    return part.reshape(-1, *part.shape[-2:])

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(stacked(x)).reshape(x.shape)
  sides = [mesh_axes(mesh, axis) for axis in axes[-2:]]
  moves = [(at, side) for at, side in enumerate(sides, start=1) if side]
  copies = tuple(
    name for name in MESH_AXES if mesh.shape[name] > 1 and name not in sides[0] + sides[1]
  )
  n, devices = math.prod(x.shape[:-2]), slice_size(mesh)
  padded = -(-n // devices) * devices
  share = padded // math.prod(mesh.shape[name] for name in copies)

  def on_device(part):
    parts = jnp.pad(stacked(part), ((0, padded - n), (0, 0), (0, 0)))
    if copies:
      first = jax.lax.axis_index(copies) * share
      parts = jax.lax.dynamic_slice_in_dim(parts, first, share)
    for side, names in moves:
      parts = _gather_side(parts, side, names)
    parts = function(parts)
    for side, names in reversed(moves):
      parts = _scatter_side(parts, side, names)
    if copies:
      parts = jax.lax.all_gather(parts, copies, tiled=True)
    return parts[:n].reshape(part.shape)

  return per_device(on_device, [axes], axes)(x)
