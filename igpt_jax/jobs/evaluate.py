"""Exact likelihood of a split, every image once, beside baselines.

Writes evaluation.json: `nats_per_token`, `bits_per_token`, of raw RGB `bits_per_dim`, and the baselines on
the same tokens: uniform, unigram (the frequency of colours, or of levels whatever the channel) and
per-position unigram (their frequency at a pixel, and channel). A BERT model's is the mean over `masks_counted`,
the masks that hide at least one pixel.
"""

import functools
import math
import os
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax import units
from igpt_jax.config.fields import Settings
from igpt_jax.data.sources import DataConfig, Split, open_split
from igpt_jax.errors import NoSuchSplit, UserError
from igpt_jax.parallel import hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress, summary
from igpt_jax.training.evaluation import LikelihoodEvaluator, count_tokens, counting, unigram_nats
from igpt_jax.training.objectives import make_objective
from igpt_jax.workspace import checkpoint_tokens, devices, provenance, streams, watch, weights

_TIMED_BATCHES = 9  # read once more, to know how long counting takes


def run(settings: Settings, workdir: str, mesh: Mesh | None = None) -> None:
  """Evaluates `checkpoint` (or the workdir's newest) on `evaluate.split`; watching, every checkpoint."""
  one = functools.partial(evaluate, mesh=mesh)
  watch.run(settings, workdir, "evaluation.json", one, depends_on)


def depends_on(settings: Settings) -> dict[str, Any]:
  """Returns all that decides evaluation.json except the checkpoint."""
  counted_on = ["train"] if _counted_on(settings.data) else []
  return {
    "data": provenance.of_data(settings.data, [settings.evaluate.split, *counted_on]),
    **provenance.of_settings(settings, ["evaluate"], without=["evaluate.batch_size"]),
  }


def evaluate(settings: Settings, workdir: str, out: str, mesh: Mesh | None = None) -> None:
  """Evaluates one checkpoint; results go to `out`."""
  any_mesh = mesh or devices.mesh_of(settings)
  sharding.batch_size_per_shard(any_mesh, settings.evaluate.batch_size, "evaluate.batch_size")
  own, data_config = settings.evaluate, settings.data
  split = open_split(data_config, own.split)
  train_split = _counted_on(data_config)
  if train_split is None:
    say(
      "baselines: counted on the evaluated images themselves, which flatters them: there is no train"
    )
  trained, mesh = weights.load_model(settings, workdir, mesh, needs_images=not split.is_tokens)
  model = trained.config
  spec = model.tokens if split.is_tokens else checkpoint_tokens.tokens_of(trained)
  if split.max_token >= spec.n_vocab:
    raise UserError(
      f"data.path: {data_config.path} has tokens up to {split.max_token}; expected less "
      f"than {spec.n_vocab}, the size of the checkpoint's palette"
    )

  def stream(of: Split, limit: int = 0):
    return streams.eval_stream(of, data_config, spec, mesh, own.batch_size, limit)

  objective_name = trained.run["objective"]
  objective = make_objective(objective_name, trained.run["mask_probability"])
  likelihood = LikelihoodEvaluator(model, objective, mesh)
  total = min(len(split), own.images or len(split))
  masks = own.masks if objective_name == "masked" else 1
  counting_seconds = _tell_cost(settings, split.name, total, train_split, stream)
  then = ("baselines", counting_seconds) if counting_seconds else ("", 0.0)
  what = f"{split.name}: {units.counted(total, 'image')}"
  clock = progress.Countdown(what, total, say, then=then)
  counts = np.zeros((model.n_positions * spec.codes, spec.n_vocab), np.int64)
  report = clock.batches(own.batch_size)
  with stream(split, own.images) as batches:
    counted = counting(batches, counts)
    nats, images, predicted = likelihood(trained.params, counted, masks=masks, report=report)
  if not predicted:
    raise UserError(
      f"evaluate.masks: {masks} of each of {images:,} images, and not a pixel was masked, each with "
      f"probability {trained.run['mask_probability']:g}: there is no likelihood to tell; expected at "
      "least one; fix: more evaluate.masks, or more images (evaluate.images)"
    )

  values = {
    "checkpoint": trained.path,
    "step": trained.step,
    "parameters": weights.checksum_of(trained),
    "objective": objective_name,
    "data": split.fingerprint,
    "images": images,
    "nats_per_token": nats,
    "bits_per_token": nats / math.log(2),
    **baselines(settings, train_split, stream, all_hosts(counts, mesh), spec.codes, mesh),
  }
  bits = model.bits_per_dim(nats)
  if bits is not None:
    values["bits_per_dim"] = bits
  if objective_name == "masked":
    values["masks_per_picture"] = masks
    values["masks_counted"] = predicted
  values["below_position_unigram"] = 1 - nats / values["position_unigram"]
  if hosts.is_main():
    summary.write_json(os.path.join(out, "evaluation.json"), values)
    summary.write_summary(out)
  hiding = "" if predicted == images * masks else f", of which {predicted:,} masks hide something"
  say(
    f"{split.name}: {nats:.4f} nats/token ({values['bits_per_token']:.4f} bits/token"
    f"{'' if bits is None else f', {bits:.4f} bits/dim'}) over "
    f"{units.counted(images, 'image')}{hiding}\n"
    f"  uniform {values['uniform']:.4f}, unigram {values['unigram']:.4f}, per-position unigram "
    f"{values['position_unigram']:.4f} (counted on {values['baselines_counted_on']}): "
    f"{values['below_position_unigram']:.1%} below the last"
  )


