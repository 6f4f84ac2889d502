"""The checkpoints that the page offers. Weights are read on first use."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from igpt_jax import checkpoint
from igpt_jax.config.fields import Settings
from igpt_jax.config.run_fields import PaletteConfig
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.workspace import devices

_SAMPLES = 4  # the page's default


@dataclasses.dataclass
class _Offered:
  name: str
  info: checkpoint.CheckpointInfo
  completer: completer_lib.Completer | None = None


class Models:
  """The offered models, by index. `completer` isn't thread-safe."""

  def __init__(self, paths: Sequence[str], palette_path: str = "", mesh: Mesh | None = None):
    """Opens the checkpoints without reading their weights.

    Args:
      paths: checkpoints of any format.
      palette_path: palette for checkpoints that carry none.
      mesh: mesh to put the weights on; None: all of this machine's devices.

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
    largest = max((offered.info.config for offered in self._offered), key=count_params)
    self._mesh = mesh or devices.sampling_mesh(self._settings, largest, _SAMPLES)

  def __len__(self) -> int:
    return len(self._offered)

  def describe(self) -> list[dict[str, Any]]:
    """Returns the models as the page shows them, without their paths."""
    return [
      {
        "name": offered.name,
        "resolution": offered.info.run["resolution"],
        "parameters": count_params(offered.info.config),
        "step": offered.info.step,
      }
      for offered in self._offered
    ]

  def completer(self, index: int) -> completer_lib.Completer:
    """Returns the model at an index, after reading its weights on first use."""
    offered = self._offered[index]
    if offered.completer is None:
      offered.completer = completer_lib.Completer(offered.info, self._settings, self._mesh)
    return offered.completer


def _name_of(info: checkpoint.CheckpointInfo) -> str:
  """Returns the name of the run's folder, or a model's name on the hub."""
  if info.format == "huggingface" and "hub" in info.run:
    return info.run["hub"].partition("@")[0]
  parts = os.path.normpath(info.path).split(os.sep)
  if len(parts) > 2 and parts[-2] == checkpoint.FOLDER:
    return parts[-3]
  return parts[-2] if info.format == "openai" and len(parts) > 1 else parts[-1]
