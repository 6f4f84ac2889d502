"""How fast each shape trains on this machine, by which the time of a study is forecast."""

import math

import numpy as np
from jax.sharding import Mesh

from igpt_jax.isoflop.ladder import Costs, Shape
from igpt_jax.workspace import sizing


class Speeds:
  """FLOP/s of training each shape: measured of some, between those by ln N, beyond them as the nearest.

  Args:
    costs: parameters and FLOPs of each shape.
  """

  def __init__(self, costs: Costs):
    self._costs, self._known = costs, dict[int, float]()

  def note(self, shape: Shape, step_seconds: float) -> None:
    """Notes the time of a shape's training step; nan: unknown."""
    if not math.isnan(step_seconds):
      self._known[self._costs.size(shape)] = self._costs.flops_per_step(shape) / step_seconds

  def measure(self, shapes: tuple[Shape, Shape], mesh: Mesh | None) -> None:
    """Times some steps of both shapes, unless two are known already. Collective."""
    if len(self._known) < 2:
      for shape in shapes:
        settings = self._costs.settings(shape, 1, 0)
        self.note(shape, sizing.step_seconds(settings, self._costs.model(shape), mesh))

  def seconds(self, shape: Shape, flops: float) -> float:
    """Returns the time of training a shape with so many FLOPs."""
    sizes = sorted(self._known)
    speeds = [math.log(self._known[size]) for size in sizes]
    return flops / math.exp(np.interp(math.log(self._costs.size(shape)), np.log(sizes), speeds))

  def range(self) -> tuple[float, float]:
    """Returns the slowest and the fastest FLOP/s that were measured."""
    return min(self._known.values()), max(self._known.values())
