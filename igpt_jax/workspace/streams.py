"""Batches of images to evaluate, the same on any number of hosts."""

import contextlib

import numpy as np
from jax.sharding import Mesh

from igpt_jax.data import pipeline
from igpt_jax.data.sources import DataConfig, Split
from igpt_jax.parallel.sharding import input_share
from igpt_jax.tokens import TokenSpec
from igpt_jax.workspace import agreement


@contextlib.contextmanager
def eval_stream(
  split: Split,
  data_config: DataConfig,
  spec: TokenSpec | None,
  mesh: Mesh,
  batch_size: int,
  limit: int = 0,
  images: bool = False,
  start: int = 0,
):
  """Yields this host's batches of the first `limit` images (0: all), without the first `start` batches.

  The last batch is padded; `mask` is False there.

  Raises:
    UserError: another host has other data.
  """
  agreement.check_data(split.fingerprint)
  share, shares = input_share(mesh)
  with pipeline.eval_batches(
    split,
    data_config,
    spec,
    batch_size=batch_size,
    process_index=share,
    process_count=shares,
    images=images,
    start=start,
  ) as stream:
    total = limit or len(split)
    yield _first(stream, -(-total // batch_size) - start, total)


def _first(stream, n_batches: int, limit: int):
  for _, batch in zip(range(n_batches), stream, strict=False):
    yield {**batch, "mask": batch["mask"] & (batch["index"] < limit)}


def tokens_of(split: Split, data_config: DataConfig, spec: TokenSpec | None) -> np.ndarray:
  """Returns all readable images of a small split as tokens, uint16 [N, T] or [N, T, codes], on every process."""
  with pipeline.eval_batches(split, data_config, spec, batch_size=len(split)) as stream:
    batch = next(stream)
  return batch["tokens"][batch["mask"]]
