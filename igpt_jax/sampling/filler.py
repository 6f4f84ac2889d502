"""Filling of any region of an image by a BERT model, for job `complete` and the page.

A model that reads in raster order can't condition on what lies below or to the right. A BERT model can:
it unmasks the region in passes, most confident pixels first.
"""

import functools
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.config.fields import Settings
from igpt_jax.data.image_decoding import BadRecord
from igpt_jax.errors import UserError
from igpt_jax.model.decoding import masked
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.parallel import sharding
from igpt_jax.sampling import completer
from igpt_jax.sampling.completer import InputImage, PartialSamples, Reader, prompt_rows
from igpt_jax.workspace import weights

REGIONS = ("lower", "upper", "left", "right", "centre")


def known_pixels(settings: Settings, info: checkpoint.CheckpointInfo) -> np.ndarray:
  """Mask of given pixels, bool [H, W], from `config.complete.hide` and `keep`.

  Raises:
    UserError: an unknown region, a mask that can't be read or hides nothing or all, or a region that
      the model can't condition on.
  """
  hide, side = settings.complete.hide, info.run["resolution"]
  if info.config.causal and hide != "lower":
    raise UserError(
      f"config.complete.hide: {hide}; the checkpoint {info.path} draws pixels from those before them in raster "
      "order, and can't condition on what lies below or to the right; expected lower; fix: "
      "--config.complete.hide=lower, or a BERT checkpoint (objective=masked)"
    )
  given = prompt_rows(settings.complete.keep, side)
  known = np.ones((side, side), bool)
  if hide == "lower":
    known[given:] = False
  elif hide == "upper":
    known[: side - given] = False
  elif hide == "left":
    known[:, : side - given] = False
  elif hide == "right":
    known[:, given:] = False
  elif hide == "centre":
    # The hidden share is 1 - keep, as in the other regions.
    width = min(max(round(side * (1 - settings.complete.keep) ** 0.5), 1), side - 1)
    first = (side - width) // 2
    known[first : first + width, first : first + width] = False
  else:
    known = _mask(hide, Reader(info))
  return known


def _mask(path: str, reader: Reader) -> np.ndarray:
  """Reads a mask from an image: bool [R, R], True where its centre square is dark."""
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise UserError(
      f"config.complete.hide: {path!r}; expected one of {', '.join(REGIONS)}, or an image that is white where "
      "the others are to be hidden"
    )
  try:
    with open(path, "rb") as file:
      square = reader.square(file.read(), path)
  except OSError as error:
    raise UserError(f"config.complete.hide: {path}: {error.strerror}; expected an image") from None
  except BadRecord as error:
    raise UserError(f"config.complete.hide: {error}; expected an image") from None
  known = np.asarray(Image.fromarray(square).convert("L")) < 128
  if known.all() or not known.any():
    side = reader.resolution
    raise UserError(
      f"config.complete.hide: {path} is {'dark' if known.all() else 'light'} all over at {side}×{side}; expected white "
      "(or transparent) where images are to be hidden, and black elsewhere"
    )
  return known


class Filler:
  """Draws completions with a BERT model, with `Completer`'s interface: a mask instead of rows.

  Attributes:
    trained: the model.
    reader: converts images to its tokens and back.
  """

  def __init__(self, info: checkpoint.CheckpointInfo, settings: Settings, mesh: Mesh):
    sharding.check_model_fits(mesh, n_head=info.config.n_head, n_embd=info.config.n_embd)
    self.trained = weights.read_to_draw(settings, info, mesh)
    self.reader = Reader(info)
    self._mesh = mesh
    self._passes = settings.complete.passes
    alike, batch = sharding.replicated(mesh), sharding.sharding(mesh, "batch")
    # Results keep the inputs' sharding, so that one program serves all passes.
    where = masked.Filling._make([alike, *[batch] * 4])
    self._begin = jax.jit(masked.begin, out_shardings=where)
    extend = functools.partial(masked.extend, self.trained.config)
    self._extend = jax.jit(extend, out_shardings=where)
    self._fetch = jax.jit(lambda *arrays: arrays, out_shardings=alike)

  def draw(
    self,
    images: Sequence[InputImage],
    numbers: Sequence[int],
    known_HxW: np.ndarray,
    sampling: SamplingConfig,
    *,
    seed: int,
    passes: int = 0,
    watched: bool = False,
  ) -> Iterator[PartialSamples]:
    """Yields samples of all images; the last result is complete.

    Args:
      images, numbers, sampling, seed: those of `Completer.draw`.
      known_HxW: True where pixels are given; without an image none are.
      passes: passes over the image; 0: those of the settings.
      watched: True yields a result after every pass, drawn by programs that serve any region, number
        of passes, `sampling`, and number of samples up to a `bucket`. False yields one result.
    """
    passes = passes or self._passes
    n_positions, wanted = self.trained.config.n_positions, len(images) * len(numbers)
    padded = completer.bucket(wanted) if watched else wanted
    padded = sharding.round_up_batch(self._mesh, padded)
    tokens = np.zeros((padded, *self.reader.spec.shape(n_positions)), np.int32)
    known = np.zeros((padded, n_positions), bool)
    for i, image in enumerate(images):
      rows = slice(i * len(numbers), (i + 1) * len(numbers))
      if len(image.tokens):
        tokens[rows], known[rows] = image.tokens, self.reader.spec.of_pixels(known_HxW)
    known[wanted:] = True  # padding: nothing to draw
    keys = completer.sample_keys(images, numbers, padded, seed)
    values = sampling.values(truncates=watched or None)
    with jax.set_mesh(self._mesh):
      filling = self._begin(*(sharding.put_global(each, self._mesh) for each in (tokens, known)))
    settled = known
    while not settled.all():
      with jax.set_mesh(self._mesh):
        filling = self._extend(
          self.trained.params,
          filling,
          keys,
          1 if watched else passes,
          steps=passes,
          sampling=values,
        )
        results = self._fetch(filling.tokens, filling.nll, filling.settled)
        tokens, nll, settled = map(np.array, jax.device_get(results))
      yield PartialSamples(tokens[:wanted], nll[:wanted], settled[:wanted])


def open_model(
  info: checkpoint.CheckpointInfo, settings: Settings, mesh: Mesh
) -> completer.Completer | Filler:
  """Reads the weights of a checkpoint onto the mesh; returns what draws with such a model."""
  return (completer.Completer if info.config.causal else Filler)(info, settings, mesh)


def draw(
  model: completer.Completer | Filler,
  images: Sequence[InputImage],
  numbers: Sequence[int],
  known_HxW: np.ndarray,
  sampling: SamplingConfig,
  *,
  seed: int,
  passes: int = 0,
  watched: bool = False,
) -> Iterator[PartialSamples]:
  """Yields samples by a model of either kind; `known_HxW` has the upper rows, if it is autoregressive.

  The other arguments are those of `Filler.draw`.
  """
  common = {"seed": seed, "watched": watched}
  if isinstance(model, Filler):
    return model.draw(images, numbers, known_HxW, sampling, passes=passes, **common)
  return model.draw(images, numbers, int(known_HxW[:, 0].sum()), sampling, **common)
