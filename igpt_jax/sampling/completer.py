"""Completion of images after their upper rows: from files of any format to pixels, row by row.

Used by job `complete` and the page. An autoregressive model reads pixels in raster order, so the prompt
is always the upper rows: it can't condition on a lower or a left part.
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
from igpt_jax.model.decoding.autoregressive import SamplingConfig, SamplingValues
from igpt_jax.parallel import sharding
from igpt_jax.workspace import checkpoint_tokens, weights

_PROGRAMS = 24  # compiled programs that are kept; there is one per shape
_BUCKETS = (1, 4, 8, 16)  # rows that one program computes, where any number may be wanted


@dataclasses.dataclass(frozen=True)
class InputImage:
  """An image as tokens of the model."""

  name: str
  tokens: np.ndarray  # int32 [n_positions], or [n_positions, codes]; [0] for unconditional samples
  stream: int | None = None  # used as identity, if not None

  @property
  def identity(self) -> int:
    """32-bit digest of the tokens; with the seed it determines the image's samples."""
    if self.stream is not None:
      return self.stream
    digest = hashlib.sha256(self.tokens.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:4], "little")


NOTHING = InputImage("unconditional", np.zeros(0, np.int32))


class PartialSamples(NamedTuple):
  """Samples drawn in part or whole; those of one image are consecutive."""

  tokens: np.ndarray  # int32 [N, n_positions, …] as in InputImage; 0 where nothing is drawn yet
  nll: np.ndarray  # float32 [N, n_positions], nats per token under the model; 0 at given pixels
  settled: np.ndarray  # bool [N, n_positions], True where a token is given or drawn


class _Program(NamedTuple):
  """The two steps of drawing, compiled on first use for one shape."""

  begin: jax.stages.Wrapped
  extend: dict  # "step": added once the sharding of the first step's result is known


def describe(settings: Settings, workdir: str, *, bert: bool = False) -> checkpoint.CheckpointInfo:
  """Describes the checkpoint to complete with, without reading its weights.

  Raises:
    UserError: there is none, it has no palette and needs one, or it is a BERT model and `bert` isn't set.
  """
  info = weights.of_job(settings, workdir)
  checkpoint_tokens.check_tokens_known(info)
  if not bert:
    check_causal(info)
  return info


def check_causal(info: checkpoint.CheckpointInfo) -> None:
  """Raises UserError if it is a BERT model."""
  if not info.config.causal:
    raise UserError(
      f"checkpoint: {info.path} is a BERT model, which has no left-to-right distribution to draw "
      "from; fix: a checkpoint of objective=autoregressive"
    )


class Reader:
  """Converts files to a model's tokens, and tokens to images; needs no weights.

  Attributes:
    resolution: height and width of the model's images.
    spec: the model's tokens, with the colours of a palette.
  """

  def __init__(self, info: checkpoint.CheckpointInfo):
    self.resolution: int = info.run["resolution"]
    self.spec = checkpoint_tokens.tokens_of(info)
    data_config = info.run.get("config", {}).get("data", {})
    # Checkpoints without a config are released ones, trained on the paper's crops.
    augment = data_config.get("augment", "paper")
    if augment == "paper" and self.resolution > transforms.PAPER_CROP:
      augment = "none"
    self._transform = transforms.eval_transform(augment, self.resolution)

  def read(self, data: bytes, name: str) -> InputImage:
    """Converts the content of a file of any image format to tokens.

    Raises:
      BadRecord: it isn't an image that can be read.
    """
    return InputImage(name, self.tokens(self.square(data, name)[None])[0])

  def square(self, data: bytes, name: str) -> np.ndarray:
    """Returns the centre square of an image, upright, scaled as in evaluation: uint8 [R, R, 3], sRGB.

    Raises:
      BadRecord: it isn't an image that can be read.
    """
    return self.fit(own_images.read(data, name))

  def fit(self, image: np.ndarray) -> np.ndarray:
    """Returns the centre square of uint8 [H, W, 3], scaled as in evaluation: uint8 [R, R, 3]."""
    return self._transform(image)

  def tokens(self, squares_BxRxRx3: np.ndarray) -> np.ndarray:
    """Converts images of the model's size to tokens, int32 [B, n_positions] or [B, n_positions, codes]."""
    return self.spec.encode(squares_BxRxRx3).astype(np.int32)

  def paint(self, tokens: np.ndarray) -> np.ndarray:
    """Converts tokens of images to images uint8 [B, H, W, 3]."""
    return self.spec.decode(tokens)

  def positions(self, rows: int) -> int:
    """Returns the number of positions of so many upper rows."""
    return rows * self.resolution * self.spec.per_pixel


