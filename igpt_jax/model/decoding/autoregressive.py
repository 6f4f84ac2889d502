"""Sampling: one pass over the prompt (prefill), then a cached loop in one compiled program.

The released sampler recomputes the whole image for every pixel; here each layer keeps its keys
and values, and a new pixel costs one position. `begin` and `extend` are the parts of `complete`, for
callers that show images as they grow.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.errors import UserError
from igpt_jax.model.decoding import cache as cache_lib
from igpt_jax.model.decoding.cache import Cache, put, take
from igpt_jax.model.decoding.decode_step import code_logits, decode_step, lay_out
from igpt_jax.model.decoding.draw import (
  Samples,
  SamplingConfig,
  SamplingValues,
  draw,
  draw_codes,
  filter_logits,
)
from igpt_jax.model.decoding.masked import fill
from igpt_jax.model.image_gpt import Params, bind
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware
from igpt_jax.tokens import over_codes

__all__ = [
  "Progress", "Samples", "SamplingConfig", "SamplingValues", "begin", "complete", "draw", "extend", "fill",
  "filter_logits",
]  # fmt: skip


# Positions that a loop fills. Shorter blocks read less of what isn't filled yet, but more blocks take longer
# to compile.
_BLOCK = 128
_MAX_BLOCKS = {"cpu": 8}
_MAX_BLOCKS_ELSEWHERE = 2


class Progress(NamedTuple):
  """Images that are drawn up to a position.

  Attributes:
    tokens: int32 [N, n_positions], or [N, n_positions, codes]; 0 where nothing is drawn yet.
    nll: float32 [N, n_positions], as in `Samples`; 0 where nothing is drawn yet.
    position: int32, the next one to draw; n_positions when all are drawn.
    keys: a PRNG key per sample, [N].
    caches: one per layer.
  """

  tokens: jax.Array
  nll: jax.Array
  position: jax.Array | int
  keys: jax.Array
  caches: list[Cache]


def begin(
  config: ImageGPTConfig,
  params: Params,
  prompt_BxP: jax.Array,
  keys: jax.Array,
  *,
  n_given: jax.Array | None = None,
  samples_per_image: int = 1,
  cache_dtype: str = "",
) -> Progress:
  """Reads the prompt and draws nothing yet.

  Args:
    config, params: a causal model.
    prompt_BxP: the first P tokens of B images in raster order; P may be 0 (unconditional). With
      `n_given`, whole images.
    n_given: the number of tokens that are given, traced: one program serves any number of them, but
      its samples share no cache.
    keys: PRNG keys, one per sample [B * samples_per_image]: a sample doesn't depend on the batch that
      it is drawn in.
    samples_per_image: completions of every image; they share its part of the caches.
    cache_dtype: dtype of the cache, "float32", "bfloat16" or "int8" (scaled by the largest number of
      each position and head); "": the compute dtype.

  Returns:
    Progress of N = B * samples_per_image images, those of one prompt side by side.

  Raises:
    UserError: the model isn't causal, or the cache's dtype isn't supported.
  """
  if not config.causal:
    raise UserError(
      "checkpoint: a BERT model has no left-to-right distribution to sample; expected an "
      "autoregressive one"
    )
  dtypes = cache_lib.CACHE_DTYPES
  if cache_dtype and cache_dtype not in dtypes:
    raise UserError(f"cache_dtype: {cache_dtype!r}; expected one of {', '.join(dtypes)}")
  n_images, n_prompt = prompt_BxP.shape[:2]
  n_left = config.n_positions - n_prompt
  if n_left < 0 or (n_given is not None and n_left):
    raise ValueError(f"{n_prompt} tokens given to a model of {config.n_positions}")
  dtype = cache_dtype or config.dtype
  model = bind(config, params)
  prompt_BxP = prompt_BxP.astype(jnp.int32)
  if n_given is None:
    prompt = cache_lib.empty_cache(model, n_images, 0, dtype)
    if n_prompt and n_left:
      prompt = cache_lib.prefill(model, prompt_BxP, dtype)
    drawn = cache_lib.empty_cache(model, n_images * samples_per_image, n_left, dtype)
  else:
    # Positions from n_given on are overwritten before they are read.
    given_1xP = jnp.arange(n_prompt)[None] < n_given
    prompt_BxP = jnp.where(over_codes(given_1xP, prompt_BxP), prompt_BxP, 0)
    prompt = cache_lib.empty_cache(model, n_images, 0, dtype)
    drawn = cache_lib.repeat(cache_lib.prefill(model, prompt_BxP, dtype), samples_per_image)
  of_codes = ((0, 0),) * (prompt_BxP.ndim - 2)
  tokens = jnp.repeat(prompt_BxP, samples_per_image, axis=0)
  tokens = jnp.pad(tokens, ((0, 0), (0, n_left), *of_codes))
  return Progress(
    tokens,
    nll=jnp.zeros(tokens.shape[:2], jnp.float32),
    position=n_prompt if n_given is None else n_given,
    keys=keys,
    caches=[Cache(*parts) for parts in zip(prompt, drawn, strict=True)],
  )


def extend(
  config: ImageGPTConfig,
  params: Params,
  progress: Progress,
  n_tokens: int,
  *,
  sampling: SamplingConfig | SamplingValues,
) -> Progress:
  """Draws the next `n_tokens` tokens of every image, or as many as are left.

  Args:
    config, params: the model that `progress` was begun with.
    progress: the images so far.
    n_tokens: static; `progress.position` may be traced, so that one program serves every row of an
      image.
    sampling: temperature and truncation.
  """
  tables, weights = lay_out(bind(config, params))
  n_left = progress.caches[0].drawn.length
  n_prompt = config.n_positions - n_left
  position = progress.position
  static = isinstance(position, int)
  maximum, minimum = (max, min) if static else (jnp.maximum, jnp.minimum)
  end = minimum(position + n_tokens, config.n_positions)

  def draw_one(before, position, carry):
    tokens, nll, blocks = carry
    column = jnp.maximum(position - 1, 0)
    last = jax.lax.dynamic_index_in_dim(tokens, column, axis=1, keepdims=False)
    blocks, final = decode_step(tables, weights, before, blocks, last, position, config)
    logits_of = functools.partial(code_logits, tables, config, final)
    token, nats = draw_codes(logits_of, config.tokens.codes, progress.keys, position, sampling)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)
    nll = jax.lax.dynamic_update_slice_in_dim(nll, nats[:, None], position, axis=1)
    return tokens, nll, blocks

  def draw_block(start, stop, first, last, carry):
    """Positions first..last-1, by a loop that writes into drawn positions start..stop-1."""
    tokens, nll, drawn = carry
    before = [
      (cache.prompt, take(kv, 0, start)) for cache, kv in zip(progress.caches, drawn, strict=True)
    ]
    blocks = [take(kv, start, stop) for kv in drawn]
    tokens, nll, blocks = jax.lax.fori_loop(
      first, last, functools.partial(draw_one, before), (tokens, nll, blocks)
    )
    return tokens, nll, [put(kv, new, start) for kv, new in zip(drawn, blocks, strict=True)]

  carry = progress.tokens, progress.nll, [cache.drawn for cache in progress.caches]
  most = _MAX_BLOCKS.get(hardware.platform(), _MAX_BLOCKS_ELSEWHERE)
  block = _BLOCK * -(-n_left // (_BLOCK * most))
  for start in range(0, n_left, block):
    stop = min(start + block, n_left)
    first, last = maximum(position, n_prompt + start), minimum(end, n_prompt + stop)
    # On a CPU the loop may write into all positions so far. Those before a block would be constants of the
    # loop, of which XLA keeps casts instead: as large as without a smaller dtype of the cache.
    begins = start if cache_lib.keeps_rows() else 0
    once = functools.partial(draw_block, begins, stop, first, last)
    if not static:
      # A loop of one turn or none, not a branch: it leaves the caches where they are.
      turns = jnp.asarray(first < last, jnp.int32)
      carry = jax.lax.fori_loop(0, turns, lambda _, c, once=once: once(c), carry)
    elif first < last:
      carry = once(carry)
  tokens, nll, drawn = carry
  caches = [Cache(cache.prompt, kv) for cache, kv in zip(progress.caches, drawn, strict=True)]
  return Progress(tokens, nll, end, progress.keys, caches)


def complete(
  config: ImageGPTConfig,
  params: Params,
  prompt_BxP: jax.Array,
  keys_B: jax.Array,
  *,
  sampling: SamplingConfig | SamplingValues,
  samples_per_image: int = 1,
  cache_dtype: str = "",
) -> Samples:
  """Draws all pixels after the prompt in raster order; arguments are those of `begin` and `extend`.

  Returns:
    Samples of B * samples_per_image images, those of one prompt side by side.
  """
  progress = begin(
    config, params, prompt_BxP, keys_B, samples_per_image=samples_per_image, cache_dtype=cache_dtype
  )
  n_left = config.n_positions - prompt_BxP.shape[1]
  if n_left:
    progress = extend(config, params, progress, n_left, sampling=sampling)
  return Samples(progress.tokens, progress.nll)
