"""Decoding of one position: the weights laid out for it, and one pass through the model's layers."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from igpt_jax.model import codes, layers, options
from igpt_jax.model.decoding.attend import attend
from igpt_jax.model.decoding.cache import KeysValues, keeps_rows, put, store
from igpt_jax.model.image_gpt import ImageGPT
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel.sharding import constrain, gather_weight

_STREAM = ("batch", "channels")  # of one position


class Weights(NamedTuple):
  """Weights of one layer, in the compute dtype, gathered over the batch's devices; matrices [in, out]."""

  gain_1: jax.Array
  qkv: jax.Array  # [D, 3, E]
  attn_proj: jax.Array
  gain_2: jax.Array
  fc: jax.Array
  mlp_proj: jax.Array
  qk_gains: tuple[jax.Array, jax.Array] | None
  value_embed: jax.Array | None
  x0_gain: jax.Array | None


class HeadWeights(NamedTuple):
  """Weights of the heads of a position's codes: matrices [in, out] for each code."""

  hidden: list[jax.Array]
  seen: jax.Array


class Tables(NamedTuple):
  """Weights before and after the layers, likewise; None where the model has none.

  Tables of which several rows are summed up, those of a position's codes, are float32.
  """

  wte: jax.Array
  wpe: jax.Array | None
  rotation: options.Rotation | None
  sos: jax.Array
  gain: jax.Array
  wtet: jax.Array
  heads: HeadWeights | None


def lay_out(model: ImageGPT) -> tuple[Tables, list[Weights]]:
  """Casts, gathers and unstacks the weights: once, before a loop over positions."""
  dtype = jnp.dtype(model.config.dtype)
  # Of a position with several codes as many rows are summed up, and rounded after that.
  of_codes = dtype if model.config.tokens.codes == 1 else jnp.dtype("float32")

  def whole(parameter, axes, layer: Any = ..., dtype=dtype):
    return gather_weight(parameter[...][layer].astype(dtype), *axes)

  def matrix(parameter, product, layer: Any = ...):
    return whole(parameter, product.weight_axes, layer)

  blocks, config = model.blocks, model.config
  gains = options.qk_gains(config, nnx.to_pure_dict(nnx.state(blocks.attn, nnx.Param)))
  positions = model.position_table()
  per_layer = [
    Weights(
      gain_1=blocks.ln_1.g[...][layer],
      qkv=matrix(blocks.attn.qkv, layers.TO_QKV, layer).swapaxes(0, 1),
      attn_proj=matrix(blocks.attn.proj, layers.FROM_HEADS, layer),
      gain_2=blocks.ln_2.g[...][layer],
      fc=matrix(blocks.mlp.fc, layers.TO_INNER, layer),
      mlp_proj=matrix(blocks.mlp.proj, layers.FROM_INNER, layer),
      qk_gains=None if gains is None else (gains[0][layer], gains[1][layer]),
      value_embed=whole(blocks.attn.value_embed, ("vocab", "heads_rows"), layer, of_codes)
      if config.value_embeddings
      else None,
      x0_gain=blocks.x0.g[...][layer] if config.x0_skip else None,
    )
    for layer in range(config.n_layer)
  ]
  heads = None
  if config.tokens.codes > 1:
    hidden = matrix(model.heads.hidden, codes.TO_HIDDEN)
    heads = HeadWeights(list(hidden), whole(model.heads.seen, ("vocab", "embed"), dtype=of_codes))
  tables = Tables(
    wte=whole(model.wte, ("vocab", "embed"), dtype=of_codes),
    wpe=None if positions is None else positions.astype(dtype),
    rotation=options.rotation_of(config, config.n_positions),
    sos=model.sos[...].astype(dtype),
    gain=model.ln_f.g[...],
    wtet=whole(model.wtet, ("vocab", "embed")),
    heads=heads,
  )
  if keeps_rows():
    return tables, per_layer
  # Without the barrier XLA on a CPU omits the cast and reads float32 at every position.
  return jax.lax.optimization_barrier((tables, per_layer))


