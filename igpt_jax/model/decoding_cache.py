"""One position at a time: weights laid out for it, caches of keys and values, attention over them.

A cache has two parts: that of the given pixels, once per picture however many samples continue it,
and that of the drawn ones, once per sample.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.model import layers
from igpt_jax.model.image_gpt import ImageGPT
from igpt_jax.parallel.sharding import constrain, gather_weight

CACHE = ("batch", "heads", None, None)


class Cache(NamedTuple):
  """Keys and values of one layer.

  Attributes:
    given: [B, n_head, P, head_dim] each, of B pictures.
    drawn: [B * samples_per_picture, n_head, T - P, head_dim] each; filled from the left.
  """

  given: tuple[jax.Array, jax.Array]
  drawn: tuple[jax.Array, jax.Array]


class Weights(NamedTuple):
  """Of one layer, in the compute dtype, whole over the batch's devices."""

  gain_1: jax.Array
  qkv: jax.Array  # [D, 3, E]
  attn_proj: jax.Array
  gain_2: jax.Array
  fc: jax.Array
  mlp_proj: jax.Array


class Tables(NamedTuple):
  """What comes before and after the layers, likewise."""

  wte: jax.Array
  wpe: jax.Array
  sos: jax.Array
  gain: jax.Array
  wtet: jax.Array


def lay_out(model: ImageGPT) -> tuple[Tables, list[Weights]]:
  """Casts, gathers and takes apart the weights: once, before a loop over positions."""
  dtype = jnp.dtype(model.config.dtype)

  def whole(parameter, layer, axes):
    return gather_weight(parameter[...][layer].astype(dtype), *axes)

  blocks = model.blocks
  per_layer = [
    Weights(
      gain_1=blocks.ln_1.g[...][layer],
      qkv=whole(blocks.attn.qkv, layer, layers.TO_QKV.weight_axes).swapaxes(0, 1),
      attn_proj=whole(blocks.attn.proj, layer, layers.FROM_HEADS.weight_axes),
      gain_2=blocks.ln_2.g[...][layer],
      fc=whole(blocks.mlp.fc, layer, layers.TO_INNER.weight_axes),
      mlp_proj=whole(blocks.mlp.proj, layer, layers.FROM_INNER.weight_axes),
    )
    for layer in range(model.config.n_layer)
  ]
  tables = Tables(
    wte=gather_weight(model.wte[...].astype(dtype), "vocab", "embed"),
    wpe=gather_weight(model.wpe[...].astype(dtype), "position", "embed"),
    sos=model.sos[...].astype(dtype),
    gain=model.ln_f.g[...],
    wtet=gather_weight(model.wtet[...].astype(dtype), "vocab", "embed"),
  )
  return tables, per_layer


def prefill(model: ImageGPT, given_BxP: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
  """Keys and values of positions 0..P-1, of every layer, in one pass over the given pixels.

  Position 0 is the start vector's, so that the last given pixel is still to be fed.
  """
  config = model.config
  batch, n_given = given_BxP.shape

  def split(_, x, qkv_3xBxTxE):
    heads = qkv_3xBxTxE[1:].reshape(2, batch, n_given, config.n_head, config.head_dim)
    return constrain(heads.swapaxes(2, 3), None, *CACHE)

  _, kv_Lx2xBxHxPxK = model.hidden(model.embed(given_BxP), collect=split)
  return [(kv_Lx2xBxHxPxK[layer, 0], kv_Lx2xBxHxPxK[layer, 1]) for layer in range(config.n_layer)]


def attend(q_NxHxK: jax.Array, cache: Cache, n_drawn: jax.Array, read: int) -> jax.Array:
  """Attention of one query per sample over the given positions and the first drawn ones, [N, H, K].

  Args:
    q_NxHxK: queries.
    cache: of this layer.
    n_drawn: how many drawn positions are filled.
    read: at least `n_drawn`: how much of the cache is looked at.
  """
  n, n_head, head_dim = q_NxHxK.shape
  (given_k, given_v), (k, v) = cache
  k, v = k[:, :, :read], v[:, :, :read]
  q_NxHxK = q_NxHxK * jnp.asarray(head_dim**-0.5, q_NxHxK.dtype)
  # A picture's samples side by side: its given positions are read once for all of them.
  q_BxSxHxK = q_NxHxK.reshape(given_k.shape[0], -1, n_head, head_dim)
  of_given = jnp.einsum("bshk,bhtk->bsht", q_BxSxHxK, given_k, preferred_element_type=jnp.float32)
  of_given = of_given.reshape(n, n_head, -1)
  of_drawn = jnp.einsum("nhk,nhtk->nht", q_NxHxK, k, preferred_element_type=jnp.float32)
  of_drawn = jnp.where(jnp.arange(read) < n_drawn, of_drawn, -jnp.inf)
  scores = jnp.concatenate([of_given, of_drawn], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  from_given, from_drawn = jnp.split(weights, [of_given.shape[-1]], axis=-1)
  from_given = from_given.reshape(*q_BxSxHxK.shape[:3], -1)
  out = jnp.einsum("nht,nhtk->nhk", from_drawn, v)
  return out + jnp.einsum("bsht,bhtk->bshk", from_given, given_v).reshape(out.shape)


def decode_step(
  tables: Tables,
  weights: list[Weights],
  caches: list[Cache],
  token_N: jax.Array,
  position: jax.Array,
  read: int,
) -> tuple[list[Cache], jax.Array]:
  """Feeds the pixel before `position`, and returns the logits of the pixel there, [N, n_vocab].

  Args:
    tables, weights: as laid out.
    caches: of every layer, filled before `position`.
    token_N: the pixels before `position`; at position 0 the start vector stands for them.
    position: of the pixel to predict; not a given one.
    read: how many drawn positions of the caches are looked at; this one's included.
  """
  embedded = jnp.where(position == 0, tables.sos, tables.wte[token_N])
  x_NxD = constrain(embedded + tables.wpe[position], "batch", "channels")
  updated = []
  for block, cache in zip(weights, caches, strict=True):
    n, n_head, _, head_dim = cache.drawn[0].shape
    at = position - cache.given[0].shape[2]
    qkv = jnp.einsum("nd,dse->nse", layers.rms_norm(x_NxD, block.gain_1), block.qkv)
    q, k, v = qkv.reshape(n, 3, n_head, head_dim).swapaxes(0, 1)
    drawn = tuple(
      jax.lax.dynamic_update_slice_in_dim(whole, new[:, :, None].astype(whole.dtype), at, axis=2)
      for whole, new in zip(cache.drawn, (k, v), strict=True)
    )
    cache = Cache(cache.given, drawn)
    heads = attend(q, cache, at + 1, read).reshape(n, -1)
    x_NxD = x_NxD + heads @ block.attn_proj
    hidden = layers.rms_norm(x_NxD, block.gain_2) @ block.fc
    x_NxD = x_NxD + layers.activation(hidden) @ block.mlp_proj
    x_NxD = constrain(x_NxD, "batch", "channels")
    updated.append(cache)
  final = layers.rms_norm(x_NxD, tables.gain)
  return updated, jnp.einsum("nd,vd->nv", final, tables.wtet, preferred_element_type=jnp.float32)
