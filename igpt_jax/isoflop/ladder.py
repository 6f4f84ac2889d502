"""One ladder of shapes for all budgets, and what a training step of each costs with a study's settings.

Each rung has about 1.6 times the parameters of the one below, 5 to 12 times as many channels as layers, and
two heads or more: of 4 to 28 channels, from width 128 on of 32, at the top of 44 to 64. A single head can't look
left and up at once; shapes of one head lay 0.03 to 0.05 nats above the surface that shapes of two lay on
(docs/results.md). It is a table, not a formula: a rung must stay what it is, for budgets to share trunks and for
studies to be compared.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from igpt_jax.config import choices
from igpt_jax.config.fields import Settings, with_values
from igpt_jax.config.job_fields import IsoflopConfig
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import abstract_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.model.parametrisation import names
from igpt_jax.training import compilation

# Parameters that are looked up, or that only the first and the last layer have for each colour or position.
_TABLES = {"wte", "wtet", "wpe", "wpe_row", "wpe_column", "wpe_channel", "value_embed", "seen"}
_DEGREE = 3  # of the polynomial in ln N through the logarithms of FLOPs for each parameter


@dataclasses.dataclass(frozen=True)
class Shape:
  """A rung of the ladder."""

  n_layer: int
  n_head: int
  n_embd: int

  @property
  def name(self) -> str:
    """Layers × width, "4x28"."""
    return f"{self.n_layer}x{self.n_embd}"


LADDER = (
  Shape(2, 3, 12),
  Shape(2, 2, 16),
  Shape(3, 2, 16),
  Shape(2, 2, 24),
  Shape(3, 2, 24),
  Shape(3, 2, 32),
  Shape(5, 2, 32),
  Shape(5, 2, 40),
  Shape(6, 3, 48),
  Shape(7, 2, 56),
  Shape(8, 4, 64),
  Shape(8, 5, 80),
  Shape(12, 5, 80),
  Shape(14, 6, 96),
  Shape(16, 7, 112),
  Shape(20, 4, 128),
  Shape(20, 5, 160),
  Shape(22, 6, 192),
  Shape(26, 7, 224),
  Shape(32, 8, 256),
  Shape(40, 9, 288),
  Shape(44, 8, 352),
  Shape(48, 9, 432),
  Shape(56, 8, 512),
)


def rungs(wanted: Sequence[str]) -> tuple[Shape, ...]:
  """Returns the shapes of these names, the smallest first; all of the ladder for none.

  Raises:
    UserError: the ladder has no such shape.
  """
  known = {shape.name: shape for shape in LADDER}
  if unknown := [name for name in wanted if name not in known]:
    raise UserError(
      f"config.isoflop.shapes: {unknown[0]!r}; expected shapes of the ladder, LAYERSxWIDTH: "
      f"{', '.join(known)}"
    )
  return tuple(shape for shape in LADDER if not wanted or shape.name in wanted)


class Costs:
  """Parameters and FLOPs of every shape with a study's settings.

  Args:
    settings: the study's.
    n_vocab: colours; of raw RGB levels.
  """

  def __init__(self, settings: Settings, n_vocab: int):
    train = settings.train
    self._settings = settings
    spec = choices.token_spec(settings)
    self.tokens_per_image = spec.n_positions(settings.data.resolution)
    self.tokens_per_step = train.batch_size * self.tokens_per_image
    optimizer = choices.optimizer_config(settings)
    self._models: dict[Shape, ImageGPTConfig] = {}
    self._parameters: dict[Shape, tuple[int, int]] = {}
    self._flops: dict[Shape, float] = {}
    for shape in LADDER:
      model = choices.model_config(self.settings(shape, train.steps, 0), n_vocab=n_vocab)
      self._models[shape], self._parameters[shape] = model, _counts(model)
      self._flops[shape] = compilation.flops_per_step(model, optimizer, train.batch_size)
    sizes = np.array([self.size(shape) for shape in LADDER], np.float64)
    costs = np.array([self._flops[shape] for shape in LADDER]) / self.tokens_per_step
    self._ends = np.log(sizes[[0, -1]])
    self._curve = np.polynomial.Polynomial.fit(np.log(sizes), np.log(costs / sizes), _DEGREE)

  def settings(self, shape: Shape, steps: int, seed: int) -> Settings:
    """Returns the settings of job pretrain for a run."""
    values = {f"model.{name}": value for name, value in dataclasses.asdict(shape).items()}
    own = with_values(self._settings, {**values, "train.steps": steps, "seed": seed})
    return dataclasses.replace(own, job="pretrain", isoflop=IsoflopConfig())

  def model(self, shape: Shape) -> ImageGPTConfig:
    return self._models[shape]

  def parameters(self, shape: Shape) -> tuple[int, int]:
    """Returns the number of parameters, and of those without the tables of colours and positions."""
    return self._parameters[shape]

  def size(self, shape: Shape) -> int:
    """Returns N: parameters without tables."""
    return self.parameters(shape)[1]

  def flops_per_step(self, shape: Shape) -> float:
    """Returns the FLOPs of an update: matrices, attention and head of the whole batch, and the optimizer's."""
    return self._flops[shape]

  def flops_per_token(self, n: np.ndarray) -> np.ndarray:
    """Returns the FLOPs of training on a token with a model of n parameters between the ladder's rungs.

    6·n and more for small models, whose attention and head count: a cubic in ln n through the logarithms of
    the rungs' FLOPs for each parameter, constant beyond the ladder's ends.
    """
    return n * np.exp(self._curve(np.clip(np.log(n), *self._ends)))


def _counts(model: ImageGPTConfig) -> tuple[int, int]:
  leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
  sizes = [(names(path)[-1], math.prod(leaf.shape)) for path, leaf in leaves]
  return sum(n for _, n in sizes), sum(n for name, n in sizes if name not in _TABLES)
