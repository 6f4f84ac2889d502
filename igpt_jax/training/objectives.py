"""Training objectives: functions from a batch of tokens to negative log-likelihoods.

An objective is a function (model, tokens_BxT, keys_B) -> (nll_BxT, weight_BxT): nats per token, and
which tokens count. (Tokens may be [B, T, codes]: a token's nats are the sum of its codes'.) There is one PRNG
key per image, so that an image's mask doesn't depend on the batch it is in. `per_image` reduces the losses as
the released code does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import ImageGPT

Objective = Callable[[ImageGPT, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

OBJECTIVES = ("autoregressive", "masked")


def token_nll(logits_BxTxV: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
  """Nats per token, float32 [B, T]; of logits [B, T, codes, V] and tokens [B, T, codes] summed over codes."""
  logits = logits_BxTxV.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, tokens_BxT[..., None], axis=-1)[..., 0]
  nll = jax.nn.logsumexp(logits, axis=-1) - chosen
  return nll if nll.ndim < 3 else jnp.sum(nll, axis=-1)


def autoregressive(model: ImageGPT, tokens_BxT: jax.Array, keys_B: jax.Array):
  """Predicts every pixel from those before it, the first from the start vector (paper, section 2.1)."""
  del keys_B  # nothing is drawn
  nll = token_nll(model(tokens_BxT), tokens_BxT)
  return nll, jnp.ones_like(nll)


def draw_visible(keys_B: jax.Array, length: int, mask_probability: float) -> jax.Array:
  """Draws the pixels that stay visible, bool [B, length]; each is masked with `mask_probability`."""
  uniform_BxT = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys_B)
  return uniform_BxT > mask_probability


def masked(mask_probability: float) -> Objective:
  """Returns BERT's objective: to predict masked pixels from the visible ones.

  The released code zeroes the token embedding of a masked pixel before adding its position; there
  is no mask token and no 80/10/10 (src/model.py).
  """

  def objective(model: ImageGPT, tokens_BxT: jax.Array, keys_B: jax.Array):
    keep = draw_visible(keys_B, tokens_BxT.shape[1], mask_probability)
    nll = token_nll(model(tokens_BxT, keep), tokens_BxT)
    return nll, 1.0 - keep.astype(jnp.float32)

  return objective


def make_objective(name: str, mask_probability: float = 0.15) -> Objective:
  """Returns the objective called `name`, one of OBJECTIVES.

  Raises:
    UserError: there is no such objective, or the probability lies outside (0, 1).
  """
  if name == "autoregressive":
    return autoregressive
  if name == "masked":
    if not 0 < mask_probability < 1:
      raise UserError(f"mask_probability: {mask_probability}; expected a number in (0, 1)")
    return masked(mask_probability)
  raise UserError(f"objective: {name!r}; expected one of {', '.join(OBJECTIVES)}")


def per_image(nll_BxT: jax.Array, weight_BxT: jax.Array) -> jax.Array:
  """Every image's nats per counted token [B]; 0 where none counts (means leave such images out)."""
  counted = jnp.sum(weight_BxT, axis=-1)
  return jnp.sum(nll_BxT * weight_BxT, axis=-1) / jnp.maximum(counted, 1.0)


def has_counted(weight_BxT: jax.Array) -> jax.Array:
  """1 where an image has a counted token, and so belongs in a mean, else 0; float32 [B].

  A BERT mask may hide no pixel of an image. (The released code divides 0 by 0 there.)
  """
  return jnp.any(weight_BxT > 0, axis=-1).astype(jnp.float32)
