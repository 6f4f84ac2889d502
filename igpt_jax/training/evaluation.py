"""Likelihood of a stream of batches: masked sums on the device, one transfer at the end."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax.model.image_gpt import ImageGPTConfig, Params
from igpt_jax.parallel import sharding
from igpt_jax.training.objectives import Objective
from igpt_jax.training.state import param_shardings
from igpt_jax.training.step import make_eval_step

EVAL_SEED = 0  # of an image's first mask (BERT); those after it count up: the same in every run


class Result(NamedTuple):
  """The likelihood of some images.

  Attributes:
    nats_per_token: mean over what was predicted; nan: nothing was.
    images: how many there were.
    predicted: what the mean is over: each image once; BERT: an image's masks that hide something.
  """

  nats_per_token: float
  images: int
  predicted: int


class LikelihoodEvaluator:
  """Mean nats per token of images under a model; compiled once, for one batch shape.

  Args:
    config: the model.
    objective: what is measured.
    mesh: where parameters and batches lie.
  """

  def __init__(self, config: ImageGPTConfig, objective: Objective, mesh: Mesh):
    self._mesh = mesh
    self._step = jax.jit(
      make_eval_step(config, objective),
      in_shardings=(
        param_shardings(config, mesh),
        sharding.sharding(mesh, "batch"),
        sharding.replicated(mesh),
      ),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(
    self,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    masks: int = 1,
    report: Callable[[int], None] | None = None,
  ) -> Result:
    """Evaluates every image once; under several masks, once under each.

    Args:
      params: the parameters, on the mesh.
      batches: this host's rows: `tokens`, `mask` (which rows count) and `index` (of the image).
      masks: that the objective draws of each image, if it draws any.
      report: called with the number of batches done, now and then.
    """
    sums = []
    everywhere = sharding.replicated(self._mesh)
    with jax.set_mesh(self._mesh):
      keys = [jax.device_put(jax.random.key(EVAL_SEED + n), everywhere) for n in range(masks)]
      for done, batch in enumerate(batches, 1):
        wanted = {name: batch[name] for name in ("tokens", "mask", "index")}
        rows = sharding.put_batch(wanted, self._mesh)
        for key in keys:
          sums.append(self._step(params, rows, key))
          if len(sums) >= 2:
            jax.block_until_ready(sums[-2])  # so that the host runs ahead by one, no more
        if report is not None:
          report(done)
    fetched = jax.device_get(sums)
    nats, images, predicted = (
      sum(float(each[name]) for each in fetched) for name in ("nats", "images", "predicted")
    )
    if not images:
      raise ValueError("no images to evaluate")
    return Result(mean_nats(nats, predicted), round(images / masks), round(predicted))


def mean_nats(nats: float, predicted: float) -> float:
  """Nats per token, the mean over what was predicted; nan: nothing was, for no mask hid a pixel."""
  return nats / predicted if predicted else math.nan


def unigram_nats(train_counts: np.ndarray, test_counts: np.ndarray) -> float:
  """Nats per token of test tokens under add-one-smoothed frequencies of training tokens.

  Args:
    train_counts: [V], or [T, V] for one distribution per position.
    test_counts: same shape.
  """
  smoothed = train_counts.astype(np.float64) + 1.0
  log_probability = np.log(smoothed) - np.log(smoothed.sum(-1, keepdims=True))
  return float(-(test_counts * log_probability).sum() / test_counts.sum())


def counting(
  batches: Iterable[Mapping[str, np.ndarray]], counts_TxV: np.ndarray
) -> Iterator[Mapping[str, np.ndarray]]:
  """Passes batches on, adding to `counts_TxV` how often each token occurs at each position.

  Rows masked out don't count.
  """
  n_positions, n_vocab = counts_TxV.shape
  positions = np.arange(n_positions)
  for batch in batches:
    tokens = batch["tokens"].astype(np.int64)
    if "mask" in batch:
      tokens = tokens[batch["mask"]]
    flat = (positions * n_vocab + tokens).ravel()
    counts_TxV += np.bincount(flat, minlength=counts_TxV.size).reshape(counts_TxV.shape)
    yield batch


def count_tokens(
  batches: Iterable[Mapping[str, np.ndarray]], n_vocab: int, n_positions: int
) -> np.ndarray:
  """How often each token occurs at each position, int64 [T, V]; rows masked out don't count."""
  counts = np.zeros((n_positions, n_vocab), np.int64)
  for _ in counting(batches, counts):
    pass
  return counts