class Completer:
  """Draws completions with an autoregressive model.

  A sample is determined by the seed, the image's tokens, the number of given rows and the sample's
  number: not by the batch it is drawn in, nor by the image's name.

  Attributes:
    trained: the model.
    reader: converts images to its tokens and back.
  """

  def __init__(self, info: checkpoint.CheckpointInfo, settings: Settings, mesh: Mesh):
    """Reads the weights of a checkpoint that `describe` returned onto the mesh."""
    sharding.check_model_fits(mesh, n_head=info.config.n_head, n_embd=info.config.n_embd)
    self.trained = weights.read_to_draw(settings, info, mesh)
    self.reader = Reader(info)
    self._mesh = mesh
    self._cache_dtype = settings.sample.cache
    self._programs: collections.OrderedDict[tuple, _Program] = collections.OrderedDict()
    self._n_kept = _PROGRAMS
    self._fetch = jax.jit(lambda *arrays: arrays, out_shardings=sharding.replicated(mesh))

  def draw(
    self,
    images: Sequence[InputImage],
    numbers: ArrayLike,
    rows_given: int,
    sampling: SamplingConfig,
    *,
    seed: int,
    watched: bool = False,
  ) -> Iterator[PartialSamples]:
    """Yields samples of all images; the last result has all rows.

    Args:
      images: the images to complete.
      numbers: numbers of each image's samples, 0 and up: [n], or others for each image, [images, n].
      rows_given: upper rows of each image that are kept; 0: none.
      sampling: temperature, top-k and top-p.
      seed: seed of all samples.
      watched: True yields a result after every row, drawn by programs that serve any number of rows
        given, any `sampling`, and any number of samples up to a `bucket`. False yields one result.
    """
    n_positions, positions = self.trained.config.n_positions, self.reader.positions
    n_given, n = positions(rows_given), np.shape(numbers)[-1]
    n_tokens = positions(1) if watched else n_positions - n_given
    numbers = fill_up(numbers, bucket(n)) if watched else numbers
    length = n_positions if watched else n_given
    per_image, given = self._lay_out(images, np.shape(numbers)[-1], length)
    keys = sample_keys(images, numbers, len(given) * per_image, seed)
    values = sampling.values(truncates=watched or None)
    program = self._program(given.shape, per_image, n_tokens)
    with jax.set_mesh(self._mesh):
      prompts = sharding.put_global(given, self._mesh)
      whole = {"n_given": np.int32(n_given)} if watched else {}
      progress = program.begin(self.trained.params, prompts, keys, **whole)
    del keys

    def wanted(rows: jax.Array) -> np.ndarray:
      of_one = rows.shape[1:]
      by_image = np.asarray(rows)[: len(images) * np.shape(numbers)[-1]].reshape(
        len(images), -1, *of_one
      )
      # A copy, since these buffers are donated to the next step.
      return by_image[:, :n].reshape(-1, *of_one).copy()

    for end in range(n_given + n_tokens, n_positions + 1, n_tokens):
      with jax.set_mesh(self._mesh):
        progress = self._extend(program, progress, n_tokens, values)
        tokens, nll = map(wanted, jax.device_get(self._fetch(progress.tokens, progress.nll)))
      yield PartialSamples(tokens, nll, np.broadcast_to(np.arange(n_positions) < end, nll.shape))

  def keep_programs(self, n: int) -> None:
    """Keeps as many programs, at least: those that were compiled last stay, whatever is drawn."""
    self._n_kept = max(self._n_kept, n)

  def _lay_out(self, images, n: int, n_given: int) -> tuple[int, np.ndarray]:
    """Returns the number of samples that share an image's prefill, and the prompts [B, P].

    Where there are fewer images than devices, some prompts are repeated.
    """
    shards = sharding.batch_shards(self._mesh)
    divisors = [size for size in range(1, n + 1) if n % size == 0]
    fitting = [size for size in divisors if len(images) * (n // size) % shards == 0]
    shared = max(fitting, default=1)
    given = np.stack([image.tokens[:n_given] for image in images]).astype(np.int32)
    given = given.reshape(len(images), *self.reader.spec.shape(n_given))  # of `NOTHING`, too
    given = np.repeat(given, n // shared, axis=0)
    return shared, sharding.pad_rows(given, sharding.round_up_batch(self._mesh, len(given)))

  def _program(self, shape: tuple[int, ...], per_image: int, n_tokens: int) -> _Program:
    """Returns the program from a least-recently-used cache."""
    key = shape, per_image, n_tokens
    if key not in self._programs:
      options = {"samples_per_image": per_image, "cache_dtype": self._cache_dtype}
      begin = functools.partial(autoregressive.begin, self.trained.config, **options)
      self._programs[key] = _Program(jax.jit(begin), {})
      if len(self._programs) > self._n_kept:
        self._programs.popitem(last=False)
    self._programs.move_to_end(key)
    return self._programs[key]

  def _extend(self, program: _Program, progress, n_tokens: int, values: SamplingValues):
    if not program.extend:
      config = self.trained.config

      def extend(params, progress, values):
        return autoregressive.extend(config, params, progress, n_tokens, sampling=values)

      # Results keep the inputs' sharding, so that one program serves all rows.
      where = jax.tree.map(lambda leaf: leaf.sharding, progress)
      program.extend["step"] = jax.jit(extend, donate_argnums=1, out_shardings=where)
    return program.extend["step"](self.trained.params, progress, values)


def bucket(n: int) -> int:
  """Number of rows that a program computes where n are wanted: those beyond n are thrown away."""
  most = _BUCKETS[-1]
  return next((size for size in _BUCKETS if n <= size), -(-n // most) * most)


def batch_shape(n: int, batch_size: int) -> tuple[int, int]:
  """Returns how many of an image's n samples, and of the images, are drawn at a time, at most.

  With them all batches have one shape; the numbers of the last one's samples may exceed n.
  """
  size = -(-n // -(-n // batch_size))
  return size, max(1, batch_size // size)


def fill_up(numbers: ArrayLike, size: int) -> np.ndarray:
  """Returns numbers of samples with the last one repeated, `size` of them."""
  numbers = np.asarray(numbers)
  return np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, size - numbers.shape[-1])], "edge")


def sample_keys(
  images: Sequence[InputImage], numbers: ArrayLike, padded: int, seed: int
) -> jax.Array:
  """PRNG keys [padded]: one per sample, determined by seed, image and the sample's number."""
  identities = np.asarray([[image.identity] for image in images], np.uint32)
  pairs = np.broadcast_arrays(identities, np.asarray(numbers, np.uint32))
  pairs_Nx2 = sharding.pad_rows(np.stack(pairs, -1).reshape(-1, 2), padded)
  return _keys(jax.random.key(seed), *pairs_Nx2.T)


@jax.jit
def _keys(base: jax.Array, identities_N: jax.Array, numbers_N: jax.Array) -> jax.Array:
  fold_in = jax.vmap(jax.random.fold_in)
  return fold_in(
    jax.vmap(lambda identity: jax.random.fold_in(base, identity))(identities_N), numbers_N
  )


def prompt_rows(keep: float, resolution: int) -> int:
  """Number of given rows for a share `keep`: at least one, and not all."""
  return min(max(round(keep * resolution), 1), resolution - 1)
