"""CompleteP: initial values and learning rates under which one rate serves every width and depth.

Dey et al. 2025, "Don't be lazy: CompleteP enables compute-efficient deep transformers" (arXiv 2505.01618,
table 1, α = 1), on the maximal update parametrisation of Yang et al. 2022 ("Tensor Programs V", arXiv
2203.03466). m is the ratio of the width to the base shape's, l that of the depth. There, hidden matrices
begin with a variance of 1/m of the base's and learn at 1/m of the rate; what a block adds to the stream
is multiplied by 1/l, and the logits by 1/m; Adam's ε is 1/m of the base's, in blocks 1/(m·l).

Here the forward pass has no multipliers: they are folded into the weights, so that kernels, decoding and
exports know nothing of it. A weight W that is used as cW has the gradient c·g, where g is that of
V = cW. Adam's update doesn't depend on its gradient's size but for ε:

  ΔV = c·ΔW = −c·η·(c·m)/(c·√v + ε) = −(c·η)·m/(√v + ε/c),

so V trains with c times W's initial value and rate, and ε/c. Hence the output table learns at 1/m with
Adam's own ε, and the matrices that write to the stream take another 1/l in initial value and rate, with
ε/m. Muon's updates don't depend on the gradient's size at all: its initial values and 1/l are the same.
Its dependence on the width is another. An update should have a spectral norm that stays the same as the
width grows, both sides of a matrix with it (Yang, Simon and Bernstein 2023, arXiv 2310.17813); Adam's,
of n × n entries of one size that are alike in all rows, has n times that size. Muon's update is orthogonal times
0.2·√(longer side), so its spectral norm grows as √m, and its rate is 1/√m of the base's.

At the base shape everything is the released model's. Of its initial values (model/image_gpt.py) those
of q, k, v fall with the width by themselves, and attention's output, 1/√(D·layers), with the width and as
1/√l: that takes a factor of 1/√l more. The MLP's 0.02 is a number of the base shape.

Heads must keep their size (n_head grows with n_embd): their 1/√(head size) isn't changed. Decay per step
is the same for all (CompleteP multiplies λ by m where it divides η by it).
"""

import dataclasses
import math
from typing import Any

import jax

from igpt_jax.errors import UserError

PARAMETRISATIONS = ("standard", "complete_p")


@dataclasses.dataclass(frozen=True)
class Scale:
  """Ratios of a model's shape to the base shape; 1 and 1 are the standard parametrisation.

  Attributes:
    width, depth: m and l.
  """

  width: float = 1.0
  depth: float = 1.0


STANDARD = Scale()


@dataclasses.dataclass(frozen=True)
class Multipliers:
  """Factors of one parameter.

  Attributes:
    initial: of its released initial value at the model's own shape.
    adam, muon: of the learning rate, if that optimizer updates it.
    epsilon: of Adam's ε.
  """

  initial: float = 1.0
  adam: float = 1.0
  muon: float = 1.0
  epsilon: float = 1.0


def scale_of(
  parametrisation: str, *, n_embd: int, n_layer: int, base_embd: int, base_layer: int
) -> Scale:
  """Returns the scale of a model of this shape.

  Raises:
    UserError: there is no such parametrisation, or a base shape is missing, or of no use.
  """
  if parametrisation not in PARAMETRISATIONS:
    raise UserError(
      f"model.parametrisation: {parametrisation!r}; expected one of {', '.join(PARAMETRISATIONS)}"
    )
  bases = {"base_embd": base_embd, "base_layer": base_layer}
  for name, value in bases.items():
    if parametrisation == "complete_p" and value < 1:
      raise UserError(
        f"model.{name}: {value}; expected the {name.replace('base', 'model.n')} at which the learning rate "
        "was tuned, for model.parametrisation=complete_p"
      )
    if parametrisation == "standard" and value:
      raise UserError(
        f"model.{name}: {value}; expected 0 with the standard parametrisation; "
        "fix: --config.model.parametrisation=complete_p"
      )
  if parametrisation == "standard":
    return STANDARD
  return Scale(n_embd / base_embd, n_layer / base_layer)


def names(path) -> tuple[str, ...]:
  """Returns the keys of a path of jax.tree_util, ("blocks", "attn", "qkv")."""
  return tuple(getattr(entry, "key", "") for entry in path)


def multipliers(parameter: tuple[str, ...], scale: Scale) -> Multipliers:
  """Returns the factors of a parameter, named by its keys; `scale`: the model's."""
  m, l = scale.width, scale.depth  # noqa: E741 - as above
  root = math.sqrt(m)
  match parameter:
    case ("wtet",) | ("clf",):  # begin at 0; read from a norm's output
      return Multipliers(adam=1 / m)
    case ("heads", "hidden"):
      return Multipliers(adam=1 / m, muon=1 / root, epsilon=1 / m)
    case ("blocks", "attn", "qkv"):
      return Multipliers(adam=1 / m, muon=1 / root, epsilon=1 / (m * l))
    case ("blocks", "mlp", "fc"):
      return Multipliers(1 / root, 1 / m, 1 / root, 1 / (m * l))
    case ("blocks", "attn", "proj"):
      return Multipliers(1 / math.sqrt(l), 1 / (m * l), 1 / (root * l), 1 / m)
    case ("blocks", "mlp", "proj"):
      return Multipliers(1 / (root * l), 1 / (m * l), 1 / (root * l), 1 / m)
    case ("blocks", "x0", *_):  # a gain of the embeddings that every block adds to the stream
      return Multipliers(adam=1 / l, epsilon=1 / m)
    case ("blocks", *_):
      return Multipliers(epsilon=1 / (m * l))
  return Multipliers(epsilon=1 / m)


def initialised(params: dict[str, Any], scale: Scale) -> dict[str, Any]:
  """Returns the initial values of a model, from the released ones for its shape."""
  if scale == STANDARD:
    return params
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * multipliers(names(path), scale).initial, params
  )
