"""Adam with a linear warm-up and a cosine to zero, the paper's recipe (section 3.3); or Muon with it."""

import dataclasses

import jax
import optax

from igpt_jax.errors import UserError
from igpt_jax.training import muon

OPTIMIZERS = ("adam", "muon")
SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam's settings. The paper clips nothing and decays nothing; its β₂ of 0.95 avoids spikes.

  Attributes:
    learning_rate: peak.
    steps: length of the whole schedule, warm-up included.
    warmup_steps: length of a linear warm-up from 0; the paper takes one epoch.
    schedule: "cosine" (to 0 at `steps`) or "constant" after the warm-up.
    b1, b2, eps: Adam's.
    weight_decay: decoupled, on matrices only; 0 in the paper.
    clip_norm: global gradient norm to clip to; 0 for no clipping.
    optimizer: "adam", or "muon": the blocks' matrices by Muon, all else by Adam.
  """

  learning_rate: float
  steps: int
  warmup_steps: int = 0
  schedule: str = "cosine"
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 0.0
  optimizer: str = "adam"

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
    if not self.learning_rate > 0:
      raise UserError(f"train.learning_rate: {self.learning_rate}; expected a positive number")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f"train.{name}: {getattr(self, name)}; expected a number in [0, 1)")
    for name in ("weight_decay", "clip_norm"):
      if not getattr(self, name) >= 0:
        raise UserError(f"train.{name}: {getattr(self, name)}; expected 0 or more")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """Returns the function from step to learning rate."""
  after = max(config.steps - config.warmup_steps, 1)
  main = optax.constant_schedule(config.learning_rate)
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(config.learning_rate, after)
  if not config.warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
  return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  scaled = optax.scale_by_adam(config.b1, config.b2, config.eps)
  if config.optimizer == "muon":
    scaled = optax.partition({"muon": muon.scale_by_muon(), "adam": scaled}, _optimizer_of)
  parts.append(scaled)
  if config.weight_decay:
    # Gains, and everything else that isn't a matrix per layer, don't decay.
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=_is_matrix))
  parts.append(optax.scale_by_learning_rate(make_schedule(config)))
  return optax.chain(*parts)


def _optimizer_of(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "muon" if muon.is_muons(path) else "adam", params
  )


def _is_matrix(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.ndim >= 2 and path[-1] != jax.tree_util.DictKey("g"), params
  )
