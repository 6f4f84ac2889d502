"""Classifiers by gradient descent: those of all layers and all learning rates in one step.

Linear ones by SGD are the paper's way with ImageNet: momentum 0.9, a cosine schedule to zero, no feature
scaling, no weight decay, no augmentation (section 3.4 and appendix); learning rates are compared on
validation. Features come in groups of one shape: the trained model's layers, and baselines. Classifiers
share no loss and no gradient: one that diverges doesn't affect the others.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from igpt_jax.parallel import sharding
from igpt_jax.training.state import TrainState

Probe = dict[str, jax.Array]  # a group's parameters, [R, F, ...] for R learning rates
Features = dict[str, jax.Array]  # name -> float32 [F, B, W], or [F, B, T, D] of all positions
Extract = Callable[[dict, Mapping[str, jax.Array]], Features]  # (frozen, batch) -> features

_MOMENTUM = 0.9


class Group(Protocol):
  """The classifiers of one group of features, one for each set of features and learning rate."""

  def __iter__(self) -> Iterator[int]:
    """Yields the sizes that determine their shapes."""
    ...

  def init(self, n_rates: int, n_classes: int, key: jax.Array) -> Probe:
    """Returns initial parameters; a leaf with 4 axes is a matrix [R, F, width of features, ...]."""
    ...

  def logits(self, probe: Probe, features: jax.Array) -> jax.Array:
    """Returns logits of all classifiers, float32 [R, F, B, K]."""
    ...


Groups = Mapping[str, Group]


class Linear(NamedTuple):
  """Linear classifiers of `sets` sets of features of one width."""

  sets: int  # F
  width: int  # W

  def init(self, n_rates: int, n_classes: int, key: jax.Array) -> Probe:
    """Returns weights [R, F, W, K] and biases [R, F, K], all zero."""
    del key
    return {
      "weights": jnp.zeros((n_rates, self.sets, self.width, n_classes), jnp.float32),
      "bias": jnp.zeros((n_rates, self.sets, n_classes), jnp.float32),
    }

  def logits(self, probe: Probe, features: jax.Array) -> jax.Array:
    return jnp.einsum("fbw,rfwk->rfbk", features, probe["weights"]) + probe["bias"][:, :, None]


def make_optimizer(learning_rates: Sequence[float], steps: int) -> optax.GradientTransformation:
  """SGD with momentum, as `at_rates`."""
  schedule = optax.cosine_decay_schedule(1.0, steps)
  return at_rates(optax.trace(decay=_MOMENTUM), learning_rates, schedule)


def at_rates(
  direction: optax.GradientTransformation, learning_rates: Sequence[float], schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Steps along `direction`; the first axis of every leaf has one learning rate per entry."""

  def scaled(updates, params):
    del params
    rates = jnp.asarray(learning_rates, jnp.float32)
    return jax.tree.map(lambda u: u * rates.reshape(-1, *[1] * (u.ndim - 1)), updates)

  return optax.chain(
    direction,
    optax.stateless(scaled),
    optax.scale_by_learning_rate(schedule),
  )


def make_state(
  groups: Groups,
  optimizer: optax.GradientTransformation,
  n_rates: int,
  n_classes: int,
  frozen: dict,
  seed: int,
) -> TrainState:
  """Initial state; `params` holds "probes", which are trained, and "frozen", which aren't."""
  key = jax.random.key(seed)  # the same for all groups: random weights' heads begin as the model's
  probes = {name: group.init(n_rates, n_classes, key) for name, group in groups.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params={"probes": probes, "frozen": frozen},
    opt_state=optimizer.init(probes),
    rng=jax.random.key_data(jax.random.key(0)),  # unused
    skipped=jnp.zeros(2, jnp.int32),  # stays 0: the larger rates may diverge
  )


def state_shardings(abstract: TrainState, mesh: Mesh, frozen_shardings: dict) -> TrainState:
  """Shards classifiers by the width of their features where that divides evenly; replicates the rest."""
  everywhere: Any = sharding.replicated(mesh)
  parts = sharding.axis_parts(mesh, "embed")

  def place(leaf):
    splits = leaf.ndim == 4 and leaf.shape[2] % parts == 0
    return sharding.sharding(mesh, None, None, "embed", None) if splits else everywhere

  probes, opt_state = jax.tree.map(place, (abstract.params["probes"], abstract.opt_state))
  params = {"probes": probes, "frozen": frozen_shardings}
  return TrainState(everywhere, params, opt_state, rng=everywhere, skipped=everywhere)


def logits_of(groups: Groups, probes: dict[str, Probe], features: Features) -> dict[str, jax.Array]:
  """Logits of all classifiers, float32 [R, F, B, K] for every group."""
  return {name: groups[name].logits(probe, features[name]) for name, probe in probes.items()}


def make_train_step(extract: Extract, groups: Groups, optimizer: optax.GradientTransformation):
  """Builds train_step(state, batch) -> (state, metrics); the batch has `label`, int32 [B].

  Metrics are those of the best classifier on the batch: `probe_loss` in nats, `accuracy`.
  """

  def loss_fn(probes, features, labels_B):
    losses, accuracies = [], []
    for logits_RxFxBxK in logits_of(groups, probes, features).values():
      labels_RxFxB = jnp.broadcast_to(labels_B, logits_RxFxBxK.shape[:-1])
      nats = optax.softmax_cross_entropy_with_integer_labels(logits_RxFxBxK, labels_RxFxB)
      losses.append(nats.mean(-1))
      accuracies.append((logits_RxFxBxK.argmax(-1) == labels_B).mean(-1))
    return sum(loss.sum() for loss in losses), (losses, accuracies)

  def train_step(state: TrainState, batch):
    frozen = state.params["frozen"]
    features = jax.lax.stop_gradient(extract(frozen, batch))
    probes = state.params["probes"]
    grads, (losses, accuracies) = jax.grad(loss_fn, has_aux=True)(probes, features, batch["label"])
    updates, opt_state = optimizer.update(grads, state.opt_state, probes)
    metrics = {
      "probe_loss": jnp.min(jnp.stack([jnp.nanmin(loss) for loss in losses])),
      "accuracy": jnp.max(jnp.stack([accuracy.max() for accuracy in accuracies])),
    }
    probes = optax.apply_updates(probes, updates)
    params = {"probes": probes, "frozen": frozen}
    new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return new, metrics

  return train_step


def make_eval_step(extract: Extract, groups: Groups):
  """Builds eval_step(params, batch) -> (correct [R, F] for every group, images counted).

  The batch has `label`, and `mask`, True for rows that count.
  """

  def eval_step(params: dict, batch):
    features = extract(params["frozen"], batch)
    correct = {
      name: jnp.sum((logits.argmax(-1) == batch["label"]) & batch["mask"], axis=-1)
      for name, logits in logits_of(groups, params["probes"], features).items()
    }
    return correct, jnp.sum(batch["mask"])

  return eval_step
