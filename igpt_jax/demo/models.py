"""The checkpoints that the page offers, and the programs that draw from them."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from igpt_jax import checkpoint
from igpt_jax.config.fields import Settings
from igpt_jax.config.run_fields import PaletteConfig
from igpt_jax.errors import UserError
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.model.image_gpt import count_params
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.sampling import filler
from igpt_jax.sampling.completer import Completer, InputImage, Reader
from igpt_jax.sampling.filler import Filler
from igpt_jax.workspace import devices

_SAMPLES = 4  # the page's default


@dataclasses.dataclass
class _Offered:
  name: str
  info: checkpoint.CheckpointInfo
  reader: Reader
  completer: Completer | Filler | None = None


class Models:
  """The offered models, by index. `completer` isn't thread-safe."""

  def __init__(self, paths: Sequence[str], palette_path: str = "", mesh: Mesh | None = None):
    """Opens the checkpoints without reading their weights.

    Args:
      paths: checkpoints of any format.
      palette_path: palette for checkpoints that carry none.
      mesh: mesh to put the weights on; None: all of this machine's devices.

    Raises:
      UserError: one can't be read, or has no palette.
    """
    self._settings = Settings(palette=PaletteConfig(path=palette_path))
    devices.use_cores(self._settings)
    self._offered: list[_Offered] = []
    self._kept = 0  # programs of each model that are compiled in advance
    for path in paths:
      if not path:
        raise UserError("--checkpoint: empty; expected a workdir, or one checkpoint in it")
      settings = dataclasses.replace(self._settings, checkpoint=path)
      info = completer_lib.describe(settings, "", bert=True)
      self._offered.append(_Offered(_name_of(info), info, Reader(info)))
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
        "any_region": self.any_region(index),
      }
      for index, offered in enumerate(self._offered)
    ]

  def name(self, index: int) -> str:
    return self._offered[index].name

  def reader(self, index: int) -> Reader:
    """Returns the reader of a model's images, which needs no weights."""
    return self._offered[index].reader

  def any_region(self, index: int) -> bool:
    """True for a BERT model, which can fill any region; others only continue upper rows."""
    return not self._offered[index].info.config.causal

  def completer(self, index: int) -> Completer | Filler:
    """Returns the model at an index, after reading its weights on first use."""
    offered = self._offered[index]
    if offered.completer is None:
      offered.completer = filler.open_model(offered.info, self._settings, self._mesh)
    if isinstance(offered.completer, Completer):
      offered.completer.keep_programs(self._kept)
    return offered.completer

  def programs(self, most_samples: int) -> list[tuple[int, int]]:
    """Returns the models and numbers of samples that each need a program, the page's defaults first."""
    sizes = {completer_lib.bucket(n) for n in range(1, most_samples + 1)}
    default = completer_lib.bucket(min(_SAMPLES, most_samples))
    self._kept = len(sizes)
    ordered = sorted(sizes, key=lambda size: (size != default, size))
    return [(index, size) for size in ordered for index in range(len(self))]

  def compile(self, index: int, samples: int) -> None:
    """Compiles the programs that draw up to so many samples, by drawing a part of them."""
    reader = self.reader(index)
    shape = reader.spec.shape(reader.positions(reader.resolution))
    image = InputImage("", np.zeros(shape, np.int32))
    known = np.ones((reader.resolution, reader.resolution), bool)
    known[-1] = False
    for _ in self.draw(index, image, samples, known, SamplingConfig(), seed=0, passes=1):
      pass

  def draw(
    self,
    index: int,
    image: InputImage,
    samples: int,
    known_HxW: np.ndarray,
    sampling: SamplingConfig,
    *,
    seed: int,
    passes: int,
  ) -> Iterator[completer_lib.PartialSamples]:
    """Yields samples of an image as they are drawn, row by row or pass by pass.

    Args:
      index: the model.
      image, sampling, seed: as in `Completer.draw`.
      samples: their number.
      known_HxW: True where the image is given: upper rows, or for a BERT model any pixels.
      passes: of a BERT model.
    """
    drawer, numbers = self.completer(index), range(samples)
    return filler.draw(
      drawer, [image], numbers, known_HxW, sampling, seed=seed, passes=passes, watched=True
    )


def _name_of(info: checkpoint.CheckpointInfo) -> str:
  """Returns the name of the run's folder, a model's name on the hub, or that of its one file."""
  if info.format == "huggingface" and "hub" in info.run:
    return info.run["hub"].partition("@")[0]
  path = os.path.splitext(info.path)[0] if info.format == "safetensors" else info.path
  parts = os.path.normpath(path).split(os.sep)
  if len(parts) > 2 and parts[-2] == checkpoint.FOLDER:
    return parts[-3]
  return parts[-2] if info.format == "openai" and len(parts) > 1 else parts[-1]
