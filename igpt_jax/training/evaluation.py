"""Likelihood of a stream of batches: masked sums on the device, and one transfer at the end."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax.model.image_gpt import Params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import sharding
from igpt_jax.training.objectives import Objective
from igpt_jax.training.state import param_shardings
from igpt_jax.training.step import Metrics, make_eval_step, make_likelihood

EVAL_SEED = 0  # seed of an image's first mask (BERT); its further masks count up from it


class Result(NamedTuple):
  """Likelihood of some images.

  Attributes:
    nats_per_token: mean over the predictions; nan if there are none.
    images: number of images.
    predicted: number of predictions that the mean is over: one per image; with BERT one per mask that
      hides something.
  """

  nats_per_token: float
  images: int
  predicted: int


def sum_metrics(computed: Iterable[Metrics]) -> dict[str, float]:
  """Sums metrics that are dispatched one after the other; {} if there are none.

  The host runs ahead of the devices by one batch, no more.
  """
  dispatched: list[Metrics] = []
  for metrics in computed:
    dispatched.append(metrics)
    if len(dispatched) >= 2:
      jax.block_until_ready(dispatched[-2])
  fetched = jax.device_get(dispatched)
  names = fetched[0] if fetched else ()
  return {name: sum(float(metrics[name]) for metrics in fetched) for name in names}


class LikelihoodEvaluator:
  """Evaluator of images' mean nats per token under a model; compiled once for each batch shape.

  Args:
    config: the model's.
    objective: the loss to evaluate.
    mesh: the mesh of parameters and batches.
  """

  def __init__(self, config: ImageGPTConfig, objective: Objective, mesh: Mesh):
    self._mesh = mesh
    everywhere = sharding.replicated(mesh)
    shardings = param_shardings(config, mesh), sharding.sharding(mesh, "batch"), everywhere
    eval_step, likelihood = make_eval_step(config, objective), make_likelihood(config, objective)
    self._step = jax.jit(eval_step, in_shardings=shardings, out_shardings=everywhere)
    self._each = jax.jit(likelihood, in_shardings=shardings, out_shardings=everywhere)

  def __call__(
    self,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    masks: int = 1,
    report: Callable[[int], None] | None = None,
  ) -> Result:
    """Evaluates every image, once under each of its masks.

    Args:
      params: the parameters, on the mesh.
      batches: this host's rows: `tokens`, `mask` (which rows count) and `index` (the image's).
      masks: number of masks that the objective draws per image, if it draws any.
      report: called with the number of batches done.
    """

    def computed() -> Iterator[Metrics]:
      keys = [self._key(n) for n in range(masks)]
      for done, batch in enumerate(batches, 1):
        rows = self._put(batch)
        for key in keys:
          yield self._step(params, rows, key)
        if report is not None:
          report(done)

    with jax.set_mesh(self._mesh):
      totals = sum_metrics(computed())
    if not totals.get("images"):
      raise ValueError("no images to evaluate")
    nats = mean_nats(totals["nats"], totals["predicted"])
    return Result(nats, round(totals["images"] / masks), round(totals["predicted"]))

  def each(
    self, params: Params, batches: Iterable[Mapping[str, np.ndarray]]
  ) -> Iterator[np.ndarray]:
    """Yields nats per token of the images of each batch that `mask` counts, float32 [n], under one mask.

    nan where a mask hides nothing. Arguments are those of `__call__`; in one process alone.
    """
    for batch in batches:
      with jax.set_mesh(self._mesh):
        computed = self._each(params, self._put(batch), self._key(0))
      nats, predicted = jax.device_get(computed)
      yield np.where(predicted > 0, nats, np.float32(np.nan))[batch["mask"]]

  def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    fields = {name: batch[name] for name in ("tokens", "mask", "index")}
    return sharding.put_batch(fields, self._mesh)

  def _key(self, number: int) -> jax.Array:
    """Returns the key of all images' masks of a number."""
    key = jax.random.key(EVAL_SEED + number)
    return jax.device_put(key, sharding.replicated(self._mesh))


def mean_nats(nats: float, predicted: float) -> float:
  """Mean nats per token over the predictions; nan if there are none, as no mask hid a pixel."""
  return nats / predicted if predicted else math.nan


def unigram_nats(train_counts: np.ndarray, test_counts: np.ndarray) -> float:
  """Nats per code of test tokens under add-one-smoothed frequencies of training tokens.

  Args:
    train_counts: [V], or [P, V] for one distribution per place.
    test_counts: same shape.
  """
  smoothed = train_counts.astype(np.float64) + 1.0
  log_probability = np.log(smoothed) - np.log(smoothed.sum(-1, keepdims=True))
  return float(-(test_counts * log_probability).sum() / test_counts.sum())


def counting(
  batches: Iterable[Mapping[str, np.ndarray]], counts_PxV: np.ndarray
) -> Iterator[Mapping[str, np.ndarray]]:
  """Passes batches on, and adds the counts of every place's codes to `counts_PxV`; masked rows don't count.

  A place is one of a position's codes: of tokens [B, T] there are P = T, of [B, T, codes] T · codes.
  """
  n_places, n_vocab = counts_PxV.shape
  places = np.arange(n_places)
  for batch in batches:
    tokens = batch["tokens"].astype(np.int64)
    if "mask" in batch:
      tokens = tokens[batch["mask"]]
    flat = (places * n_vocab + tokens.reshape(len(tokens), n_places)).ravel()
    counts_PxV += np.bincount(flat, minlength=counts_PxV.size).reshape(counts_PxV.shape)
    yield batch


def count_tokens(
  batches: Iterable[Mapping[str, np.ndarray]], n_vocab: int, n_places: int
) -> np.ndarray:
  """Counts the codes of every place, int64 [P, V], as `counting` does."""
  counts = np.zeros((n_places, n_vocab), np.int64)
  for _ in counting(batches, counts):
    pass
  return counts
