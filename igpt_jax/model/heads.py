"""Changes to queries, keys and values before attention, whose kernels stay as they are.

Two-dimensional rotary positions (Su et al. 2021, "RoFormer"; by row and column as in Heo et al. 2024,
"Rotary Position Embedding for Vision Transformer", axial frequencies), and norms of every head's queries
and keys (Henry et al. 2020, "Query-Key Normalization for Transformers"; with a gain as in Dehghani et
al. 2023, "Scaling Vision Transformers to 22 Billion Parameters").
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax.model import layers

# The lowest frequency turns by about a radian over 60 pixels, the longest side that the paper trains at.
_BASE = 100.0


class Rotation(NamedTuple):
  """Rotation of every position's queries and keys; of values by nothing.

  Attributes:
    cos, sin: float32 [3, T, head_dim], for queries, keys and values.
  """

  cos: np.ndarray | jax.Array
  sin: np.ndarray | jax.Array

  def at(self, position: jax.Array) -> "Rotation":
    """Returns the rotation of one position, [3, 1, head_dim]; it may be traced."""
    return Rotation(
      *(jax.lax.dynamic_slice_in_dim(jnp.asarray(x), position, 1, axis=1) for x in self)
    )


def rotation_by_pixel(length: int, head_dim: int) -> Rotation:
  """Returns the rotation of the first `length` pixels of square images, in raster order.

  Half of a head's channels turn with the row and half with the column of the pixel that a position
  predicts, head_dim / 4 frequencies each: a score depends on the offset in rows and columns alone.
  A channel's angle is that of the one head_dim / 4 further on, with which it forms a plane.

  Args:
    length: the number of pixels, a square number.
    head_dim: a multiple of 4.
  """
  side = math.isqrt(length)
  frequencies = _BASE ** -(np.arange(head_dim // 4) / (head_dim // 4))
  rows, columns = np.divmod(np.arange(length), side)
  by_row, by_column = (np.outer(place, frequencies) for place in (rows, columns))
  angles = np.concatenate([by_row, by_row, by_column, by_column], axis=1)
  sign = np.repeat([-1.0, 1.0, -1.0, 1.0], head_dim // 4)
  cos, sin = np.cos(angles), np.sin(angles) * sign
  return Rotation(
    np.stack([cos, cos, np.ones_like(cos)]).astype(np.float32),
    np.stack([sin, sin, np.zeros_like(sin)]).astype(np.float32),
  )


def prepare(
  qkv_3xBxTxHxK: jax.Array, gains: tuple[jax.Array, jax.Array] | None, rotation: Rotation | None
) -> jax.Array:
  """Returns queries and keys normed, then rotated, and values as they are; in float32, then cast.

  Args:
    qkv_3xBxTxHxK: queries, keys and values of H heads.
    gains: of the norms of queries and of keys, [K] each; None: no norms.
    rotation: None: no rotation.
  """
  x = qkv_3xBxTxHxK.astype(jnp.float32)
  if gains is not None:
    # Values are multiplied by ones rather than taken apart: that would copy all three.
    is_value = (jnp.arange(3) == 2).reshape(3, 1, 1, 1, 1)
    scale = jnp.where(is_value, 1.0, layers.inverse_rms(x))
    per_channel = jnp.stack([*gains, jnp.ones_like(gains[0])])
    x = x * scale * per_channel[:, None, None, None]
  if rotation is not None:
    cos, sin = (jnp.asarray(part)[:, None, :, None] for part in rotation)
    planes = x.reshape(*x.shape[:-1], 2, 2, x.shape[-1] // 4)  # row or column, partner, frequency
    partners = jnp.flip(planes, axis=-2).reshape(x.shape)
    x = x * cos + partners * sin
  return x.astype(qkv_3xBxTxHxK.dtype)


def add_to_values(qkv_3xA: jax.Array, added_A: jax.Array) -> jax.Array:
  """Returns queries, keys and values, to the last of which something is added; any further axes A."""
  # A sum with zeros fuses, where an update of a part copies.
  return qkv_3xA + jnp.pad(added_A[None], ((2, 0), *[(0, 0)] * added_A.ndim))
