"""Trained models in Python: NumPy or Pillow images in, NumPy out.

  import igpt_jax
  model = igpt_jax.load("runs/quickstart")
  completions = model.complete(photo, keep=0.5, n=4)

Results are those of the jobs for the same images and seed.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from igpt_jax.checkpoint import CheckpointInfo
from igpt_jax.config.fields import FIELDS, Settings, with_values
from igpt_jax.data import own_images
from igpt_jax.data.image_decoding import BadRecord
from igpt_jax.errors import UserError
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.parallel import hardware, sharding
from igpt_jax.pretrained import packaged
from igpt_jax.probing.features import FeatureExtractor, feature_config
from igpt_jax.sampling import completer, filler
from igpt_jax.sampling.completer import NOTHING, InputImage
from igpt_jax.training.evaluation import LikelihoodEvaluator
from igpt_jax.training.objectives import make_objective
from igpt_jax.workspace import checkpoint_tokens, devices, memory, weights

Images: TypeAlias = np.ndarray | Image.Image | Sequence[np.ndarray | Image.Image]

# Arguments that are settings of the jobs, whose bounds they share.
_SETTINGS = {
  "palette": "palette.path", "batch_size": "sample.batch_size", "keep": "complete.keep",
  "n": "complete.n", "seed": "seed", "temperature": "sample.temperature", "top_k": "sample.top_k",
  "top_p": "sample.top_p",
}  # fmt: skip


def load(
  path: str | os.PathLike[str] = packaged.NAME,
  *,
  palette: str | os.PathLike[str] = "",
  batch_size: int = 64,
) -> "Model":
  """Reads a trained model onto all devices that jax has.

  On a CPU that is one, unless `jax.config.update("jax_num_cpu_devices", N)` comes before: on a device for
  each core, as jobs have it, drawing is faster.

  Args:
    path: a workdir (its newest checkpoint) or WORKDIR/checkpoints/STEP; OpenAI's model.ckpt-N; a
      Hugging Face directory; a model in one file; a model of the Hugging Face hub, such as
      "openai/imagegpt-small"; or "packaged", the model that comes with igpt_jax.
    palette: a .npy with the colours of a checkpoint that carries none.
    batch_size: images, or samples, that are computed at a time; fewer take less memory.

  Raises:
    UserError: nothing readable is there, or it has no palette and needs one.
  """
  for name, value in (("path", path), ("palette", palette)):
    if not isinstance(value, str | os.PathLike) or (name == "path" and not os.fspath(value)):
      raise UserError(f"{name}: {value!r:.80}; expected a path, as text or pathlib's")
  values = _checked(palette=os.fspath(palette), batch_size=batch_size)
  settings = with_values(Settings(), {_SETTINGS[name]: value for name, value in values.items()})
  hardware.check_platform()
  if path == packaged.NAME:
    weights.say_packaged('igpt_jax.load("runs/quickstart"), or "openai/imagegpt-small"')
  info = weights.describe(os.fspath(path), settings)
  checkpoint_tokens.check_tokens_known(info, "path", 'palette="FILE.npy"')
  checkpoint_tokens.check_palette(settings, info, "leave palette out")
  mesh = devices.sampling_mesh(settings, info.config, values["batch_size"])
  return Model(info, settings, mesh)


class Model:
  """A trained model, made by `load`.

  Images are PIL images, uint8 arrays [height, width, 3], a list of either, or one array [batch, height,
  width, 3]. Pillow's are turned upright and converted to sRGB, with transparency over white; arrays
  count as such. Of other sizes than the model's, their centre squares are scaled to it.

  A method's first call compiles a program, later ones use it: batches are filled up to a few sizes, so
  that not every number of images has one of its own. All raise UserError for what they can't work with.
  Calls from several threads must come one after the other.

  Attributes:
    info: the checkpoint: path, step, config (of the model), palette, run.
    resolution: height and width of the model's images, R.
  """

  def __init__(self, info: CheckpointInfo, settings: Settings, mesh: Mesh):
    self.info, self._settings, self._mesh = info, settings, mesh
    self._drawer = filler.open_model(info, settings, mesh)
    self._params, self._reader = self._drawer.trained.params, self._drawer.reader
    self.resolution = self._reader.resolution
    self._batch_size = settings.sample.batch_size
    model, mask_probability = self._drawer.trained.config, info.run["mask_probability"]
    self._features = FeatureExtractor(model, feature_config(model), mesh)
    objective = make_objective(info.run["objective"], mask_probability)
    self._likelihood = LikelihoodEvaluator(model, objective, mesh)

  def complete(
    self,
    images: Images,
    *,
    keep: float = 0.5,
    n: int = 4,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
  ) -> np.ndarray:
    """Draws the lower part of images, as job `complete` does.

    Args:
      images: those to complete.
      keep: share of the rows that is given.
      n: samples of each image. Another number compiles once more, as do other rows, and the first use of
        top_k or top_p.
      seed: with an image's pixels and a sample's number, it determines the sample.
      temperature: divides the logits; 0 takes the likeliest colour.
      top_k: keeps the k likeliest colours; 0: all.
      top_p: keeps the likeliest colours whose probabilities reach it.

    Returns:
      uint8 [batch, n, R, R, 3], the given rows included.
    """
    values = _checked(keep=keep, n=n, seed=seed)
    sampling = _sampling(temperature, top_k, top_p)
    squares = self._squares(images)
    settings = with_values(self._settings, {"complete.keep": values["keep"]})
    known = filler.known_pixels(settings, self.info)
    prompts = [InputImage("", tokens) for tokens in self._reader.tokens(squares)]
    return self._draw(prompts, values["n"], known, sampling, values["seed"])

  def sample(
    self,
    n: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
  ) -> np.ndarray:
    """Draws n images from nothing, as job `sample` does: uint8 [n, R, R, 3]; not with a BERT model.

    Arguments are those of `complete`.
    """
    values = _checked(n=n, seed=seed)
    sampling = _sampling(temperature, top_k, top_p)
    completer.check_causal(self.info)
    n, most = values["n"], self._batch_size
    filled = completer.bucket(n) if n < most else -(-n // most) * most
    known = np.zeros((self.resolution, self.resolution), bool)
    nothing = InputImage("", NOTHING.tokens, stream=0)
    return self._draw([nothing], filled, known, sampling, values["seed"])[0, :n]

  def features(self, images: Images, *, layer: int | None = None) -> np.ndarray:
    """Computes features for linear classifiers, as job `probe` does: float32 [batch, width].

    Args:
      images: those to describe.
      layer: 0 (the first block's input) to n_layer (the final norm's output); None: the middle one.
    """
    n_layer = self.info.config.n_layer
    layer = n_layer // 2 if layer is None else layer
    if not isinstance(layer, int | np.integer) or not 0 <= layer <= n_layer:
      raise UserError(
        f"layer: {layer!r:.80}; expected 0 to {n_layer}, the layers of {self.info.path}, or None for the "
        "middle one"
      )
    batches = self._batches(self._squares(images))
    rows = self._features(self._params, batches)
    # Copies: the others of a batch's layers can go.
    return np.concatenate([batch.features[layer].copy() for batch in rows])

  def nats_per_token(self, images: Images) -> np.ndarray:
    """Computes images' negative log-likelihoods, as job `evaluate` does: float32 [batch], nats per token.

    A token is what a position of the model holds: `info.config.tokens.bits_per_dim` converts a raw RGB
    model's to bits per dimension.

    A BERT model's is that of the pixels which one mask hides, drawn by the image's place among
    `images`; nan where it hides none.
    """
    batches = self._batches(self._squares(images))
    return np.concatenate(list(self._likelihood.each(self._params, batches)))

  def _squares(self, images: Images) -> np.ndarray:
    """Returns images of the model's size, uint8 [batch, R, R, 3]."""
    if isinstance(images, Image.Image):
      images = [images]
    elif not isinstance(images, list | tuple):
      array = np.asarray(images)
      images = list(array) if array.ndim == 4 else [array]
    if not images:
      raise UserError("images: none; expected one or more")
    return np.stack([self._reader.fit(_pixels(image, i)) for i, image in enumerate(images)])

  def _batches(self, squares: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches as evaluation reads them from a split."""
    for start in range(0, len(squares), self._batch_size):
      left = min(len(squares) - start, self._batch_size)
      filled = min(completer.bucket(left), self._batch_size)
      rows = np.arange(sharding.round_up_batch(self._mesh, filled))
      index = start + np.minimum(rows, left - 1)
      images = squares[index]
      yield {
        "image": images,
        "tokens": self._reader.tokens(images),
        "label": np.full(len(rows), -1, np.int32),
        "mask": rows < left,
        "index": index.astype(np.int32),
      }

  def _draw(
    self,
    prompts: list[InputImage],
    n: int,
    known: np.ndarray,
    sampling: SamplingConfig,
    seed: int,
  ) -> np.ndarray:
    """Returns n samples of each prompt, uint8 [prompts, n, R, R, 3]."""
    size, most = completer.batch_shape(n, self._batch_size)
    most = min(most, completer.bucket(len(prompts)))
    if self.info.config.causal:
      fix = "a smaller batch_size of igpt_jax.load"
      memory.check_cache(self._drawer.trained.config, size * most, "", self._mesh, fix)
    of_one = self._reader.spec.shape(self._reader.positions(self.resolution))
    drawn = np.zeros((len(prompts), n, *of_one), np.int32)
    for start in range(0, len(prompts), most):
      group = prompts[start : start + most]
      filled = group + [group[-1]] * (min(most, completer.bucket(len(group))) - len(group))
      for first in range(0, n, size):
        numbers = range(first, first + size)
        *_, samples = filler.draw(self._drawer, filled, numbers, known, sampling, seed=seed)
        tokens = samples.tokens.reshape(len(filled), size, *of_one)[: len(group), : n - first]
        drawn[start : start + len(group), first : first + size] = tokens
    return self._reader.spec.decode(drawn)


def _checked(**arguments: Any) -> dict[str, Any]:
  """Returns arguments as Python's own numbers, checked as the settings that they stand for."""
  values = {
    name: value.item() if isinstance(value, np.generic) else value
    for name, value in arguments.items()
  }
  for name, value in values.items():
    FIELDS[_SETTINGS[name]].check(name, value)
  return values


def _sampling(temperature: float, top_k: int, top_p: float) -> SamplingConfig:
  return SamplingConfig(**_checked(temperature=temperature, top_k=top_k, top_p=top_p))


def _pixels(image: Any, place: int) -> np.ndarray:
  """Returns an image as uint8 [height, width, 3], upright, in sRGB."""
  if isinstance(image, Image.Image):
    try:
      return own_images.from_pillow(image, f"number {place}")
    except BadRecord as error:
      raise UserError(f"images: {error}; expected an image that Pillow can read") from None
  array = np.asarray(image)
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
    raise UserError(
      f"images: number {place} is {array.dtype} {array.shape}; expected a PIL image, or uint8 [height, "
      "width, 3] of 0 to 255; fix: PIL.Image.open(path) of a file, np.uint8(np.rint(255 * x)) of floats "
      "from 0 to 1"
    )
  return array
