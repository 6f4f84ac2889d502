"""Drawing of colours from the model's logits: temperature, top-k, top-p, and a key per sample."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.errors import UserError

# Logits divided by a smaller temperature overflow float32, and a smaller probability rounds to 0.
_LEAST = 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """Settings of the draw of a pixel. The paper samples at temperature 1 without truncation.

  Attributes:
    temperature: divides the logits, at least 1e-6; 0 takes the likeliest colour.
    top_k: keep the k likeliest colours; 0 keeps all.
    top_p: keep the fewest likeliest colours whose probabilities reach p, at least 1e-6; 1 keeps all.

  Raises:
    UserError: a value is out of bounds.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature != 0 and not _LEAST <= self.temperature < float("inf"):
      raise UserError(
        f"temperature: {self.temperature}; expected 0 (greedy), or a finite number of {_LEAST:g} or more"
      )
    if self.top_k < 0:
      raise UserError(f"top_k: {self.top_k}; expected 0 (all colours) or more")
    if not _LEAST <= self.top_p <= 1:
      raise UserError(
        f"top_p: {self.top_p}; expected a number from {_LEAST:g} to 1; fix: temperature 0 takes the "
        "likeliest colour"
      )


class Samples(NamedTuple):
  """Images that were drawn.

  Attributes:
    tokens: int32 [B, n_positions], the prompt included.
    nll: float32 [B, n_positions], nats per token under the model itself (temperature 1, no
      truncation); 0 in the prompt.
  """

  tokens: jax.Array
  nll: jax.Array


def filter_logits(logits_BxV: jax.Array, sampling: SamplingConfig) -> jax.Array:
  """Applies temperature (above 0), then top-k, then top-p; truncated logits are -inf.

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
  logits: jax.Array, keys_B: jax.Array, turn: jax.Array, sampling: SamplingConfig
) -> jax.Array:
  """Draws tokens, int32 [B, ...], by logits [B, ..., V]; row i depends on keys_B[i] and `turn` alone."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def one(key, logits):
    return jax.random.categorical(jax.random.fold_in(key, turn), logits)

  return jax.vmap(one)(keys_B, filter_logits(logits, sampling)).astype(jnp.int32)


def nats_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """-log p(token) under untruncated logits [..., V], float32 [...]."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen
