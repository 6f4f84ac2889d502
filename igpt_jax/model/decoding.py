"""Sampling: prefill of the given pixels in one pass, then a cached loop in one compiled program.

The released sampler recomputes the whole picture for every pixel; here each layer keeps its keys
and values, and a new pixel costs one position. `begin` and `extend` are the parts of `complete`, for
whoever shows pictures as they grow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.errors import UserError
from igpt_jax.model.decoding_cache import CACHE, Cache, decode_step, lay_out, prefill
from igpt_jax.model.decoding_draw import SamplingConfig, draw, filter_logits, nats_of
from igpt_jax.model.image_gpt import ImageGPTConfig, Params, bind
from igpt_jax.parallel.sharding import constrain

__all__ = [
  "Progress", "Samples", "SamplingConfig", "begin", "complete", "draw", "extend", "filter_logits",
]  # fmt: skip


class Samples(NamedTuple):
  """What was drawn.

  Attributes:
    tokens: int32 [B, n_positions], the given pixels included.
    nll: float32 [B, n_positions], nats per token under the model itself (temperature 1, no
      truncation); 0 at the given pixels.
  """

  tokens: jax.Array
  nll: jax.Array


class Progress(NamedTuple):
  """Pictures that are drawn up to a position.

  Attributes:
    tokens: int32 [N, n_positions]; 0 where nothing is drawn yet.
    nll: float32 [N, n_positions], as in `Samples`; 0 where nothing is drawn yet.
    position: int32, the next pixel to draw; n_positions when all are.
    keys: a PRNG key per sample, [N].
    caches: of every layer.
  """

  tokens: jax.Array
  nll: jax.Array
  position: jax.Array | int
  keys: jax.Array
  caches: list[Cache]


def begin(
  config: ImageGPTConfig,
  params: Params,
  given_BxP: jax.Array,
  keys: jax.Array,
  *,
  samples_per_picture: int = 1,
  cache_dtype: str = "",
) -> Progress:
  """Reads the given pixels; nothing is drawn yet.

  Args:
    config, params: a causal model.
    given_BxP: the first P pixels of B pictures in raster order; P may be 0 (unconditional).
    keys: PRNG keys, one per sample [B * samples_per_picture]: a sample is the same whatever batch
      it is drawn in.
    samples_per_picture: completions of each picture; they share its part of the caches.
    cache_dtype: of keys and values; "": the compute dtype.

  Returns:
    Progress of N = B * samples_per_picture pictures, a picture's own ones side by side.

  Raises:
    UserError: the model isn't causal.
  """
  if not config.causal:
    raise UserError(
      "this checkpoint is a BERT model: it has no left-to-right distribution to sample"
    )
  batch, n_given = given_BxP.shape
  room = config.n_positions - n_given
  if room < 0:
    raise ValueError(f"{n_given} pixels given to a model of {config.n_positions}")
  dtype = jnp.dtype(cache_dtype or config.dtype)
  given_BxP = given_BxP.astype(jnp.int32)
  n = batch * samples_per_picture
  empty = jnp.zeros((n, config.n_head, room, config.head_dim), dtype)
  if n_given and room:
    of_given = prefill(bind(config, params), given_BxP)
  else:
    nothing = jnp.zeros((batch, config.n_head, 0, config.head_dim), dtype)
    of_given = [(nothing, nothing)] * config.n_layer
  caches = [
    Cache(
      given=tuple(each.astype(dtype) for each in given),
      drawn=(constrain(empty, *CACHE), constrain(empty, *CACHE)),
    )
    for given in of_given
  ]
  tokens = jnp.pad(jnp.repeat(given_BxP, samples_per_picture, axis=0), ((0, 0), (0, room)))
  return Progress(tokens, jnp.zeros(tokens.shape, jnp.float32), n_given, keys, caches)


def extend(
  config: ImageGPTConfig,
  params: Params,
  progress: Progress,
  n_pixels: int,
  *,
  sampling: SamplingConfig,
) -> Progress:
  """Draws the next `n_pixels` pixels of every picture, or as many as are left.

  Args:
    config, params: the model that `progress` was begun with.
    progress: so far.
    n_pixels: known when traced; `progress.position` needn't be, so that one program serves every
      row of a picture.
    sampling: how to draw.
  """
  tables, weights = lay_out(bind(config, params))
  room = progress.caches[0].drawn[0].shape[2]

  def body(position, carry):
    tokens, nll, caches = carry
    last = jax.lax.dynamic_index_in_dim(
      tokens, jnp.maximum(position - 1, 0), axis=1, keepdims=False
    )
    caches, logits = decode_step(tables, weights, caches, last, position, room)
    token = draw(logits, progress.keys, position, sampling)
    nats = nats_of(logits, token)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)
    nll = jax.lax.dynamic_update_slice_in_dim(nll, nats[:, None], position, axis=1)
    return tokens, nll, caches

  end = jnp.minimum(progress.position + n_pixels, config.n_positions)
  tokens, nll, caches = jax.lax.fori_loop(
    progress.position, end, body, (progress.tokens, progress.nll, progress.caches)
  )
  return Progress(tokens, nll, end, progress.keys, caches)


def complete(
  config: ImageGPTConfig,
  params: Params,
  given_BxP: jax.Array,
  keys_B: jax.Array,
  *,
  sampling: SamplingConfig,
  samples_per_picture: int = 1,
  cache_dtype: str = "",
) -> Samples:
  """Draws all the pixels that come after the given ones in raster order.

  Arguments are those of `begin` and `extend`.

  Returns:
    Samples of B * samples_per_picture pictures, a picture's own ones side by side.
  """
  progress = begin(
    config,
    params,
    given_BxP,
    keys_B,
    samples_per_picture=samples_per_picture,
    cache_dtype=cache_dtype,
  )
  n_left = config.n_positions - given_BxP.shape[1]
  if n_left:
    progress = extend(config, params, progress, n_left, sampling=sampling)
  return Samples(progress.tokens, progress.nll)
