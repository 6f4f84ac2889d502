"""Draws pictures: unconditional ones, and the lower half of held-out ones.

Writes samples.png (a grid), completions.png (rows of: what is given, completions …, the original)
and sample.json (settings, seeds, and how likely the model finds what it drew).
"""

import math
import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from igpt_jax import config as config_lib
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import open_split
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import figures, summary
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.sampling.completer import NOTHING, Completer, Drawn, Picture, given_rows
from igpt_jax.workspace import devices, memory, provenance, streams, watch, weights


def run(config: ConfigDict, workdir: str) -> None:
  """Samples from `checkpoint` (or the workdir's newest); watching, from every checkpoint."""
  devices.use_cores(config)
  watch.run(config, workdir, "sample.json", sample, settings_of)


def settings_of(config: ConfigDict) -> dict[str, Any]:
  """All but the checkpoint that decides sample.json and its images."""
  return {
    "data": provenance.of_data(config, ["test"]),
    **provenance.of_settings(config, ["sample", "seed"], without=["sample.batch_size"]),
  }


def sample(config: ConfigDict, workdir: str, out: str) -> None:
  """One checkpoint; pictures go to `out`."""
  sampling = config_lib.sampling(config)
  found = completer_lib.describe(config, workdir)
  weights.check_resolution(config, found)
  say(f"checkpoint: {found.path}")
  n_samples, per_picture = config.sample.samples, config.sample.per_picture
  mesh = devices.sampling_mesh(config, found.config, math.gcd(n_samples, config.sample.completions))
  completer = Completer(found, config, mesh)
  together = max(n_samples, config.sample.completions * per_picture)
  memory.check_cache(completer.trained.config, together, config.sample.cache, mesh)
  paint, resolution = completer.reader.paint, completer.reader.resolution
  rows_given = given_rows(config.sample.keep, resolution)
  scale = config.sample.scale or figures.default_scale(resolution)
  # Before anything is drawn: the test pictures may not be there.
  given, source = held_out(config, completer.reader.palette)

  def draw(pictures: list[Picture], numbers: np.ndarray, rows_given: int) -> Drawn:
    (drawn,) = completer.draw(pictures, numbers, rows_given, sampling, seed=config.seed)
    return drawn

  # Two streams of keys; a sample's number in its own is the same whatever is drawn beside it.
  say(f"sampling {n_samples} pictures of {resolution}×{resolution}")
  samples = draw([Picture("", NOTHING.tokens, stream=0)], np.arange(n_samples), 0)
  columns = math.ceil(math.sqrt(2 * n_samples))
  painted = list(paint(samples.tokens))
  grid = [painted[start : start + columns] for start in range(0, len(painted), columns)]

  say(f"completing {len(given)} pictures of {source}, {rows_given} of {resolution} rows given")
  numbers = np.arange(len(given) * per_picture).reshape(-1, per_picture)
  completions = draw([Picture("", tokens, stream=1) for tokens in given], numbers, rows_given)
  known = np.arange(resolution)[:, None] < rows_given
  drawn = np.split(paint(completions.tokens), len(given))
  rows = [
    [figures.hide(original, known), *of_it, original]
    for original, of_it in zip(paint(given), drawn, strict=True)
  ]

  if not hosts.is_main():
    return
  figures.save_png(os.path.join(out, "samples.png"), figures.grid(grid, scale=scale))
  figures.save_png(os.path.join(out, "completions.png"), figures.grid(rows, scale=scale))
  completed = completions.nll[:, rows_given * resolution :]
  values = {
    "checkpoint": found.path,
    "step": found.step,
    "parameters": weights.checksum_of(found),
    "seed": config.seed,
    "temperature": sampling.temperature,
    "top_k": sampling.top_k,
    "top_p": sampling.top_p,
    "rows_given": rows_given,
    "completed_from": source,
    "samples_nats_per_token": float(samples.nll.mean()),
    "completions_nats_per_token": float(completed.mean()),
    "each_sample_nats_per_token": [round(float(nats), 4) for nats in samples.nll.mean(1)],
    "each_completion_nats_per_token": [round(float(nats), 4) for nats in completed.mean(1)],
    "pictures": "samples.png, completions.png",
  }
  summary.write_json(os.path.join(out, "sample.json"), values)
  summary.write_summary(out)
  say(f"wrote samples.png and completions.png to {out}")


def held_out(config: ConfigDict, palette: Palette) -> tuple[np.ndarray, str]:
  """Tokens [N, T] of pictures of the test split, and which split it is."""
  data_config = config_lib.data(config)
  split = open_split(data_config, "test")
  wanted = min(config.sample.completions, len(split))
  # Spread over the split: neighbours are often alike.
  order = np.random.default_rng(config.seed).permutation(len(split))[:wanted]
  return streams.tokens_of(split.select(np.sort(order)), data_config, palette), split.fingerprint
