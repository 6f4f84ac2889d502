"""Held-out images as the model under training completes them: WORKDIR/progress/STEP.png.

Rows of: the image with its lower part grey, completions, the original. The same images and the same
random numbers every time, so that one sees the model learn. Nothing of the training changes: the draws
have keys of their own, and the state is only read.
"""

import os
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image, PngImagePlugin

from igpt_jax import files
from igpt_jax.checkpoint import checksum
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.sources import Split
from igpt_jax.model.decoding import autoregressive, masked
from igpt_jax.model.image_gpt import Params, to_compute_dtypes
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import figures
from igpt_jax.reporting.metrics import Writers
from igpt_jax.sampling.completer import InputImage, prompt_rows, sample_keys
from igpt_jax.tokens import TokenSpec
from igpt_jax.training import compilation
from igpt_jax.training.optimizer import make_optimizer
from igpt_jax.training.state import TrainState
from igpt_jax.workspace import memory, streams
from igpt_jax.workspace.workdir import PROGRESS

_FIRST_SECONDS = 30.0  # of steps before the first images, if no evaluation comes before
_WHETHER = "whether progress images are due"
_MADE_FROM = "igpt_jax"  # key of a PNG's text: the digest of all that decides its pixels


class NoImages:
  """Stand-in of a run that draws no images."""

  def overdue(self) -> bool:
    return False

  def __call__(self, at: TrainState, writers: Writers) -> None:
    del at, writers


