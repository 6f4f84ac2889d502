"""Options within blocks that the paper's model hasn't; attention's kernels stay as they are.

They change the stream that enters a block, and queries, keys and values before attention:
two-dimensional rotary positions (Su et al. 2021, "RoFormer"; by row and column as in Heo et al. 2024,
"Rotary Position Embedding for Vision Transformer", axial frequencies), and norms of every head's queries
and keys (Henry et al. 2020, "Query-Key Normalization for Transformers"; with a gain as in Dehghani et
al. 2023, "Scaling Vision Transformers to 22 Billion Parameters"), value embeddings, and skips from the
embeddings (`ImageGPTConfig` has their sources). A model without an option computes nothing for it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax.model import layers
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, sharding
from igpt_jax.parallel.sharding import constrain, gather_weight

# The lowest frequency turns by about a radian over 60 pixels, the longest side that the paper trains at.
_BASE = 100.0


class Embedded(NamedTuple):
  """Embeddings of tokens, which blocks read.

  Attributes:
    stream: token plus position embeddings [B, T, D], shifted right by the start vector if causal.
    tokens: int32 [B, T], or [B, T, codes], shifted likewise.
    visible: bool [B, T], True where there is a token, neither a start nor a masked pixel.
  """

  stream: jax.Array
  tokens: jax.Array
  visible: jax.Array


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


def rotation_of(config: ImageGPTConfig, length: int) -> Rotation | None:
  """Returns the rotation of the first `length` positions; None: positions aren't rotations."""
  if config.positions != "rope2d":
    return None
  per_pixel = config.tokens.per_pixel
  whole = rotation_by_pixel(config.n_positions // per_pixel, config.head_dim)
  return Rotation(*(part.repeat(per_pixel, axis=1)[:, :length] for part in whole))


def qk_gains(config: ImageGPTConfig, attn: dict) -> tuple[jax.Array, jax.Array] | None:
  """Gains of queries' and keys' norms, [head_dim] each (stacked: [L, head_dim]); None without."""
  return (attn["q_norm"]["g"], attn["k_norm"]["g"]) if config.qk_norm else None


def enter(config: ImageGPTConfig, block: dict, x: jax.Array, embedded: Embedded) -> jax.Array:
  """Returns what a block computes on, [B, T, D], from the output of the one before.

  Args:
    config: the model's.
    block: the block's parameters.
    x: [B, T, D].
    embedded: the model's embeddings.
  """
  if not config.x0_skip:
    return x
  return x + (block["x0"]["g"] * embedded.stream.astype(jnp.float32)).astype(x.dtype)


def change_qkv(
  config: ImageGPTConfig, attn: dict, qkv_3xBxTxE: jax.Array, embedded: Embedded
) -> jax.Array:
  """Returns queries, keys and values as attention takes them, from those of the matmul; these, if nothing changes.

  Args:
    config: the model's.
    attn: parameters of the block's attention.
    qkv_3xBxTxE: E = n_head * head_dim.
    embedded: the model's embeddings.
  """
  qkv = qkv_3xBxTxE
  if config.value_embeddings:
    table = gather_weight(attn["value_embed"], "vocab", "heads_rows")
    added = layers.lookup_codes(config.tokens, table, embedded.tokens, layers.HEADS)
    added = jnp.where(embedded.visible[..., None], added, 0.0).astype(qkv.dtype)
    qkv = add_to_values(qkv, constrain(added, *layers.HEADS))
  per_head = (*qkv.shape[:-1], config.n_head, config.head_dim)
  if (gains := qk_gains(config, attn)) is not None:
    normed = norm_queries_and_keys(qkv.reshape(per_head), gains)
    qkv = constrain(normed.reshape(qkv.shape), *layers.QKV)
  rotation = rotation_of(config, qkv.shape[2])
  if rotation is None:
    return qkv
  if hardware.platform() == "tpu" and sharding.axis_share("heads", config.n_head):
    by_device = functools.partial(_rotate_by_product, rotation)
    return sharding.per_device(by_device, [layers.QKV], layers.QKV)(qkv)
  return constrain(rotate(qkv.reshape(per_head), rotation).reshape(qkv.shape), *layers.QKV)


def norm_queries_and_keys(
  qkv_3xBxTxHxK: jax.Array, gains: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Returns queries and keys with RMS norms of these gains, [K] each, and values as they are."""
  x = qkv_3xBxTxHxK.astype(jnp.float32)
  # Values are multiplied by ones rather than taken apart: that would copy all three.
  is_value = (jnp.arange(3) == 2).reshape(3, 1, 1, 1, 1)
  scale = jnp.where(is_value, 1.0, layers.inverse_rms(x))
  # (Not `ones_like`, which takes the gain's mesh: another than the one here in a part of a slice's batch.)
  per_channel = jnp.stack([*gains, jnp.ones(gains[0].shape, gains[0].dtype)])
  return (x * scale * per_channel[:, None, None, None]).astype(qkv_3xBxTxHxK.dtype)


def rotate(qkv_3xBxTxHxK: jax.Array, rotation: Rotation) -> jax.Array:
  """Returns queries and keys rotated, and values as they are, of H heads."""
  x = qkv_3xBxTxHxK.astype(jnp.float32)
  cos, sin = (jnp.asarray(part)[:, None, :, None] for part in rotation)
  planes = x.reshape(*x.shape[:-1], 2, 2, x.shape[-1] // 4)  # row or column, partner, frequency
  partners = jnp.flip(planes, axis=-2).reshape(x.shape)
  return (x * cos + partners * sin).astype(qkv_3xBxTxHxK.dtype)


def _rotate_by_product(rotation: Rotation, qkv_3xBxTxE: jax.Array) -> jax.Array:
  """`rotate` for TPUs, of whole heads side by side.

  Channels change places in a product with a permutation: by slices, which aren't whole tiles of 128
  channels, it takes three times as long.
  """
  width, head_dim = qkv_3xBxTxE.shape[-1], rotation.cos.shape[-1]
  n_head, at = width // head_dim, np.arange(width)
  partner = np.where(at // (head_dim // 4) % 2, at - head_dim // 4, at + head_dim // 4)
  swap = jnp.asarray(np.eye(width, dtype=np.float32)[partner], qkv_3xBxTxE.dtype)
  # Products with 0 and 1 are exact; of float32 only so.
  exact = jax.lax.Precision.HIGHEST if swap.dtype == jnp.float32 else None
  partners = jnp.einsum(
    "sbte,ef->sbtf", qkv_3xBxTxE, swap, precision=exact, preferred_element_type=jnp.float32
  )
  cos, sin = (jnp.tile(jnp.asarray(part), (1, 1, n_head))[:, None] for part in rotation)
  rotated = qkv_3xBxTxE.astype(jnp.float32) * cos + partners * sin
  return rotated.astype(qkv_3xBxTxE.dtype)


def add_to_values(qkv_3xA: jax.Array, added_A: jax.Array) -> jax.Array:
  """Returns queries, keys and values, to the last of which something is added; any further axes A."""
  # A sum with zeros fuses, where an update of a part copies.
  return qkv_3xA + jnp.pad(added_A[None], ((2, 0), *[(0, 0)] * added_A.ndim))
