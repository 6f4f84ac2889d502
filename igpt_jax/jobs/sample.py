"""Draws pictures: unconditional ones, and the lower half of held-out ones.

Writes samples.png (a grid), completions.png (rows of: what is given, completions …, the original)
and sample.json (settings, seeds, and how likely the model finds what it drew).
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax import checkpoint
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.sources import open_split
from igpt_jax.errors import UserError
from igpt_jax.model.decoding import autoregressive
from igpt_jax.parallel import hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import figures, summary
from igpt_jax.sampling.completer import given_rows
from igpt_jax.workspace import devices, memory, provenance, streams, watch, weights


def run(settings: Settings, workdir: str) -> None:
  """Samples from `checkpoint` (or the workdir's newest); watching, from every checkpoint."""
  devices.use_cores(settings)
  watch.run(settings, workdir, "sample.json", sample, depends_on)


def depends_on(settings: Settings) -> dict[str, Any]:
  """All but the checkpoint that decides sample.json and its images."""
  return {
    "data": provenance.of_data(settings.data, ["test"]),
    **provenance.of_settings(settings, ["sample", "seed"], without=["sample.batch_size"]),
  }


def sample(settings: Settings, workdir: str, out: str) -> None:
  """One checkpoint; pictures go to `out`."""
  sampling = choices.sampling_config(settings)
  found = weights.find_model(settings, workdir, needs_palette=True, check=check_draws)
  at_once = math.gcd(settings.sample.samples, settings.sample.completions)
  mesh = devices.sampling_mesh(settings, found.config, at_once)
  trained = weights.read_to_draw(settings, found, mesh)
  rows = max(settings.sample.samples, settings.sample.completions * settings.sample.per_image)
  memory.check_cache(trained.config, rows, settings.sample.cache, mesh)
  palette = weights.palette_of(trained)
  resolution = trained.run["resolution"]
  rows_given = given_rows(settings.sample.keep, resolution)
  scale = settings.sample.scale or figures.default_scale(resolution)
  # Before anything is drawn: the test pictures may not be there.
  given, originals, source = held_out(settings, trained, palette)

  def draw(given_BxP: np.ndarray, per_picture: int, stream: int) -> autoregressive.Samples:
    """Samples on the host; picture i's j-th sample has a seed of its own, whatever the batch."""
    wanted = len(given_BxP)
    padded = sharding.round_up_batch(mesh, wanted)
    given = np.pad(given_BxP, ((0, padded - wanted), (0, 0)))
    base = jax.random.fold_in(jax.random.key(settings.seed), stream)
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(padded * per_picture))
    compiled = jax.jit(
      functools.partial(
        autoregressive.complete,
        trained.config,
        sampling=sampling,
        samples_per_picture=per_picture,
        cache_dtype=settings.sample.cache,
      ),
      out_shardings=sharding.replicated(mesh),
    )
    with jax.set_mesh(mesh):
      batch = sharding.put_global(given, mesh)
      drawn = jax.device_get(compiled(trained.params, batch, keys))
    keep = wanted * per_picture
    return autoregressive.Samples(drawn.tokens[:keep], drawn.nll[:keep])

  def paint(tokens_BxT: np.ndarray) -> np.ndarray:
    return palette.decode(tokens_BxT).reshape(-1, resolution, resolution, 3)

  say(f"sampling {settings.sample.samples} pictures of {resolution}×{resolution}")
  samples = draw(np.zeros((settings.sample.samples, 0), np.int32), 1, stream=0)
  columns = math.ceil(math.sqrt(2 * len(samples.tokens)))
  painted = list(paint(samples.tokens))
  grid = [painted[start : start + columns] for start in range(0, len(painted), columns)]

  n_given = rows_given * resolution
  per_picture = settings.sample.per_image
  say(f"completing {len(given)} pictures of {source}, {rows_given} of {resolution} rows given")
  completions = draw(given[:, :n_given], per_picture, stream=1)
  rows = []
  for i, original in enumerate(originals):
    drawn = paint(completions.tokens[i * per_picture : (i + 1) * per_picture])
    rows.append([figures.hide_below(original, rows_given), *drawn, original])

  if not hosts.is_main():
    return
  figures.save_png(os.path.join(out, "samples.png"), figures.grid(grid, scale=scale))
  figures.save_png(os.path.join(out, "completions.png"), figures.grid(rows, scale=scale))
  completed = completions.nll[:, n_given:]
  values = {
    "checkpoint": trained.path,
    "step": trained.step,
    "parameters": weights.checksum_of(found),
    "seed": settings.seed,
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


def check_draws(found: checkpoint.Described) -> None:
  """Raises UserError when a model has no distribution to draw from."""
  if not found.config.causal:
    raise UserError(
      f"checkpoint: {found.path} is a BERT model: it has no left-to-right distribution to sample; "
      "fix: a checkpoint of objective=autoregressive"
    )


def held_out(settings: Settings, trained, palette):
  """Tokens [N, T] and pictures [N, H, W, 3] (as the palette shows them) of the test split."""
  data_config = settings.data
  split = open_split(data_config, "test")
  wanted = min(settings.sample.completions, len(split))
  # Spread over the split: neighbours are often alike.
  order = np.random.default_rng(settings.seed).permutation(len(split))[:wanted]
  tokens = streams.tokens_of(split.select(np.sort(order)), data_config, palette)
  side = settings.data.resolution
  return tokens, palette.decode(tokens).reshape(-1, side, side, 3), split.fingerprint