def decode_step(
  tables: Tables,
  weights: list[Weights],
  before: list[tuple[KeysValues, KeysValues]],
  blocks: list[KeysValues],
  token_N: jax.Array,
  position: jax.Array,
  config: ImageGPTConfig,
) -> tuple[list[KeysValues], jax.Array]:
  """Feeds the token before `position`; returns the blocks with it, and the final norm's output [N, D].

  Args:
    tables, weights: from `lay_out`.
    before: every layer's prompt, and positions drawn before the block.
    blocks: every layer's positions after those, filled before `position`, which is one of them.
    token_N: the tokens before `position`, [N] or [N, codes]; at position 0 the start vector replaces them.
    position: that of the token to predict, beyond the prompt.
    config: the model's.
  """
  embedded = _rows_of(config, tables.wte, token_N).astype(config.dtype)
  embedded = jnp.where(position == 0, tables.sos, embedded)
  if tables.wpe is not None:
    embedded = embedded + tables.wpe[position]
  stream = x0 = constrain(embedded, *_STREAM)
  n = len(token_N)
  rotation = None if tables.rotation is None else tables.rotation.at(position)
  updated = []
  for layer, (prompt, done), block in zip(weights, before, blocks, strict=True):
    if layer.x0_gain is not None:
      stream = stream + (layer.x0_gain * x0.astype(jnp.float32)).astype(stream.dtype)
    qkv = _qkv(layers.rms_norm(stream, layer.gain_1), layer.qkv)
    qkv = qkv.reshape(n, 3, config.n_head, -1).swapaxes(0, 1)
    if layer.value_embed is not None:
      added = _rows_of(config, layer.value_embed, token_N).astype(qkv.dtype)
      added = jnp.where(position == 0, 0, added)
      qkv = options.add_to_values(qkv, added.reshape(qkv.shape[1:]))
    if layer.qk_gains is not None:
      qkv = options.norm_queries_and_keys(qkv[:, :, None], layer.qk_gains)[:, :, 0]
    if rotation is not None:
      qkv = options.rotate(qkv[:, :, None], rotation)[:, :, 0]
    q, k, v = qkv
    at = position - prompt.length - done.length
    block = put(block, store(k[:, None], v[:, None], block.k.dtype.name), at)
    heads_NxHxK = attend(q, prompt, done, block, at).astype(stream.dtype)
    stream = _dot(heads_NxHxK.reshape(n, -1), layer.attn_proj) + stream
    hidden = layers.activation(_dot(layers.rms_norm(stream, layer.gain_2), layer.fc))
    stream = constrain(_dot(hidden, layer.mlp_proj) + stream, *_STREAM)
    updated.append(block)
  return updated, layers.rms_norm(stream, tables.gain)


def code_logits(
  tables: Tables, config: ImageGPTConfig, final: jax.Array, earlier: Sequence[jax.Array]
) -> jax.Array:
  """Returns the logits of a position's next code, float32 [N, n_vocab].

  Args:
    tables: from `lay_out`.
    config: the model's.
    final: of `decode_step`.
    earlier: the position's codes before it, int32 [N] each.
  """
  wtet = tables.wtet
  if tables.heads is not None:
    spec, code = config.tokens, len(earlier)
    made = _dot(final, tables.heads.hidden[code])
    if earlier:
      seen = _sum(tables.heads.seen, codes.rows_of_earlier(spec, earlier)).astype(made.dtype)
      made = seen + made
    final = layers.activation(made)
    wtet = wtet[code * spec.n_vocab : (code + 1) * spec.n_vocab]
  return _dot(final, wtet.T, jnp.float32)


def _rows_of(config: ImageGPTConfig, table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns the sums of the rows of tokens' codes, [N, D] of tokens [N] or [N, codes]."""
  if config.tokens.codes == 1:
    return table[tokens]
  return _sum(table, layers.rows_of_codes(config.tokens, tokens))


def _sum(table: jax.Array, rows: Sequence[jax.Array]) -> jax.Array:
  return functools.reduce(operator.add, (table[row] for row in rows))


def _qkv(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Queries, keys and values, [N, 3, E]."""
  if keeps_rows():
    return jnp.einsum("nd,dse->nse", x, weight)
  return _dot(x, weight.reshape(len(weight), -1))


def _dot(x: jax.Array, weight: jax.Array, dtype=None) -> jax.Array:
  if keeps_rows():
    return jnp.matmul(x, weight, preferred_element_type=dtype)
  # XLA on a CPU has products of bfloat16 with float32 sums, and casts all others to float32.
  return jnp.matmul(x, weight, preferred_element_type=jnp.float32).astype(dtype or x.dtype)