class ProgressImages(NoImages):
  """Completions of a few held-out images by the state that it is called with.

  Every process must call it, and `overdue`, at the same step.

  Args:
    settings: the run's; `sample` says how to draw, `train.progress_images` how many images.
    folder: the run's.
    held_out: the images to choose from.
    spec: the model's tokens, with the colours of a palette.
    model: the trained model's config.
    mesh: the mesh of the state.
  """

  def __init__(
    self,
    settings: Settings,
    folder: str,
    held_out: Split,
    spec: TokenSpec,
    model: ImageGPTConfig,
    mesh: Mesh,
  ):
    self._settings, self._spec, self._model, self._mesh = settings, spec, model, mesh
    self._folder = os.path.join(folder, PROGRESS)
    order = np.random.default_rng(settings.seed).permutation(len(held_out))
    self._images = held_out.select(np.sort(order[: settings.train.progress_images]))
    self._side = settings.data.resolution
    self._rows_given = prompt_rows(settings.sample.keep, self._side)
    drawn_before = any(name.endswith(".png") for name in files.names(self._folder))
    self._drawn = bool(hosts.from_main(drawn_before, "a look for progress images"))
    self._since: float | None = None
    self._asked = 0  # how often `overdue` was called
    self._draw: Callable[[Params], np.ndarray] | None = None
    self._fits = True

  def overdue(self) -> bool:
    """Returns True if nothing has been drawn `_FIRST_SECONDS` after the first call.

    Several processes ask the main one, which costs time, at the calls 1, 2, 4, 8, … alone.
    """
    if self._drawn:
      return False
    if self._since is None:
      self._since = time.monotonic()
    self._asked += 1
    if jax.process_count() > 1 and self._asked & (self._asked - 1):
      return False
    return bool(hosts.from_main(time.monotonic() - self._since > _FIRST_SECONDS, _WHETHER))

  def __call__(self, at: TrainState, writers: Writers) -> None:
    """Writes the step's images, unless a file holds those of this very state; tells the writers."""
    self._drawn = True
    if not self._fits:
      return
    step = int(at.step)
    path = os.path.join(self._folder, f"{step}.png")
    made_from = files.digest({
      "parameters": checksum.checksum(at.params),
      "images": self._images.fingerprint,
      "rows_given": self._rows_given,
      "per_image": self._settings.sample.per_image,
      "sampling": repr(choices.sampling_config(self._settings)),
      "seed": self._settings.seed,
    })  # fmt: skip
    image = _whole(path, made_from) if hosts.is_main() else None
    if not hosts.from_main(image is not None, "a look for this step's image"):
      if self._draw is None:
        self._draw = self._compiled(at.params)
      if self._draw is None:
        return
      drawn = self._draw(at.params)
      if hosts.is_main():
        image = self._lay_out(drawn, step)
        _write(path, image, made_from)
    if image is not None:
      writers.image(step, PROGRESS, image)

  def _compiled(self, params: Params) -> Callable[[Params], np.ndarray] | None:
    """Returns the function of parameters that draws tokens [N, …]; None: there is no memory for it."""
    settings, model, mesh = self._settings, self._model, self._mesh
    per_image, sampling = settings.sample.per_image, choices.sampling_config(settings)
    self._tokens = streams.tokens_of(self._images, settings.data, self._spec)
    n, n_given = len(self._tokens), self._rows_given * self._side * self._spec.per_pixel
    padded = sharding.round_up_batch(mesh, n)
    tokens = sharding.pad_rows(self._tokens.astype(np.int32), padded)
    images = [InputImage("", image, stream=i) for i, image in enumerate(tokens)]
    keys = sample_keys(images, np.arange(per_image), padded * per_image, settings.seed)

    def complete(params, keys, prompts):
      params = to_compute_dtypes(model, params)
      shared = {"samples_per_image": per_image, "cache_dtype": settings.sample.cache}
      return autoregressive.complete(
        model, params, prompts, keys, sampling=sampling, **shared
      ).tokens

    def fill(params, keys, tokens, known):
      params, passes = to_compute_dtypes(model, params), settings.complete.passes
      return masked.fill(model, params, tokens, known, keys, steps=passes, sampling=sampling).tokens

    if model.causal:
      draw, given = complete, [tokens[:, :n_given]]
    else:
      tokens = np.repeat(tokens, per_image, axis=0)
      known = np.broadcast_to(np.arange(tokens.shape[1]) < n_given, tokens.shape[:2])
      draw, given = fill, [tokens, known]
    with jax.set_mesh(mesh):
      placed = [sharding.put_global(np.ascontiguousarray(array), mesh) for array in given]
      jitted = jax.jit(draw, out_shardings=sharding.replicated(mesh))
      compiled = compilation.timed(lambda: jitted.lower(params, keys, *placed).compile())
    optimizer = make_optimizer(choices.optimizer_config(self._settings))
    lack = memory.lacking_beside_state(compiled, model, optimizer, mesh)
    self._fits = not hosts.on_any(bool(lack), "the memory to draw progress images")
    if not self._fits:
      say(
        f"train.progress_images: none are drawn: {n} images of {per_image} completions {lack}; fix: "
        "fewer train.progress_images or sample.per_image, or sample.cache='int8'"
      )
      return None
    say(f"progress images: {compiled.took}; {compiled.memory}")

    def drawn(params: Params) -> np.ndarray:
      with jax.set_mesh(mesh):
        return np.asarray(jax.device_get(compiled.executable(params, keys, *placed)))

    return drawn

  def _lay_out(self, drawn: np.ndarray, step: int) -> np.ndarray:
    """Returns the grid of the images and their completions at a step."""
    side, per_image = self._side, self._settings.sample.per_image
    originals = self._spec.decode(self._tokens)
    completed = self._spec.decode(drawn[: len(originals) * per_image])
    return figures.completions(
      np.arange(side)[:, None] < self._rows_given,
      list(zip(originals, np.split(completed, len(originals)), strict=True)),
      scale=self._settings.sample.scale,
      title=f"Completions of held-out images, step {step:,}",
    )


def _write(path: str, image: np.ndarray, made_from: str) -> None:
  """Writes a PNG that says what it was made from; training goes on if the disk is full."""
  about = PngImagePlugin.PngInfo()
  about.add_text(_MADE_FROM, made_from)
  name = os.path.join(PROGRESS, os.path.basename(path))
  try:
    files.make_folder(os.path.dirname(path))
    with files.replacing(path) as partial:
      Image.fromarray(image).save(partial, format="PNG", pnginfo=about)
    say(f"wrote {name}")
  except OSError as error:
    say(f"{name} can't be written ({error.strerror or error}); training goes on")


def _whole(path: str, made_from: str) -> np.ndarray | None:
  """Returns the pixels of a whole PNG that was made from this; None: there is none."""
  try:
    with files.opened(path) as file, Image.open(file) as image:
      image.load()
      same = getattr(image, "text", {}).get(_MADE_FROM) == made_from
      return np.asarray(image.convert("RGB")) if same else None
  except (OSError, SyntaxError, ValueError):  # Pillow raises any of these for a damaged PNG
    return None
