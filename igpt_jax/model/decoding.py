"""Sampling: prefill of the given pixels in one pass, then a cached loop in one compiled program.

The released sampler recomputes the whole picture for every pixel; here each layer keeps its keys
and values, [2, B, T, E], and a new pixel costs one position. The layers are taken apart before the
loop, so that each reads its own weights and updates its own cache in place.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import Block, ImageGPT, ImageGPTConfig, Params, bind
from igpt_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next pixel is drawn. The paper samples at temperature 1 with no tricks.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest colour.
    top_k: keep the k likeliest colours; 0 keeps all.
    top_p: keep the fewest likeliest colours whose probabilities reach p; 1 keeps all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise UserError(f"temperature: {self.temperature}; expected 0 (greedy) or more")
    if self.top_k < 0:
      raise UserError(f"top_k: {self.top_k}; expected 0 (all colours) or more")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p: {self.top_p}; expected a number in (0, 1]")


class Samples(NamedTuple):
  """What was drawn.

  Attributes:
    tokens: int32 [B, n_positions], the given pixels included.
    nll: float32 [B, n_positions], nats per token under the model itself (temperature 1, no
      truncation); 0 at the given pixels.
  """

  tokens: jax.Array
  nll: jax.Array


def filter_logits(logits_BxV: jax.Array, sampling: SamplingConfig) -> jax.Array:
  """Logits after temperature, then top-k, then top-p; what is cut is -inf. Temperature > 0.

  Equally likely colours at the edge of top-k are all kept.
  """
  logits = logits_BxV / sampling.temperature
  if 0 < sampling.top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The likeliest colour always stays: nothing comes before it.
    least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def draw(
  logits_BxV: jax.Array, keys_B: jax.Array, position: jax.Array, sampling: SamplingConfig
) -> jax.Array:
  """One token per row, int32 [B]; row i's draw depends on keys_B[i] and the position alone."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)

  def one(key, logits):
    return jax.random.categorical(jax.random.fold_in(key, position), logits)

  return jax.vmap(one)(keys_B, filter_logits(logits_BxV, sampling)).astype(jnp.int32)


def _layers(model: ImageGPT) -> list[Block]:
  """The stacked blocks, taken apart."""
  return [
    jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)
    for layer in range(model.config.n_layer)
  ]


def _cached_attention(q_BxE: jax.Array, cache_2xBxTxE: jax.Array, position: jax.Array, n_head: int):
  """Attention of one query per row over positions 0..position of the cache, [B, E]."""
  _, batch, length, width = cache_2xBxTxE.shape
  head_dim = width // n_head
  q = q_BxE.reshape(batch, n_head, head_dim)
  k, v = cache_2xBxTxE.reshape(2, batch, length, n_head, head_dim)
  scores = jnp.einsum("bhk,bthk->bht", q, k, preferred_element_type=jnp.float32)
  scores = scores / jnp.sqrt(jnp.float32(head_dim))
  scores = jnp.where(jnp.arange(length) <= position, scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bht,bthk->bhk", weights, v).reshape(batch, width)


def prefill(model: ImageGPT, given_BxP: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """One pass over the start vector and the P < n_positions given pixels.

  Returns:
    A cache per layer, [2, B, n_positions, E] in the compute dtype, filled at positions 0..P, and
    the logits of pixel P, [B, n_vocab].
  """
  config = model.config
  batch, n_given = given_BxP.shape
  # `embed` shifts right, dropping the last token: this one is never seen.
  shifted = jnp.concatenate([given_BxP, jnp.zeros((batch, 1), given_BxP.dtype)], axis=1)
  final, kv_Lx2xBxPxE = model.hidden(model.embed(shifted), collect=lambda block, x, qkv: qkv[1:])
  room = config.n_positions - (n_given + 1)
  caches = jnp.pad(kv_Lx2xBxPxE, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))
  per_layer = tuple(
    constrain(caches[layer], None, "batch", "length", "heads") for layer in range(config.n_layer)
  )
  return per_layer, model.logits(final[:, -1:])[:, 0]


def decode_step(
  model: ImageGPT,
  layers: list[Block],
  caches: tuple[jax.Array, ...],
  token_B: jax.Array,
  position: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Feeds the pixel before `position` and returns the logits of the pixel there, [B, n_vocab]."""
  dtype = jnp.dtype(model.config.dtype)
  x_Bx1xD = (model.wte[...].astype(dtype)[token_B] + model.wpe[...].astype(dtype)[position])[
    :, None
  ]
  updated = []
  for block, cache in zip(layers, caches, strict=True):
    qkv_3xBx1xE = block.attn.project_qkv(block.ln_1(x_Bx1xD))
    cache = jax.lax.dynamic_update_slice_in_dim(
      cache, qkv_3xBx1xE[1:].astype(cache.dtype), position, axis=2
    )
    heads_BxE = _cached_attention(qkv_3xBx1xE[0, :, 0], cache, position, model.config.n_head)
    x_Bx1xD = block.finish(x_Bx1xD, heads_BxE[:, None])
    updated.append(cache)
  return tuple(updated), model.logits(model.ln_f(x_Bx1xD))[:, 0]


def complete(
  config: ImageGPTConfig,
  params: Params,
  given_BxP: jax.Array,
  keys_B: jax.Array,
  *,
  sampling: SamplingConfig,
  samples_per_picture: int = 1,
) -> Samples:
  """Draws the pixels that come after the given ones in raster order.

  Args:
    config, params: a causal model.
    given_BxP: the first P pixels of B pictures; P may be 0 (unconditional).
    keys_B: PRNG keys, one per sample [B * samples_per_picture]: a sample is the same whatever
      batch it is drawn in.
    sampling: how to draw.
    samples_per_picture: completions of each picture; they share its prefill.

  Returns:
    Samples of B * samples_per_picture pictures, a picture's own ones side by side.
  """
  if not config.causal:
    raise UserError(
      "this checkpoint is a BERT model: it has no left-to-right distribution to sample"
    )
  model = bind(config, params)
  batch = given_BxP.shape[0] * samples_per_picture
  n_given, n_positions = given_BxP.shape[1], config.n_positions
  if n_given > n_positions:
    raise ValueError(f"{n_given} pixels given to a model of {n_positions}")
  given = jnp.repeat(given_BxP.astype(jnp.int32), samples_per_picture, axis=0)
  tokens = jnp.pad(given, ((0, 0), (0, n_positions - n_given)))
  nll = jnp.zeros((batch, n_positions), jnp.float32)
  if n_given == n_positions:
    return Samples(tokens, nll)

  caches, logits = prefill(model, given_BxP.astype(jnp.int32))
  caches = tuple(jnp.repeat(cache, samples_per_picture, axis=1) for cache in caches)
  logits = jnp.repeat(logits, samples_per_picture, axis=0)
  layers = _layers(model)

  def place(tokens, nll, logits, position):
    token = draw(logits, keys_B, position, sampling)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)
    nll = jax.lax.dynamic_update_slice_in_dim(nll, nats[:, None], position, axis=1)
    return tokens, nll, token

  def body(position, carry):
    tokens, nll, caches, logits = carry
    tokens, nll, token = place(tokens, nll, logits, position)
    caches, logits = decode_step(model, layers, caches, token, position + 1)
    return tokens, nll, caches, logits

  # The last pixel is drawn outside: nothing needs to be computed from it.
  tokens, nll, _, logits = jax.lax.fori_loop(
    n_given, n_positions - 1, body, (tokens, nll, caches, logits)
  )
  tokens, nll, _ = place(tokens, nll, logits, n_positions - 1)
  return Samples(tokens, nll)
