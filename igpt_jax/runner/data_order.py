"""The order of a run's training images."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from igpt_jax.data import pipeline
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import DataConfig, Split
from igpt_jax.parallel import sharding
from igpt_jax.workspace.rollbacks import order_seeds


class DataOrder:
  """The order of a run's training images, which is another one after each time it went back.

  Args:
    folder: of the run.
    split: that is trained on.
    batch_size: of a step.
    seed: of the config; of the order until the run goes back.
  """

  def __init__(self, folder: str, split: Split, *, batch_size: int, seed: int):
    self._split, self._batch_size = split, batch_size
    self._folder, self._seed = folder, seed

  def _seeds(self) -> list[int]:
    return order_seeds(self._folder, self._seed)

  def batches(
    self, step: int, config: DataConfig, palette: Palette | None, mesh: Mesh
  ) -> pipeline.Batches:
    """This host's share of the order's batches, from `step` on."""
    share, shares = sharding.input_share(mesh)
    return pipeline.train_batches(
      self._split,
      config,
      palette,
      batch_size=self._batch_size,
      seed=self._seeds()[-1],
      start_step=step,
      process_index=share,
      process_count=shares,
    )

  def position(self, step: int) -> dict[str, Any]:
    """What a checkpoint stores of the data."""
    return pipeline.position(
      self._split, batch_size=self._batch_size, seed=self._seeds()[-1], step=step
    )

  def check(self, step: int, run: Mapping[str, Any]) -> None:
    """Raises UserError when a checkpoint's run had other data; it may have had an earlier order."""
    saved = run["data"]
    if saved.get("seed") in self._seeds():
      saved = saved | {"seed": self._seeds()[-1]}
    pipeline.check_position(saved, self.position(step))
