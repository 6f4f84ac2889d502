"""Batches: shuffled, augmented, encoded, and divided among hosts.

A batch depends on its step alone, so that the position in the stream is one integer and no iterator's
state needs saving. A batch is a dict of numpy arrays with this host's rows of the global batch; the
rows of all hosts in order are the same global batch for any number of hosts.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from igpt_jax import errors, watchdog
from igpt_jax.data import image_decoding, sources
from igpt_jax.data import order as order_lib
from igpt_jax.data.loader import Loader, tolerance
from igpt_jax.tokens import TokenSpec

# --- positions -------------------------------------------------------------------------------------


def position(split: sources.Split, *, batch_size: int, seed: int, step: int) -> dict[str, Any]:
  """Returns the data position that a checkpoint stores: JSON, the same for any number of hosts."""
  return {
    "next_index": step * batch_size,
    "batch_size": batch_size,
    "seed": seed,
    "fingerprint": split.fingerprint,
    "former_fingerprint": split.former_fingerprint,
  }


def check_position(saved: dict[str, Any], current: dict[str, Any]) -> int:
  """Returns the step to resume from, if `saved` is a position in the stream that `current` describes.

  Older checkpoints, which lack `former_fingerprint`, hold that instead of a digest of the contents.

  Raises:
    UserError: another data set, split, seed or batch size; continuing would silently be another run.
  """
  is_older = "former_fingerprint" not in saved
  if is_older and saved.get("fingerprint") == current["former_fingerprint"]:
    logging.getLogger(__name__).warning(
      "the checkpoint knows its data by names alone (%s), from now on by contents: %s",
      saved["fingerprint"],
      current["fingerprint"],
    )
    saved = saved | {"fingerprint": current["fingerprint"]}
  fix = "restore that data or setting"
  if str(saved.get("fingerprint")).startswith("folder:"):  # 0.1.0 read fewer files of a folder
    fix += " (images at any depth, and without a known suffix, count now)"
  names = {"fingerprint": "data set", "batch_size": "batch size", "seed": "data seed"}
  for key, name in names.items():
    if saved.get(key) != current[key]:
      raise errors.UserError(
        f"{name}: {current[key]}; expected {saved.get(key)}, which the checkpoint was trained with; "
        f"fix: {fix}, or start in another workdir"
      )
  step, rest = divmod(saved["next_index"], saved["batch_size"])
  if rest:
    raise errors.UserError(
      f"data position: {saved['next_index']}; expected a multiple of the batch size {saved['batch_size']}"
    )
  return step


# --- iterators -------------------------------------------------------------------------------------


class Batches:
  """Iterator of batches that counts damaged records. Close it, or use it as a context manager.

  Attributes:
    bad: the reason for every record so far that could not be read, by the record's name.
    wait_seconds: total time spent waiting in `next`.
  """

  def __init__(
    self,
    iterator,
    loader: Loader,
    split: sources.Split,
    config: sources.DataConfig,
    stream: order_lib.Stream | None = None,
  ):
    self._running = [iterator]
    self._stream = stream
    self._newest: np.ndarray | None = None
    self._loader = loader
    self._split = split
    self._config = config
    self.bad: dict[str, str] = {}
    self._bad_indices: set[int] = set()
    self.wait_seconds = 0.0
    self._taken = 0
    # In case it isn't closed: worker processes that the interpreter ends at exit print errors.
    self._close = weakref.finalize(self, _stop, self._running)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._running:
      raise ValueError("these batches are closed")
    watchdog.beat("waiting for data")
    start = time.perf_counter()
    batch = next(self._running[0])
    self.wait_seconds += time.perf_counter() - start
    watchdog.beat("computing")
    self._newest = batch["index"]
    self._taken += 1
    n_bad = batch.pop("n_bad")
    for row in np.flatnonzero(n_bad):
      for offset in range(n_bad[row]):
        self._note((int(batch["index"][row]) + offset) % len(self._split))
    return batch

  def place(self) -> dict[str, str]:
    """Describes the newest batch's place in the training stream, in the same words on all hosts."""
    if self._stream is None or self._newest is None:
      raise ValueError("place: no batch of a training stream was read yet")
    return {"data": self._split.fingerprint, **self._stream.place(self._taken - 1, self._newest)}

  def _note(self, index: int) -> None:
    if index in self._bad_indices:
      return
    self._bad_indices.add(index)
    try:
      self._loader.load(index, np.random.default_rng(0))
      reason = f"{self._split.name}[{index}]: unreadable once, readable now"
    except image_decoding.BadRecord as error:
      reason = str(error)
    self.bad[f"{self._split.name}[{index}]"] = reason
    tolerated = tolerance(len(self._split), self._config)
    if len(self.bad) > tolerated:
      shown = "; ".join(list(self.bad.values())[-3:])
      raise errors.UserError(
        f"unreadable records: {len(self.bad)} of {len(self._split)} in {self._split.fingerprint} "
        f"({shown}); expected at most {tolerated} (data.max_bad={self._config.max_bad:g}); "
        "fix: repair or remove them, or raise data.max_bad"
      )
    logging.getLogger(__name__).warning("skipped %s (%d so far)", reason, len(self.bad))

  def close(self) -> None:
    """Stops threads and worker processes."""
    self._close()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()


