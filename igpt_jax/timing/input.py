"""Cost of the input pipeline on this machine, from stored bytes to tokens, stage by stage.

CPU time, not wall-clock, so that a busy machine misleads less.
"""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from igpt_jax.data import image_decoding, own_images, pipeline, sources, transforms
from igpt_jax.data import palette as palette_lib
from igpt_jax.tokens import TokenSpec


@dataclasses.dataclass(frozen=True)
class Cost:
  """CPU milliseconds per image of a stage."""

  stage: str
  cpu_ms: float


@dataclasses.dataclass(frozen=True)
class Throughput:
  """CPU milliseconds per image, all processes together, and speed of a pipeline of `workers` processes."""

  pipeline: str
  workers: int
  cpu_ms: float
  images_per_second: float


def stages(
  split: sources.Split,
  config: sources.DataConfig,
  spec: TokenSpec,
  *,
  n_images: int = 200,
  repeats: int = 3,
) -> list[Cost]:
  """Measures every stage by itself on the first images of a split, the best of `repeats` passes."""
  records = [split[i] for i in range(min(n_images, len(split)))]
  decode = own_images.read if split.is_folder else image_decoding.decode
  images = [decode(r["image"], r["id"]) for r in records]
  rng = np.random.default_rng(0)
  make = transforms.train_transform(config.augment, config.resolution, config.resample)
  evaluate = transforms.eval_transform(config.augment, config.resolution)
  ready = [make(image, rng) for image in images]
  for image in ready:
    spec.encode(image)  # fills a palette's table of colours, which happens once per run
  measured: list[tuple[str, Callable, Sequence]] = [
    ("read", split.__getitem__, range(len(records))),
    ("decode", lambda r: decode(r["image"], r["id"]), records),
    ("decode with Pillow", lambda r: _decode_pillow(r["image"]), records),
    (f"augment ({config.augment}, {config.resample})", lambda x: make(x, rng), images),
    ("evaluate", evaluate, images),
    ("encode", spec.encode, ready),
  ]
  return [Cost(name, _best(function, items, repeats)) for name, function, items in measured]


def throughput(
  split: sources.Split,
  config: sources.DataConfig,
  spec: TokenSpec,
  *,
  batch_size: int = 128,
  n_batches: int = 20,
) -> Throughput:
  """Measures the whole training pipeline, bytes to batches of tokens, without its start-up.

  Args:
    split: images, or tokens.
    config: settings of the pipeline; nothing is cached, whatever it says.
    spec: what the tokens are; without a palette where the split has tokens already.
    batch_size: global.
    n_batches: number of batches that are timed.
  """
  name = "tokens" if split.is_tokens else f"{config.augment}, {config.resample}"
  config = dataclasses.replace(config, cache_mb=0)
  # The table of colours is filled once per run, not per image. (Every worker fills its own.)
  if spec.palette is not None:
    spec.palette.encode(palette_lib.codes_to_colors(np.arange(2**24)))
  with pipeline.train_batches(split, config, spec, batch_size=batch_size, seed=0) as batches:
    for _ in range(2 + 4 * config.workers):
      next(batches)
    cpu, wall = _cpu_seconds(), time.perf_counter()
    for _ in range(n_batches):
      next(batches)
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
  n = n_batches * batch_size
  return Throughput(name, config.workers, 1e3 * cpu / n, n / wall)


def _decode_pillow(data: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _best(function: Callable, items: Sequence, repeats: int) -> float:
  times = []
  for _ in range(repeats):
    start = time.process_time()
    for item in items:
      function(item)
    times.append(time.process_time() - start)
  return 1e3 * min(times) / len(items)


def _cpu_seconds() -> float:
  """CPU time of this process, its threads and its living worker processes."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    with open(f"/proc/{child.pid}/stat") as file:  # Linux only, as are the machines to train on
      fields = file.read().rpartition(")")[2].split()
    total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
  return total
