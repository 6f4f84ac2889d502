"""The order of a run's training images."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from igpt_jax.data import pipeline
from igpt_jax.data.sources import DataConfig, Split
from igpt_jax.parallel import sharding
from igpt_jax.tokens import TokenSpec
from igpt_jax.workspace.rollbacks import order_seeds


class DataOrder:
  """Order of a run's training images; every return to an older checkpoint draws a new one.

  Args:
    folder: the run's folder.
    split: the training images.
    batch_size: images in a step.
    seed: the settings' seed, which is the order's until the run goes back.
  """

  def __init__(self, folder: str, split: Split, *, batch_size: int, seed: int):
    self._split, self._batch_size = split, batch_size
    self._folder, self._seed = folder, seed

  def _seeds(self) -> list[int]:
    return order_seeds(self._folder, self._seed)

  def batches(self, step: int, config: DataConfig, spec: TokenSpec, mesh: Mesh) -> pipeline.Batches:
    """Returns this host's share of the batches, from `step` on."""
    share, shares = sharding.input_share(mesh)
    return pipeline.train_batches(
      self._split,
      config,
      spec,
      batch_size=self._batch_size,
      seed=self._seeds()[-1],
      start_step=step,
      process_index=share,
      process_count=shares,
    )

  def position(self, step: int) -> dict[str, Any]:
    """Returns what a checkpoint stores of the data."""
    seed = self._seeds()[-1]
    return pipeline.position(self._split, batch_size=self._batch_size, seed=seed, step=step)

  def check(self, step: int, run: Mapping[str, Any]) -> None:
    """Raises UserError if a checkpoint's run had other data; an earlier order is allowed."""
    saved = run["data"]
    if saved.get("seed") in self._seeds():
      saved = saved | {"seed": self._seeds()[-1]}
    pipeline.check_position(saved, self.position(step))