def _stop(running: list) -> None:
  iterator = running.pop()
  iterator.close()
  del iterator
  gc.collect()  # grain closes some of its threads and processes only when it is collected


def train_batches(
  split: sources.Split,
  config: sources.DataConfig,
  spec: TokenSpec | None,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  images: bool = False,
  augment: bool = True,
) -> Batches:
  """Returns the endless training stream from `start_step` on.

  Every epoch is a new permutation with new augmentations; batches straddle epochs, so no record is
  padded or dropped. The order depends on the seed and the data alone, not on hosts, workers or
  threads. A damaged record is replaced by the one after it.

  Args:
    split: the split to read.
    config: resolution, augmentation, and numbers of workers and threads.
    spec: what tokens are made of images; None for images instead. Ignored if the records are tokens.
    batch_size: size of the global batch, over all hosts.
    seed: seed of order and augmentation.
    start_step: number of global batches to skip, at no cost.
    process_index, process_count: number of this host, and of all hosts.
    images: True to add the images to the tokens.
    augment: False for images as in evaluation, but in the order of training.

  Yields:
    {"tokens": uint16 [B / hosts, T], or [B / hosts, T, codes], "label": int32 [B / hosts], "index": int32
    [B / hosts]} and, without `spec` or with `images`, "image": uint8 [B / hosts, R, R, 3]. `index` is the drawn
    record's index in the split.

  Raises:
    UserError: while iterating, more damaged records than config.max_bad allows.
  """
  rows = _rows_of_host(batch_size, process_count)
  loader = Loader(split, config, spec, train=augment, images=images or spec is None)
  order = order_lib.train_order(len(split), seed)
  dataset = order.random_map(loader.train_element).batch(rows, drop_remainder=True, batch_fn=_stack)
  dataset = dataset[start_step * process_count + process_index :: process_count]
  stream = order_lib.Stream(order, seed, start_step, process_index, process_count)
  return Batches(_start(dataset, config), loader, split, config, stream)


def eval_batches(
  split: sources.Split,
  config: sources.DataConfig,
  spec: TokenSpec | None,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  images: bool = False,
  start: int = 0,
) -> Batches:
  """Returns every image of the split exactly once, in the split's order, without augmentation.

  All hosts yield the same number of batches; rows past the end and damaged records have mask False.
  Arguments and errors are those of `train_batches`; `start` is the number of global batches to skip.

  Yields:
    As `train_batches`, and "mask": bool [B / hosts]. `index` is -1 in rows past the end.
  """
  import grain

  rows = _rows_of_host(batch_size, process_count)
  loader = Loader(split, config, spec, train=False, images=images or spec is None)
  n_batches = -(-len(split) // batch_size)
  indices = grain.MapDataset.range(n_batches * batch_size)
  dataset = indices.map(loader.eval_element).batch(rows, batch_fn=_stack)
  dataset = dataset[start * process_count + process_index :: process_count]
  return Batches(_start(dataset, config), loader, split, config)


def image_stream(
  split: sources.Split,
  config: sources.DataConfig,
  *,
  augment: bool,
  seed: int = 0,
  batch_size: int = 128,
) -> Iterator[np.ndarray]:
  """Yields the split's images once, uint8 [n, R, R, 3], augmented in training order or as in evaluation."""
  if not augment:
    with eval_batches(split, config, None, batch_size=batch_size) as batches:
      for batch in batches:
        yield batch["image"][batch["mask"]]
    return
  left = len(split)
  with train_batches(split, config, None, batch_size=batch_size, seed=seed) as batches:
    while left > 0:
      images = next(batches)["image"][:left]
      left -= len(images)
      yield images


def _stack(elements: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
  return {key: np.stack([e[key] for e in elements]) for key in elements[0]}


def _rows_of_host(batch_size: int, process_count: int) -> int:
  rows, rest = divmod(batch_size, process_count)
  if rest or not rows:
    raise errors.UserError(
      f"batch size: {batch_size}; expected a multiple of the {process_count} hosts that share it"
    )
  return rows


def _start(dataset, config: sources.DataConfig):
  """Starts threads or processes on a dataset whose elements are batches; returns its iterator."""
  import grain

  threads = config.threads or (1 if config.workers else max(1, min(8, (os.cpu_count() or 2) - 1)))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  dataset = dataset.to_iter_dataset(options)
  if config.workers:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads absl flags, which a plain script doesn't parse
      flags.FLAGS.mark_as_parsed()
    # Send batches through pipes: shared memory is faster only for far larger ones, and batches that
    # nobody has taken when it ends are reported as leaked.
    options = grain.experimental.DatasetOptions(min_shm_size=2**40)
    dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
  return iter(dataset)
