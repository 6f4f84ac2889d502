"""Linear classifiers by SGD, as the paper fits them to ImageNet: all layers and all learning rates at once.

Momentum 0.9, a cosine to zero, nothing scaled, nothing decayed, no augmentation (paper, section 3.4 and
appendix); which learning rate is best, validation says. Features come in groups of one width: the
trained model's layers, and baselines. Each classifier's loss and gradient are its own: one that
diverges spoils no other.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from igpt_jax.parallel import sharding
from igpt_jax.training.state import TrainState

Groups = Mapping[str, tuple[int, int]]  # name -> (sets of features F, their width W)
Features = dict[str, jax.Array]  # name -> float32 [F, B, W]
Extract = Callable[[dict, Mapping[str, jax.Array]], Features]  # (frozen, batch) -> features

_MOMENTUM = 0.9


def make_optimizer(learning_rates: Sequence[float], steps: int) -> optax.GradientTransformation:
  """SGD whose leaves' first axis is the learning rates'."""

  def scaled(updates, params):
    del params
    rates = jnp.asarray(learning_rates, jnp.float32)
    return jax.tree.map(lambda u: u * rates.reshape(-1, *[1] * (u.ndim - 1)), updates)

  return optax.chain(
    optax.trace(decay=_MOMENTUM),
    optax.stateless(scaled),
    optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, steps)),
  )


def init_probes(groups: Groups, n_rates: int, n_classes: int) -> dict:
  """Zeros: weights [R, F, W, K] and bias [R, F, K] of every group."""
  return {
    name: {
      "weights": jnp.zeros((n_rates, sets, width, n_classes), jnp.float32),
      "bias": jnp.zeros((n_rates, sets, n_classes), jnp.float32),
    }
    for name, (sets, width) in groups.items()
  }


def make_state(
  groups: Groups,
  optimizer: optax.GradientTransformation,
  n_rates: int,
  n_classes: int,
  frozen: dict,
) -> TrainState:
  """A fresh state: `params` holds "probes", which are trained, and "frozen", which goes along."""
  probes = init_probes(groups, n_rates, n_classes)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params={"probes": probes, "frozen": frozen},
    opt_state=optimizer.init(probes),
    rng=jax.random.key_data(jax.random.key(0)),  # nothing is drawn
    skipped=jnp.zeros(2, jnp.int32),  # rates that are too large are expected
  )


def state_shardings(
  abstract: TrainState, groups: Groups, mesh: Mesh, frozen_shardings: dict
) -> TrainState:
  """Classifiers are split by the width of their features, where that divides; the rest is everywhere."""
  everywhere: Any = sharding.replicated(mesh)
  parts = sharding.axis_parts(mesh, "embed")

  def place(path, leaf):
    del path
    splits = leaf.ndim == 4 and leaf.shape[2] % parts == 0
    return sharding.sharding(mesh, None, None, "embed", None) if splits else everywhere

  placed = jax.tree_util.tree_map_with_path(place, (abstract.params["probes"], abstract.opt_state))
  return TrainState(
    step=everywhere,
    params={"probes": placed[0], "frozen": frozen_shardings},
    opt_state=placed[1],
    rng=everywhere,
    skipped=everywhere,
  )


def logits_of(probes: dict, features: Features) -> dict[str, jax.Array]:
  """Every classifier's logits, float32 [R, F, B, K] a group."""
  return {
    name: jnp.einsum("fbw,rfwk->rfbk", features[name], each["weights"]) + each["bias"][:, :, None]
    for name, each in probes.items()
  }


def make_train_step(extract: Extract, optimizer: optax.GradientTransformation):
  """Builds train_step(state, batch) -> (state, metrics); the batch has `label`, int32 [B].

  Metrics are those of the best of all classifiers on the batch: `probe_loss` in nats, `accuracy`.
  """

  def loss_fn(probes, features, labels_B):
    logits = logits_of(probes, features)
    losses, accuracies = {}, {}
    for name, each_RxFxBxK in logits.items():
      rows = optax.softmax_cross_entropy_with_integer_labels(
        each_RxFxBxK, jnp.broadcast_to(labels_B, each_RxFxBxK.shape[:-1])
      )
      losses[name] = rows.mean(-1)
      accuracies[name] = (each_RxFxBxK.argmax(-1) == labels_B).mean(-1)
    return sum(each.sum() for each in losses.values()), (losses, accuracies)

  def train_step(state: TrainState, batch):
    frozen = state.params["frozen"]
    features = jax.lax.stop_gradient(extract(frozen, batch))
    probes = state.params["probes"]
    grads, (losses, accuracies) = jax.grad(loss_fn, has_aux=True)(probes, features, batch["label"])
    updates, opt_state = optimizer.update(grads, state.opt_state, probes)
    metrics = {
      "probe_loss": jnp.min(jnp.stack([jnp.nanmin(each) for each in losses.values()])),
      "accuracy": jnp.max(jnp.stack([each.max() for each in accuracies.values()])),
    }
    probes = optax.apply_updates(probes, updates)
    params = {"probes": probes, "frozen": frozen}
    new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return new, metrics

  return train_step


def make_eval_step(extract: Extract):
  """Builds eval_step(params, batch) -> (correct [R, F] of every group, images counted).

  The batch has `label` and `mask`: which rows count.
  """

  def eval_step(params: dict, batch):
    logits = logits_of(params["probes"], extract(params["frozen"], batch))
    counted = batch["mask"]
    correct = {
      name: jnp.sum((each.argmax(-1) == batch["label"]) & counted, axis=-1)
      for name, each in logits.items()
    }
    return correct, jnp.sum(counted)

  return eval_step
