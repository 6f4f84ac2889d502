"""Draws unconditional samples, and completions of held-out images.

Writes samples.png (a grid), completions.png (rows of: prompt, completions …, original), completions.gif
(their pixels appearing) and sample.json (settings, seed, and the samples' nats per token under the
model).
"""

import math
import os
from typing import Any

import numpy as np

from igpt_jax import units
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.sources import open_split
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import figures, summary
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.sampling.completer import NOTHING, Completer, InputImage, PartialSamples, prompt_rows
from igpt_jax.tokens import TokenSpec
from igpt_jax.workspace import devices, memory, provenance, streams, watch, weights
from igpt_jax.workspace import workdir as workdir_lib

_ANIMATED = 8  # images whose completions are animated, at most


def run(settings: Settings, workdir: str) -> None:
  """Samples from `checkpoint` (or the workdir's newest); watching, from every checkpoint."""
  devices.use_cores(settings)
  watch.run(settings, workdir, "sample.json", sample, depends_on)


def depends_on(settings: Settings) -> dict[str, Any]:
  """Everything that determines sample.json and its images, except the checkpoint."""
  return {
    "data": provenance.of_data(settings.data, ["test"]),
    **provenance.of_settings(settings, ["sample", "seed"], without=["sample.batch_size"]),
  }


def sample(settings: Settings, workdir: str, out: str) -> None:
  """Samples from one checkpoint; images go to `out`."""
  sampling = choices.sampling_config(settings)
  info = weights.at_resolution(settings, completer_lib.describe(settings, workdir))
  workdir_lib.open_workdir(out)
  say(f"checkpoint: {info.path}")
  n_samples, per_image = settings.sample.samples, settings.sample.per_image
  n_completions = settings.sample.completions
  mesh = devices.sampling_mesh(settings, info.config, math.gcd(n_samples, n_completions))
  completer = Completer(info, settings, mesh)
  together = max(n_samples, n_completions * per_image)
  memory.check_cache(completer.trained.config, together, settings.sample.cache, mesh)
  paint, resolution = completer.reader.paint, completer.reader.resolution
  rows_given = prompt_rows(settings.sample.keep, resolution)
  # Before anything is drawn, since the test images may be missing.
  given, source = held_out(settings, completer.reader.spec)

  def draw(images: list[InputImage], numbers: np.ndarray, rows_given: int) -> PartialSamples:
    (drawn,) = completer.draw(images, numbers, rows_given, sampling, seed=settings.seed)
    return drawn

  # Samples and completions have streams of their own, so that neither's keys depend on the other's number.
  say(f"sampling {units.counted(n_samples, 'image')} of {resolution}×{resolution}")
  samples = draw([InputImage("", NOTHING.tokens, stream=0)], np.arange(n_samples), 0)

  images = units.counted(len(given), "image")
  say(f"completing {images} of {source}, {rows_given} of {resolution} rows given")
  numbers = np.arange(len(given) * per_image).reshape(-1, per_image)
  completions = draw([InputImage("", tokens, stream=1) for tokens in given], numbers, rows_given)
  drawn = np.split(paint(completions.tokens), len(given))

  if not hosts.is_main():
    return
  by, scale = figures.checkpoint_name(info.path, info.step), settings.sample.scale
  sampled = figures.samples(paint(samples.tokens), scale=scale, title=f"Samples, {by}")
  figures.save_png(os.path.join(out, "samples.png"), sampled)
  completed = figures.completions(
    np.arange(resolution)[:, None] < rows_given,
    list(zip(paint(given), drawn, strict=True)),
    scale=scale,
    title=f"Completions of test images, {by}",
  )
  figures.save_png(os.path.join(out, "completions.png"), completed)
  frames = figures.appearing(
    [image for images in drawn[:_ANIMATED] for image in images],
    rows_given * resolution,
    columns=per_image,
    scale=scale or figures.default_scale(resolution),
  )
  figures.save_gif(os.path.join(out, "completions.gif"), frames)
  completed_nll = completions.nll[:, completer.reader.positions(rows_given) :]
  values = {
    "checkpoint": info.path,
    "step": info.step,
    "parameters": weights.checksum_of(info),
    "seed": settings.seed,
    "temperature": sampling.temperature,
    "top_k": sampling.top_k,
    "top_p": sampling.top_p,
    "rows_given": rows_given,
    "completed_from": source,
    "samples_nats_per_token": float(samples.nll.mean()),
    "completions_nats_per_token": float(completed_nll.mean()),
    "each_sample_nats_per_token": [round(float(nats), 4) for nats in samples.nll.mean(1)],
    "each_completion_nats_per_token": [round(float(nats), 4) for nats in completed_nll.mean(1)],
    "pictures": "samples.png, completions.png, completions.gif",
  }
  summary.write_json(os.path.join(out, "sample.json"), values)
  summary.write_summary(out)
  say(f"wrote samples.png, completions.png and completions.gif to {out}")


def held_out(settings: Settings, spec: TokenSpec) -> tuple[np.ndarray, str]:
  """Returns tokens [N, …] of images of the test split, and the split's fingerprint."""
  split = open_split(settings.data, "test")
  # Random images, since neighbours are often alike.
  order = np.random.default_rng(settings.seed).permutation(len(split))[
    : settings.sample.completions
  ]
  return streams.tokens_of(split.select(np.sort(order)), settings.data, spec), split.fingerprint
