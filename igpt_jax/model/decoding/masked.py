"""Filling any region of an image with a BERT model, by iterative unmasking.

The method is MaskGIT's (Chang et al. 2022, section 3.2): predict every unknown pixel, keep the most
confident predictions, and repeat. A BERT model gives no likelihood of a whole image; filled one pixel
at a time, the pixels' nats add up to the image's likelihood in this order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.errors import UserError
from igpt_jax.model.decoding.draw import Samples, SamplingConfig, SamplingValues, draw_codes
from igpt_jax.model.image_gpt import Params, bind
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.tokens import over_codes


class Filling(NamedTuple):
  """Images that are filled in part.

  Attributes:
    done: int32, the number of passes so far.
    tokens: int32 [B, T], or [B, T, codes]; 0 where a pixel is still unknown.
    settled: bool [B, T], True where a pixel is known or drawn.
    nll: float32 [B, T], as in `Samples`; 0 where nothing is drawn yet.
    n_unknown: int32 [B], the number of unknown pixels at the start.
  """

  done: jax.Array
  tokens: jax.Array
  settled: jax.Array
  nll: jax.Array
  n_unknown: jax.Array


def begin(tokens_BxT: jax.Array, known_BxT: jax.Array) -> Filling:
  """Returns images of which nothing is filled yet; arguments are those of `fill`."""
  known_BxT = known_BxT.astype(bool)
  return Filling(
    jnp.int32(0),
    jnp.where(over_codes(known_BxT, tokens_BxT), tokens_BxT, 0).astype(jnp.int32),
    known_BxT,
    jnp.zeros(known_BxT.shape, jnp.float32),
    jnp.sum(~known_BxT, axis=1),
  )


def extend(
  config: ImageGPTConfig,
  params: Params,
  filling: Filling,
  keys_B: jax.Array,
  n_passes: jax.Array | int,
  *,
  steps: jax.Array | int,
  sampling: SamplingConfig | SamplingValues,
) -> Filling:
  """Makes the next `n_passes` of `steps` passes, or as many as there is something left to draw for.

  `n_passes` and `steps` may be traced; the other arguments are those of `fill`.
  """
  if config.causal:
    raise UserError(
      "this checkpoint is autoregressive: it draws pixels from those before them in raster order, and "
      "can't condition on what lies below or to the right; fix: give it the rows above, or take a "
      "BERT checkpoint (objective=masked) to fill any region"
    )
  model, codes = bind(config, params), config.tokens.codes
  end = jnp.minimum(filling.done + n_passes, steps)

  def one_pass(filling):
    _, tokens, settled, nll, n_unknown = filling
    done = filling.done + 1
    final, _ = model.hidden(model.embed(tokens, settled))

    def logits_of(earlier):
      if codes == 1:
        return model.logits(final, tokens)
      # A code's logits depend on those before it alone, so that the others may be anything.
      so_far = jnp.stack([*earlier, *[tokens[..., 0]] * (codes - len(earlier))], axis=-1)
      return model.logits(final, so_far)[:, :, len(earlier)]

    proposed, nats = draw_codes(logits_of, codes, keys_B, done, sampling)
    # The most confident first, in raster order where equal, and settled pixels last.
    order = jnp.argsort(jnp.where(settled, jnp.inf, nats), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    unknown = jnp.sum(~settled, axis=1)
    left = jnp.minimum(_left(n_unknown, done, steps), unknown - 1)
    new = ~settled & (rank < (unknown - left)[:, None])
    tokens = jnp.where(over_codes(new, tokens), proposed, tokens)
    nll = jnp.where(new, nats, nll)
    return Filling(done, tokens, settled | new, nll, n_unknown)

  return jax.lax.while_loop(
    lambda filling: (filling.done < end) & jnp.any(~filling.settled), one_pass, filling
  )


def fill(
  config: ImageGPTConfig,
  params: Params,
  tokens_BxT: jax.Array,
  known_BxT: jax.Array,
  keys_B: jax.Array,
  *,
  steps: int,
  sampling: SamplingConfig | SamplingValues,
) -> Samples:
  """Draws the unknown pixels in at most `steps` passes.

  After pass i of n, cos(π/2 · i/n) of an image's unknown pixels are left. Every pass settles at least
  one; with as many steps as unknown pixels or more, exactly one.

  Args:
    config, params: a BERT model.
    tokens_BxT: whole images; values of unknown pixels are ignored.
    known_BxT: True where a pixel is known. The region may have any form and differ between images.
    keys_B: PRNG keys, one per image: an image doesn't depend on its batch.
    steps: passes over the image.
    sampling: temperature and truncation.

  Returns:
    Samples; a pixel's nll is under the pass that settled it, conditioned on the passes before.

  Raises:
    UserError: the model is causal, or `steps` isn't positive.
  """
  if steps < 1:
    raise UserError(f"steps: {steps}; expected 1 or more")
  begun = begin(tokens_BxT, known_BxT)
  filled = extend(config, params, begun, keys_B, steps, steps=steps, sampling=sampling)
  return Samples(filled.tokens, filled.nll)


def _left(n_unknown_B: jax.Array, done: jax.Array, steps: jax.Array | int) -> jax.Array:
  """Number of an image's unknown pixels that are left after `done` passes."""
  # Rounded down; the margin keeps what is a whole number from falling below it in float32.
  by_cosine = (n_unknown_B * jnp.cos(jnp.pi / 2 * done / steps) + 1e-3).astype(jnp.int32)
  left = jnp.where(n_unknown_B <= steps, n_unknown_B - done, by_cosine)
  return jnp.where(done == steps, 0, left)
