"""Drawing of codes, such as colours, from the model's logits: temperature, top-k, top-p, and a key per sample."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax.errors import UserError

# Far below any use, and far above where float32 overflows or rounds to 0.
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

  def values(self, *, truncates: bool | None = None) -> "SamplingValues":
    """Returns these settings as arguments of a compiled program.

    Args:
      truncates: True gives values of a program that truncates, whether these settings do or not; None
        those of one that truncates only if they do.
    """
    if truncates is None:
      truncates = self.top_k > 0 or self.top_p < 1
    top_k = np.int32(min(self.top_k, np.iinfo(np.int32).max))
    truncation = Truncation(top_k, np.float32(self.top_p)) if truncates else None
    # Inverted here, as XLA does with a constant: accelerators' own divisions aren't exact.
    inverse = np.float32(1) / np.float32(self.temperature or 1)
    return SamplingValues(inverse, np.bool_(self.temperature == 0), truncation)


class Truncation(NamedTuple):
  """Top-k and top-p as arrays; 0 and 1 keep all colours."""

  top_k: jax.Array | np.int32
  top_p: jax.Array | np.float32


class SamplingValues(NamedTuple):
  """A `SamplingConfig` as arguments of a program, which other values don't compile again.

  Attributes:
    inverse_temperature: factor of the logits, float32.
    greedy: True takes the likeliest colour.
    truncation: None in a program that keeps all colours: to truncate, it sorts them for every pixel.
  """

  inverse_temperature: jax.Array | np.float32
  greedy: jax.Array | np.bool_
  truncation: Truncation | None


class Samples(NamedTuple):
  """Images that were drawn.

  Attributes:
    tokens: int32 [B, n_positions], or [B, n_positions, codes], the prompt included.
    nll: float32 [B, n_positions], nats per token under the model itself (temperature 1, no
      truncation); 0 in the prompt.
  """

  tokens: jax.Array
  nll: jax.Array


def filter_logits(logits_BxV: jax.Array, values: SamplingValues) -> jax.Array:
  """Applies temperature (above 0), then top-k, then top-p; truncated logits are -inf.

  Equally likely colours at the edge of top-k are all kept.
  """
  logits = logits_BxV * values.inverse_temperature
  if values.truncation is None:
    return logits
  top_k, top_p = values.truncation
  ordered = jnp.sort(logits, axis=-1, descending=True)
  last = jnp.clip(top_k, 1, logits.shape[-1]) - 1
  kth = jax.lax.dynamic_index_in_dim(ordered, last, axis=-1)
  kth = jnp.where(top_k > 0, kth, -jnp.inf)
  ordered = jnp.where(ordered < kth, -jnp.inf, ordered)
  probability = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  # The likeliest colour always stays: nothing comes before it. Sums can exceed 1, which keeps all.
  reached = (before >= top_p) & (top_p < 1)
  least = jnp.min(jnp.where(reached, jnp.inf, ordered), axis=-1, keepdims=True)
  return jnp.where(logits < jnp.maximum(kth, least), -jnp.inf, logits)


def draw(
  logits: jax.Array,
  keys_B: jax.Array,
  turn: jax.Array,
  sampling: SamplingConfig | SamplingValues,
) -> jax.Array:
  """Draws tokens, int32 [B, ...], by logits [B, ..., V]; row i depends on keys_B[i] and `turn` alone.

  A `SamplingConfig` is compiled into the program; `SamplingValues` may be its arguments.
  """
  values = sampling.values() if isinstance(sampling, SamplingConfig) else sampling

  def noise(key):
    return jax.random.gumbel(jax.random.fold_in(key, turn), logits.shape[1:], logits.dtype)

  # The likeliest after Gumbel noise is a draw; without noise it is the likeliest.
  noisy = filter_logits(logits, values) + jax.vmap(noise)(keys_B)
  return jnp.argmax(jnp.where(values.greedy, logits, noisy), axis=-1).astype(jnp.int32)


def draw_codes(
  logits_of: Callable[[Sequence[jax.Array]], jax.Array],
  codes: int,
  keys_B: jax.Array,
  turn: jax.Array,
  sampling: SamplingConfig | SamplingValues,
) -> tuple[jax.Array, jax.Array]:
  """Draws the codes of positions, one after the other.

  Args:
    logits_of: maps the codes drawn so far, int32 [B, ...] each, to the next one's logits [B, ..., V].
    codes: codes of a position.
    keys_B, turn, sampling: as for `draw`; temperature and truncation are for each code by itself.

  Returns:
    Tokens, int32 [B, ...], or [B, ..., codes] of several; their nats, float32 [B, ...].
  """
  drawn, nats = [], []
  for code in range(codes):
    logits = logits_of(drawn)
    drawn.append(draw(logits, keys_B, turn if codes == 1 else turn * codes + code, sampling))
    nats.append(nats_of(logits, drawn[-1]))
  tokens = drawn[0] if codes == 1 else jnp.stack(drawn, axis=-1)
  return tokens, functools.reduce(operator.add, nats)


def nats_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """-log p(token) under untruncated logits [..., V], float32 [...]."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen
