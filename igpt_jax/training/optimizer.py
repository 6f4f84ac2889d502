"""Adam, or Muon, with the paper's warm-up and cosine to zero (section 3.3), or another schedule."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from igpt_jax.errors import UserError
from igpt_jax.model.parametrisation import STANDARD, Multipliers, Scale, multipliers, names
from igpt_jax.training import muon

OPTIMIZERS = ("adam", "muon")
SCHEDULES = ("cosine", "constant", "wsd")
DECAY_SHAPES = ("linear", "1-sqrt")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam's settings. The paper clips nothing and decays nothing; its β₂ of 0.95 avoids spikes.

  Attributes:
    learning_rate: peak.
    steps: length of the whole schedule, warm-up included.
    warmup_steps: length of a linear warm-up from 0; the paper takes one epoch.
    schedule: after the warm-up "cosine" (to 0 at `steps`), "constant", or "wsd": constant, the trunk
      that runs of every length share, and then a decay to 0 at `steps`.
    decay_steps: length of wsd's decay; 0: a fifth of `steps`.
    decay_shape: the rate falls with 1 - x or 1 - √x of the decay's share x that is done; Hägele et al.
      (2024, arXiv:2405.18392) found 1 - √x better, and a fifth of the steps enough.
    b1, b2, eps: Adam's.
    weight_decay: decoupled, on matrices and tables only; 0 in the paper.
    clip_norm: global gradient norm to clip to; 0 for no clipping.
    optimizer: "adam", or "muon": the blocks' matrices by Muon, all else by Adam.
    scale: the model's, by which rates of single parameters and ε differ (model/parametrisation.py).
  """

  learning_rate: float
  steps: int
  warmup_steps: int = 0
  schedule: str = "cosine"
  decay_steps: int = 0
  decay_shape: str = "1-sqrt"
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 0.0
  optimizer: str = "adam"
  scale: Scale = STANDARD

  def __post_init__(self):
    if self.optimizer not in OPTIMIZERS:
      raise UserError(
        f"train.optimizer: {self.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}"
      )
    if self.schedule not in SCHEDULES:
      raise UserError(f"train.schedule: {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
    if self.steps < 1:
      raise UserError(f"train.steps: {self.steps}; expected a positive number")
    if not 0 <= self.warmup_steps <= self.steps:
      raise UserError(
        f"train.warmup_steps: {self.warmup_steps}; expected between 0 and train.steps {self.steps}"
      )
    if self.decay_steps < 0:
      raise UserError(f"train.decay_steps: {self.decay_steps}; expected 0 or more")
    if self.decay_shape not in DECAY_SHAPES:
      raise UserError(
        f"train.decay_shape: {self.decay_shape!r}; expected one of {', '.join(DECAY_SHAPES)}"
      )
    if self.decays_from is not None and self.decays_from <= self.warmup_steps:
      decay = self.steps - self.decays_from
      raise UserError(
        f"train.steps: {self.steps}; with train.schedule=wsd, a warm-up of {self.warmup_steps} and a "
        f"decay of {decay} leave no step between them; expected more than {self.warmup_steps + decay}; "
        "fix: more train.steps, fewer train.warmup_steps, or fewer train.decay_steps"
      )
    if not self.learning_rate > 0:
      raise UserError(f"train.learning_rate: {self.learning_rate}; expected a positive number")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f"train.{name}: {getattr(self, name)}; expected a number in [0, 1)")
    for name in ("weight_decay", "clip_norm"):
      if not getattr(self, name) >= 0:
        raise UserError(f"train.{name}: {getattr(self, name)}; expected 0 or more")

  @property
  def decays_from(self) -> int | None:
    """Number of steps before wsd's decay, whose parameters it begins from; None: another schedule."""
    if self.schedule != "wsd":
      return None
    return self.steps - (self.decay_steps or max(self.steps // 5, 1))


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """Returns the function from step to learning rate."""
  after = max(config.steps - config.warmup_steps, 1)
  main = optax.constant_schedule(config.learning_rate)
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(config.learning_rate, after)
  parts, ends = [main], []
  if config.warmup_steps:
    parts.insert(0, optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps))
    ends.append(config.warmup_steps)
  if config.decays_from is not None:
    parts.append(_decay(config, config.steps - config.decays_from))
    ends.append(config.decays_from)
  return optax.join_schedules(parts, ends) if ends else main


def _decay(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns the function from the steps of a decay of `steps` that are done to the learning rate."""

  def rate(done):
    share = jnp.clip(done / steps, 0.0, 1.0)
    return config.learning_rate * (1 - (share if config.decay_shape == "linear" else share**0.5))

  return rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  scaled = optax.scale_by_adam(config.b1, config.b2, config.eps)
  if config.optimizer == "muon":
    scaled = optax.partition({"muon": muon.scale_by_muon(), "adam": scaled}, _optimizer_of)
  parts.append(scaled if config.scale == STANDARD else _parametrised(scaled, config))
  if config.weight_decay:
    # Gains and the start vector don't decay; tables of embeddings do, as matrices.
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=_is_matrix))
  parts.append(optax.scale_by_learning_rate(make_schedule(config)))
  return optax.chain(*parts)


def _parametrised(
  scaled: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
  """Returns `scaled` with every parameter's own ε, its updates times the parameter's own factor."""

  def times(factor: Callable[[Multipliers, bool], float]) -> optax.GradientTransformation:
    def multiplied(path, leaf):
      by_muon = config.optimizer == "muon" and muon.is_muons(path)
      return leaf * factor(multipliers(names(path), config.scale), by_muon)

    return optax.stateless(lambda tree, _: jax.tree_util.tree_map_with_path(multiplied, tree))

  return optax.chain(
    # Adam of a gradient times k, with ε, is Adam of the gradient with ε/k. Muon has no ε.
    times(lambda own, by_muon: 1.0 if by_muon else 1 / own.epsilon),
    scaled,
    times(lambda own, by_muon: own.muon if by_muon else own.adam),
  )


def _optimizer_of(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "muon" if muon.is_muons(path) else "adam", params
  )


def _is_matrix(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.ndim >= 2 and path[-1] != jax.tree_util.DictKey("g"), params
  )
