"""The checkpoints that a page offers. Their weights are read when they are first asked for."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from igpt_jax import checkpoint
from igpt_jax.config.fields import PaletteConfig, Settings
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.workspace import devices

_SAMPLES = 4  # that the page asks for, if one doesn't say


@dataclasses.dataclass
class _Offered:
  name: str
  info: checkpoint.CheckpointInfo
  completer: completer_lib.Completer | None = None


class Models:
  """What there is to choose from, by number.

  One thread at a time may ask for a completer.
  """

  def __init__(self, paths: Sequence[str], palette_path: str = "", mesh: Mesh | None = None):
    """Opens the checkpoints, but for their weights.

    Args:
      paths: of checkpoints of any format.
      palette_path: of those that carry no palette.
      mesh: where they go; None: all of this machine's devices.

    Raises:
      UserError: one can't be read, can't complete images, or has no palette.
    """
    self._settings = Settings(palette=PaletteConfig(path=palette_path))
    devices.use_cores(self._settings)
    self._offered: list[_Offered] = []
    for path in paths:
      if not path:
        raise UserError("--checkpoint: empty; expected a workdir, or one checkpoint in it")
      info = completer_lib.describe(dataclasses.replace(self._settings, checkpoint=path), "")
      self._offered.append(_Offered(_name_of(info), info))
    largest = max((each.info.config for each in self._offered), key=count_params)
    self._mesh = mesh or devices.sampling_mesh(self._settings, largest, _SAMPLES)

  def __len__(self) -> int:
    return len(self._offered)

  def describe(self) -> list[dict[str, Any]]:
    """The models as the page shows them; their paths stay here."""
    return [
      {
        "name": each.name,
        "resolution": each.info.run["resolution"],
        "parameters": count_params(each.info.config),
        "step": each.info.step,
      }
      for each in self._offered
    ]

  def completer(self, index: int) -> completer_lib.Completer:
    """The model of that number, its weights read."""
    offered = self._offered[index]
    if offered.completer is None:
      offered.completer = completer_lib.Completer(offered.info, self._settings, self._mesh)
    return offered.completer


def _name_of(info: checkpoint.CheckpointInfo) -> str:
  """The run's name; that of its folder."""
  parts = os.path.normpath(info.path).split(os.sep)
  if len(parts) > 2 and parts[-2] == checkpoint.FOLDER:
    return parts[-3]
  return parts[-2] if info.format == "openai" and len(parts) > 1 else parts[-1]
