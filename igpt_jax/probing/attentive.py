"""Attentive probe: a classifier of all positions' features, which one learned query pools by attention.

The head is that of AIM's attentive probing (El-Nouby et al. 2024, arXiv 2401.08541, and
`AttentionPoolingClassifier` of apple/ml-aim): each feature normalised over batch and positions without
gain or bias, keys and values by matrices without biases, one query N(0, 0.02), softmax of q·k/√(head's
width) over positions for every head, no output projection, then a linear classifier.

Also AIM's: AdamW with warm-up for a twentieth of the steps, a cosine decay, weight decay 0.1, and
learning rates chosen from a grid (appendix). Not AIM's: the classifier has a bias and begins at zero, as
the linear probe does; the normalisation's moments are those of training images, fixed beforehand
(`feeds.PositionFeed`); every layer has a head of its own, where AIM averages six layers; images aren't
augmented; gradients aren't clipped, as Adam's steps don't grow with them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from igpt_jax.errors import UserError
from igpt_jax.probing import sgd

_WEIGHT_DECAY = 0.1
_WARMUP = 1 / 20  # of all steps


class Attentive(NamedTuple):
  """Attentive heads of a group: `sets` sets of features, each of them of all positions."""

  sets: int  # F
  width: int  # D, of a position's features
  heads: int  # H, of head_dim E = D / H

  def init(self, n_rates: int, n_classes: int, key: jax.Array) -> sgd.Probe:
    """Returns query [R, F, D], keys and values [R, F, D, D], weights [R, F, D, K], bias [R, F, K].

    All learning rates begin alike.
    """
    vector, matrix = (self.sets, self.width), (self.sets, self.width, self.width)
    scale = self.width**-0.5
    begun = {"query": (0.02, vector), "keys": (scale, matrix), "values": (scale, matrix)}
    drawn = {
      name: stddev * jax.random.normal(of, shape, jnp.float32)
      for of, (name, (stddev, shape)) in zip(jax.random.split(key, 3), begun.items(), strict=True)
    }
    everywhere = {
      name: jnp.broadcast_to(leaf, (n_rates, *leaf.shape)) for name, leaf in drawn.items()
    }
    return everywhere | sgd.Linear(self.sets, self.width).init(n_rates, n_classes, key)

  def logits(self, probe: sgd.Probe, features: jax.Array) -> jax.Array:
    """Returns logits [R, F, B, K] of features [F, B, T, D].

    There is one query, so that q·(W x) is taken as (Wᵀq)·x, and values are projected after they are
    pooled: no key or value of a position is ever made, which would cost E times as much.
    """
    of_heads = (self.heads, self.width // self.heads)

    def split(leaf):
      return leaf.reshape(*leaf.shape[:-1], *of_heads)

    asked = jnp.einsum("rfhe,rfdhe->rfdh", split(probe["query"]), split(probe["keys"]))
    scores = jnp.einsum("fbtd,rfdh->rfbht", features, asked * of_heads[1] ** -0.5)
    pooled = jnp.einsum("rfbht,fbtd->rfbhd", jax.nn.softmax(scores), features)
    values = jnp.einsum("rfbhd,rfdhe->rfbhe", pooled, split(probe["values"]))
    logits = jnp.einsum("rfbd,rfdk->rfbk", values.reshape(*values.shape[:3], -1), probe["weights"])
    return logits + probe["bias"][:, :, None]


def heads_of(asked: int, n_embd: int, n_head: int) -> int:
  """Returns the number of heads: `config.probe.heads`, or as many as the model has.

  Raises:
    UserError: they don't divide the features' width.
  """
  heads = asked or n_head
  if n_embd % heads:
    fits = [n for n in range(1, n_embd + 1) if n_embd % n == 0]
    raise UserError(
      f"config.probe.heads: {heads} doesn't divide the {n_embd} features of the model; expected one of "
      f"{', '.join(map(str, fits))}, or 0: the model's {n_head}"
    )
  return heads


def make_optimizer(learning_rates: Sequence[float], steps: int) -> optax.GradientTransformation:
  """AdamW with a learning rate for each entry of the leaves' first axis; matrices decay."""
  cosine = optax.cosine_decay_schedule(1.0, steps)
  warmup = max(1.0, steps * _WARMUP)

  def schedule(step):
    return cosine(step) * jnp.minimum(1.0, (step + 1) / warmup)

  def matrices(probes):
    return jax.tree.map(lambda leaf: leaf.ndim == 4, probes)

  direction = optax.chain(
    optax.scale_by_adam(), optax.add_decayed_weights(_WEIGHT_DECAY, mask=matrices)
  )
  return sgd.at_rates(direction, learning_rates, schedule)
