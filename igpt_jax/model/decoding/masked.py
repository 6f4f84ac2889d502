"""Filling any region of an image with a BERT model, by iterative unmasking.

As MaskGIT does (Chang et al. 2022, section 3.2): predict every unknown pixel, keep those that the
model is surest of, and look again. A BERT model gives no likelihood of a whole image; one pixel at
a time, the pixels' own nats add up to that of this image in this order.
"""

import jax
import jax.numpy as jnp

from igpt_jax.errors import UserError
from igpt_jax.model.decoding.draw import Samples, SamplingConfig, draw, nats_of
from igpt_jax.model.image_gpt import ImageGPTConfig, Params, bind


def fill(
  config: ImageGPTConfig,
  params: Params,
  tokens_BxT: jax.Array,
  known_BxT: jax.Array,
  keys_B: jax.Array,
  *,
  steps: int,
  sampling: SamplingConfig,
) -> Samples:
  """Draws the pixels that aren't known, in `steps` passes at most.

  After pass i of n, cos(π/2 · i/n) of an image's unknown pixels are left. Each pass settles at least
  one; with as many steps as unknown pixels, or more, one at a time.

  Args:
    config, params: a BERT model.
    tokens_BxT: whole images; what isn't known may be anything.
    known_BxT: True where a pixel is given. Each image may have a region of its own, of any form.
    keys_B: PRNG keys: an image is filled the same way whatever batch it is in.
    steps: passes over the image.
    sampling: how a pixel's colour is drawn.

  Returns:
    Samples; nll is of each pixel when it was settled, given what was settled in earlier passes.

  Raises:
    UserError: the model is causal, or there are no steps.
  """
  if config.causal:
    raise UserError(
      "this checkpoint is autoregressive: it draws pixels from those before them in raster order, and "
      "can't condition on what lies below or to the right; fix: give it the rows above, or take a "
      "BERT checkpoint (objective=masked) to fill any region"
    )
  if steps < 1:
    raise UserError(f"steps: {steps}; expected 1 or more")
  model = bind(config, params)
  known_BxT = known_BxT.astype(bool)
  n_unknown_B = jnp.sum(~known_BxT, axis=1)

  def one_pass(state):
    done, tokens, settled, nll = state
    done = done + 1
    logits = model(tokens, settled)
    proposed = draw(logits, keys_B, done, sampling)
    nats = nats_of(logits, proposed)
    # The surest first, the earlier of two as sure, and what is settled last.
    order = jnp.argsort(jnp.where(settled, jnp.inf, nats), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    unknown = jnp.sum(~settled, axis=1)
    left = jnp.minimum(_left(n_unknown_B, done, steps), unknown - 1)
    new = ~settled & (rank < (unknown - left)[:, None])
    return (done, jnp.where(new, proposed, tokens), settled | new, jnp.where(new, nats, nll))

  start = (
    jnp.int32(0),
    jnp.where(known_BxT, tokens_BxT, 0).astype(jnp.int32),
    known_BxT,
    jnp.zeros(tokens_BxT.shape, jnp.float32),
  )
  _, tokens, _, nll = jax.lax.while_loop(
    lambda state: (state[0] < steps) & jnp.any(~state[2]), one_pass, start
  )
  return Samples(tokens, nll)


def _left(n_unknown_B: jax.Array, done: jax.Array, steps: int) -> jax.Array:
  """How many of an image's unknown pixels stay so after some passes."""
  # Rounded down; but what is a whole number stays one in float32.
  by_cosine = (n_unknown_B * jnp.cos(jnp.pi / 2 * done / steps) + 1e-3).astype(jnp.int32)
  left = jnp.where(n_unknown_B <= steps, n_unknown_B - done, by_cosine)
  return jnp.where(done == steps, 0, left)