def _tell_cost(
  settings: Settings, name: str, total: int, train_split: Split | None, stream
) -> float:
  """Says what will be evaluated and counted; returns about how many seconds the counting takes."""
  own = settings.evaluate
  if train_split is None:
    say(f"evaluate: the model on {units.counted(total, 'image')} of {name}")
    return 0.0
  counted = min(len(train_split), own.baseline_images or len(train_split))
  say(
    f"evaluate: the model on {units.counted(total, 'image')} of {name}, then baselines counted on "
    f"{units.counted(counted, 'image')} of train"
  )
  timed = _TIMED_BATCHES * own.batch_size
  if counted <= timed:
    return 0.0
  with stream(train_split, timed) as batches:
    next(batches)  # the first one comes when all threads have been started
    began = time.monotonic()
    rest = sum(1 for _ in batches)
  return (time.monotonic() - began) / rest * counted / own.batch_size


def _counted_on(data_config: DataConfig) -> Split | None:
  """Returns train, which unigrams are counted on; None if the data has no such split."""
  try:
    return open_split(data_config, "train")
  except NoSuchSplit:
    return None


def baselines(
  settings: Settings, train_split: Split | None, stream, test: np.ndarray, codes: int, mesh: Mesh
) -> dict[str, float | str]:
  """Returns nats per token of the split under distributions without context.

  They are counted on training images; without any, on the evaluated ones, which flatters them. `test`
  has the counts of every code of the tokens at the split's positions, [T · codes, V].
  """
  places, n_vocab = test.shape
  if train_split is None:
    train, source = test, "the evaluated tokens themselves"
  else:
    own = settings.evaluate
    n = min(len(train_split), own.baseline_images or len(train_split))
    clock = progress.Countdown(f"baselines: {units.counted(n, 'image')} of train", n, say)
    with stream(train_split, own.baseline_images) as batches:
      counted = count_tokens(clock.over(batches, own.batch_size), n_vocab, places)
    train = all_hosts(counted, mesh)
    source = f"{int(train[0].sum()):,} images of {train_split.fingerprint}"
  return {
    "uniform": codes * math.log(n_vocab),
    "unigram": codes * unigram_nats(train.sum(0), test.sum(0)),
    "position_unigram": codes * unigram_nats(train, test),
    "baselines_counted_on": source,
  }


def all_hosts(counts: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Returns the sum over all shares of the input; processes that read the same share count once."""
  if jax.process_count() == 1:
    return counts
  alike = jax.process_count() // sharding.input_share(mesh)[1]
  return hosts.gathered(counts, "the tokens' counts").sum(0) // alike
