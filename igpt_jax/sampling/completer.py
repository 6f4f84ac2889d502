"""Completing a person's own images: from files of any format to pixels, row by row.

What job `complete` and the page share. A model reads pixels in raster order, so what is given is
always the upper rows: it can't condition on a lower or a left part.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from igpt_jax import checkpoint
from igpt_jax.config.fields import Settings
from igpt_jax.data import own_images, transforms
from igpt_jax.errors import UserError
from igpt_jax.model.decoding import autoregressive
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.parallel import sharding
from igpt_jax.workspace import weights

_PROGRAMS = 24  # compiled ones that are kept: one for a shape and a way of drawing


@dataclasses.dataclass(frozen=True)
class InputImage:
  """A person's image as the model sees it.

  Attributes:
    name: what to call it.
    tokens: int32 [n_positions]; [0] where there is no image, for unconditional samples.
    stream: taken for its identity, if not None.
  """

  name: str
  tokens: np.ndarray
  stream: int | None = None

  @property
  def identity(self) -> int:
    """32 bits of what is in it, whatever it is called: with a seed, where its samples begin."""
    if self.stream is not None:
      return self.stream
    digest = hashlib.sha256(self.tokens.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:4], "little")


NOTHING = InputImage("unconditional", np.zeros(0, np.int32))


class PartialSamples(NamedTuple):
  """Completions up to a pixel, an image's own ones side by side.

  Attributes:
    tokens: int32 [N, n_positions]; 0 from `position` on.
    nll: float32 [N, n_positions], nats per token under the model itself; 0 at given pixels.
    position: how many pixels are there.
  """

  tokens: np.ndarray
  nll: np.ndarray
  position: int


class _Program(NamedTuple):
  """The two steps of drawing, compiled on first use for one shape and one way of drawing."""

  begin: jax.stages.Wrapped
  extend: dict  # holds the second step once the first has said where its result lies


def describe(settings: Settings, workdir: str, *, bert: bool = False) -> checkpoint.CheckpointInfo:
  """The checkpoint to complete with; its weights are not read yet.

  Raises:
    UserError: there is none, it has no palette, or it is a BERT model and `bert` isn't set.
  """
  info = weights.of_job(settings, workdir)
  weights.palette_of(info)
  if not info.config.causal and not bert:
    raise UserError(
      f"checkpoint: {info.path} is a BERT model, which has no left-to-right distribution to draw "
      "from; fix: a checkpoint of objective=autoregressive"
    )
  return info


class Reader:
  """Turns files into what a model sees, and tokens into what people see; needs no weights.

  Attributes:
    resolution: side of the model's images.
    palette: its colours.
  """

  def __init__(self, info: checkpoint.CheckpointInfo):
    self.resolution: int = info.run["resolution"]
    self.palette = weights.palette_of(info)
    data_config = info.run.get("config", {}).get("data", {})
    # What isn't ours was trained on the paper's crops.
    augment = data_config.get("augment", "paper")
    if augment == "paper" and self.resolution > transforms.PAPER_CROP:
      augment = "none"
    self._transform = transforms.eval_transform(augment, self.resolution)

  def read(self, data: bytes, name: str) -> InputImage:
    """An image as the model sees it, from a file of any format.

    Raises:
      BadRecord: it isn't one that can be read.
    """
    square = self.square(data, name)
    return InputImage(name, self.palette.encode(square).reshape(-1).astype(np.int32))

  def square(self, data: bytes, name: str) -> np.ndarray:
    """The centre square of an image, upright, scaled as in evaluation: uint8 [R, R, 3], sRGB.

    Raises:
      BadRecord: it isn't one that can be read.
    """
    return self._transform(own_images.read(data, name))

  def paint(self, tokens_BxT: np.ndarray) -> np.ndarray:
    """Tokens as uint8 [B, H, W, 3]."""
    return self.palette.decode(tokens_BxT).reshape(-1, self.resolution, self.resolution, 3)


class Completer:
  """One model, and the programs that draw with it.

  A sample is decided by the seed, what is in the image, how much of it is given and the sample's
  own number alone: not by the batch it is drawn in, nor by the image's name.

  Attributes:
    trained: the model.
    reader: of images for it.
  """

  def __init__(self, info: checkpoint.CheckpointInfo, settings: Settings, mesh: Mesh):
    """Reads the weights of what `describe` info onto the mesh."""
    sharding.check_model_fits(mesh, n_head=info.config.n_head, n_embd=info.config.n_embd)
    self.trained = weights.read_to_draw(settings, info, mesh)
    self.reader = Reader(info)
    self._mesh = mesh
    self._cache_dtype = settings.sample.cache
    self._programs: collections.OrderedDict[tuple, _Program] = collections.OrderedDict()
    self._fetch = jax.jit(lambda *arrays: arrays, out_shardings=sharding.replicated(mesh))

  def draw(
    self,
    images: Sequence[InputImage],
    numbers: ArrayLike,
    rows_given: int,
    sampling: SamplingConfig,
    *,
    seed: int,
    rows_at_a_time: int = 0,
  ) -> Iterator[PartialSamples]:
    """Samples of every image, as they grow; the last ones are whole.

    Args:
      images: to complete.
      numbers: of the samples of each, 0 and up: [n], or other ones for every image, [images, n].
      rows_given: upper rows of each that are kept; 0: none.
      sampling: how to draw.
      seed: of everything drawn.
      rows_at_a_time: rows between two results; 0: all of them in one.
    """
    n_given, n_positions = rows_given * self.reader.resolution, self.trained.config.n_positions
    n_pixels = rows_at_a_time * self.reader.resolution or n_positions - n_given
    n = np.shape(numbers)[-1]
    per_image, given = self._lay_out(images, n, n_given)
    keys = sample_keys(images, numbers, len(given) * per_image, seed)
    program = self._program(given.shape, per_image, n_pixels, sampling)
    with jax.set_mesh(self._mesh):
      progress = program.begin(self.trained.params, sharding.put_global(given, self._mesh), keys)
    del keys
    wanted = len(images) * n
    for position in range(n_given, n_positions, n_pixels):
      with jax.set_mesh(self._mesh):
        progress = self._extend(program, progress, n_pixels, sampling)
        # Copies: the next step is given the arrays to write into.
        tokens, nll = jax.device_get(self._fetch(progress.tokens, progress.nll))
      end = min(position + n_pixels, n_positions)
      yield PartialSamples(np.array(tokens[:wanted]), np.array(nll[:wanted]), end)

  def _lay_out(self, images, n: int, n_given: int) -> tuple[int, np.ndarray]:
    """Samples that share an image's prefill, and given pixels [B, P].

    Where there are fewer images than devices, some are read more than once.
    """
    shards = sharding.batch_shards(self._mesh)
    shared = max(
      (
        size
        for size in range(1, n + 1)
        if n % size == 0 and len(images) * (n // size) % shards == 0
      ),
      default=1,
    )
    given = np.stack([image.tokens[:n_given] for image in images]).astype(np.int32)
    given = np.repeat(given, n // shared, axis=0)
    padded = sharding.round_up_batch(self._mesh, len(given))
    return shared, np.pad(given, ((0, padded - len(given)), (0, 0)))

  def _program(self, shape, per_image: int, n_pixels: int, sampling: SamplingConfig) -> _Program:
    """The newest few are kept; the rest make room."""
    key = shape, per_image, n_pixels, sampling
    if key not in self._programs:
      begin = jax.jit(
        functools.partial(
          autoregressive.begin,
          self.trained.config,
          samples_per_picture=per_image,
          cache_dtype=self._cache_dtype,
        )
      )
      self._programs[key] = _Program(begin, {})
      while len(self._programs) > _PROGRAMS:
        self._programs.popitem(last=False)
    self._programs.move_to_end(key)
    return self._programs[key]

  def _extend(self, program: _Program, progress, n_pixels: int, sampling: SamplingConfig):
    if not program.extend:
      config = self.trained.config

      def extend(params, progress):
        return autoregressive.extend(config, params, progress, n_pixels, sampling=sampling)

      # It goes round: what comes out lies where it came in, and one program serves all rows.
      where = jax.tree.map(lambda leaf: leaf.sharding, progress)
      program.extend["step"] = jax.jit(extend, donate_argnums=1, out_shardings=where)
    return program.extend["step"](self.trained.params, progress)


def sample_keys(
  images: Sequence[InputImage], numbers: ArrayLike, padded: int, seed: int
) -> jax.Array:
  """A PRNG key for each sample, decided by seed, image and number; `padded` in all."""
  identities = np.asarray([[image.identity] for image in images], np.uint32)
  pairs = np.broadcast_arrays(identities, np.asarray(numbers, np.uint32))
  of_samples = np.stack(pairs, -1).reshape(-1, 2)
  of_samples = np.pad(of_samples, ((0, padded - len(of_samples)), (0, 0)))
  return _keys(jax.random.key(seed), of_samples)


@jax.jit
def _keys(base: jax.Array, of_samples_Nx2: jax.Array) -> jax.Array:
  """A PRNG key for each (image's identity, sample's number), [N]."""

  def one(pair):
    return jax.random.fold_in(jax.random.fold_in(base, pair[0]), pair[1])

  return jax.vmap(one)(of_samples_Nx2)


def prompt_rows(keep: float, resolution: int) -> int:
  """Rows that are given, at least one and not all."""
  return min(max(round(keep * resolution), 1), resolution - 1)
