"""Heads that predict a position's codes one after the other, where it has several (`tokens.TokenSpec`)."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from igpt_jax.model import layers
from igpt_jax.model.block import normal
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.model.projection import Einsum, sharded_einsum
from igpt_jax.parallel.sharding import gather_weight
from igpt_jax.tokens import TokenSpec

_HIDDEN = ("codes", *layers.STREAM)
TO_HIDDEN = Einsum("btd,cde->cbte", layers.STREAM, ("codes", "embed", "channels"), _HIDDEN)
_TO_LOGITS = Einsum(
  "cbte,cve->btcv", _HIDDEN, ("codes", "vocab", "embed"), ("batch", "length", "codes", "vocab"), "float32"
)  # fmt: skip


def rows_of_earlier(spec: TokenSpec, earlier: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns the rows of `Heads.seen` that the next code's head adds, for the codes before it.

  Args:
    spec: what the tokens are.
    earlier: the position's codes so far, int32 [...] each.
  """
  pairs = list(itertools.combinations(range(spec.codes), 2))  # a code, and one after it
  after = len(earlier)
  return [code + pairs.index((at, after)) * spec.n_vocab for at, code in enumerate(earlier)]


class Heads(nnx.Module):
  """Heads of a position's codes: each sees the model's output there and the codes before its own.

  Code c has the hidden units a(h·W_c + Σ E_cb[x_b]), summed over the codes b before it, with the blocks'
  activation a; its rows of the output table make logits of them. A sum of the logits themselves
  couldn't say that green goes with red only where the image is grey.

  W begins N(0, 1/sqrt(D)), and E so that what a code adds varies as much as h·W does, at most.
  """

  def __init__(self, config: ImageGPTConfig, rngs: nnx.Rngs):
    self._spec, width = config.tokens, config.n_embd
    codes = self._spec.codes
    self.hidden = normal(rngs, (codes, width, width), 1 / math.sqrt(width), TO_HIDDEN.weight_axes)
    rows = codes * (codes - 1) // 2 * self._spec.n_vocab
    self.seen = normal(rngs, (rows, width), 1 / math.sqrt(codes - 1), ("vocab", "embed"))

  def __call__(self, final: jax.Array, tokens: jax.Array, wtet: jax.Array) -> jax.Array:
    """Returns every code's logits, float32 [B, T, codes, n_vocab].

    Args:
      final: the final norm's output, [B, T, D].
      tokens: int32 [B, T, codes]; a code's logits depend on those before it at its position.
      wtet: the output table, [codes * n_vocab, D].
    """
    spec = self._spec
    made = sharded_einsum(TO_HIDDEN, final, self.hidden[...])
    table = gather_weight(self.seen[...], "vocab", "embed")
    codes = [tokens[..., code] for code in range(spec.codes)]
    added = [jnp.zeros(final.shape, jnp.float32)]
    for after in range(1, spec.codes):
      rows = rows_of_earlier(spec, codes[:after])
      added.append(layers.sum_of_rows(table, rows, layers.STREAM))
    hidden = layers.activation(made + jnp.stack(added).astype(made.dtype))
    return sharded_einsum(_TO_LOGITS, hidden, wtet.reshape(spec.codes, spec.n_vocab, -1))
