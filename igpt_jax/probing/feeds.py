"""Inputs of probes by gradient descent: features stored on disk, or images whose features the step computes.

All feeds have `groups`, the classifiers of the features; `frozen`, arrays on the mesh that the step needs;
`fields` of a batch; `extract`, (frozen, batch) -> features; `training`, the endless shuffled stream;
and `rows_of`, one pass over a split in order.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from igpt_jax import units, watchdog
from igpt_jax.config.fields import Settings
from igpt_jax.data import order, pipeline
from igpt_jax.parallel import sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.probing import sets
from igpt_jax.probing.attentive import Attentive, heads_of
from igpt_jax.probing.features import pooled_features
from igpt_jax.probing.sets import PCA, PIXELS, RANDOM, Source
from igpt_jax.probing.sgd import Features, Group, Groups, Linear
from igpt_jax.workspace import checkpoint_tokens, streams

_Rows = Generator[dict[str, np.ndarray], None, None]

LAYERS = "layer"
_PCA_IMAGES = 20_000
_MOMENTS = "moments"
_MOMENT_IMAGES = 2_048
_EPSILON = 1e-6  # AIM's


def open_feed(
  settings: Settings, workdir: str, source: Source
) -> "StoredFeed | ImageFeed | PositionFeed":
  """Returns the feed that `config.probe.cached` and `pooling` select."""
  attentive = settings.probe.pooling == "attentive"
  if attentive and settings.probe.cached:
    kinds = 2 if RANDOM in source.baselines else 1
    rows = kinds * len(source.features.layers) * sum(source.rows(name) for name in sets.SPLITS)
    size = 4 * rows * settings.data.resolution**2 * source.trained.config.n_embd
    say(
      f"attentive: stores the features of every pixel, {units.data_size(size)} on disk; "
      "config.features.layers makes them fewer, config.probe.cached=False computes them anew"
    )
  feed = (StoredFeed if settings.probe.cached else ImageFeed)(settings, workdir, source)
  return PositionFeed(feed, settings, source) if attentive else feed


def by_position(source: Source) -> Source:
  """Returns the source of features that aren't pooled over pixels: each is a block of the grid."""
  model = source.trained.config
  side = model.tokens.side(model.n_positions)
  return dataclasses.replace(source, features=dataclasses.replace(source.features, grid=side))


def groups_of(settings: Settings, source: Source) -> Groups:
  """Classifiers that are trained, by the features that they are trained on; computes no feature.

  Pixels and their principal components have linear ones, whatever the layers' are.
  """
  pixels = settings.data.resolution**2 * 3
  model = source.trained.config
  sets_of_layers, width = len(source.features.layers), model.n_embd
  layers: Group = Linear(sets_of_layers, source.features.grid**2 * width)
  if settings.probe.pooling == "attentive":
    heads = heads_of(settings.probe.heads, width, model.n_head)
    layers = Attentive(sets_of_layers, width, heads)
  baselines = {RANDOM: layers, PIXELS: Linear(1, pixels), PCA: Linear(1, min(width, pixels))}
  return {LAYERS: layers, **{name: baselines[name] for name in source.baselines}}


def _pixel_features(groups: Groups, frozen: dict, images: jax.Array) -> Features:
  """Features of the baselines made of pixels, each [1, B, W]."""
  pixels = images.reshape(len(images), -1).astype(jnp.float32) / 127.5 - 1
  features = {PIXELS: pixels[None]} if PIXELS in groups else {}
  if PCA in groups:
    axes = frozen[PCA]
    features[PCA] = ((pixels - axes["mean"]) @ axes["components"].T)[None]
  return features


def _axes(source: Source, images: np.ndarray) -> dict:
  """Principal axes of training images, replicated over the mesh."""
  pca = sets.fit_pca(images, source.trained.config.n_embd)
  mean, components = (np.asarray(array, np.float32) for array in (pca.mean_, pca.components_))
  axes = {"mean": mean, "components": components}
  return jax.device_put(axes, sharding.replicated(source.mesh))


class StoredFeed:
  """Features computed once and stored, for all processes to read."""

  def __init__(self, settings: Settings, workdir: str, source: Source):
    self._settings, self._source = settings, source
    self._stores = sets.compute(settings, workdir, source)
    self.groups = groups_of(settings, source)
    with_images = bool({PIXELS, PCA} & set(self.groups))
    self.fields = ("label", *self._stores, *(["image"] if with_images else []))
    train = self._stores[LAYERS]["train"]
    self._train = np.flatnonzero(train.labels() >= 0)
    self.frozen = {}
    if PCA in self.groups:
      self.frozen[PCA] = _axes(source, train.images()[self._train[:_PCA_IMAGES]])

  def extract(self, frozen: dict, batch) -> Features:
    features = {name: jnp.swapaxes(batch[name], 0, 1) for name in self._stores}
    if "image" in batch:
      features.update(_pixel_features(self.groups, frozen, batch["image"]))
    return features

  def _read(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    watchdog.beat("computing")
    batch = {
      name: np.stack([stores[split].layer(n)[rows] for n in self._source.features.layers], axis=1)
      for name, stores in self._stores.items()
    }
    batch["label"] = self._stores[LAYERS][split].labels()[rows]
    if "image" in self.fields:
      batch["image"] = self._stores[LAYERS][split].images()[rows]
    return batch

  def training(self, start_step: int) -> "_Shuffled":
    return _Shuffled(self, start_step)

  def rows_of(self, split: str) -> _Rows:
    size = self._settings.probe.batch_size
    share, shares = sharding.input_share(self._source.mesh)
    local = size // shares
    total = len(self._stores[LAYERS][split].labels())
    for first in range(0, total, size):
      rows = np.arange(first + share * local, first + (share + 1) * local)
      inside = rows < total
      batch = self._read(split, np.where(inside, rows, 0))
      yield {**batch, "mask": inside & (batch["label"] >= 0)}


class _Shuffled:
  """Stored features in the order and with the interface of `pipeline.train_batches`."""

  def __init__(self, feed: StoredFeed, start_step: int):
    self._feed, self._step = feed, start_step
    self._size = feed._settings.probe.batch_size
    self._order = order.train_order(len(feed._train), feed._settings.seed)
    self._share = sharding.input_share(feed._source.mesh)
    self.wait_seconds = 0.0  # nothing is read ahead, so there is nothing to wait for

  def place(self) -> dict[str, str]:
    """The newest batch's place in the data, as of `pipeline.Batches.place`."""
    first = max(self._step - 1, 0) * self._size
    return order.place_in(self._order, self._feed._settings.seed, first, self._size)

  def __next__(self) -> dict[str, np.ndarray]:
    watchdog.beat("reading features")
    share, shares = self._share
    local = self._size // shares
    first = self._step * self._size + share * local
    self._step += 1
    drawn = [self._order[place] for place in range(first, first + local)]
    return self._feed._read("train", self._feed._train[np.asarray(drawn, np.int64)])

  def __iter__(self):
    return self

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass


class ImageFeed:
  """Images that go through the model whenever classifiers see them; nothing is stored."""

  def __init__(self, settings: Settings, workdir: str, source: Source):
    del workdir
    self._settings, self._source = settings, source
    self._data = settings.data
    self._spec = checkpoint_tokens.tokens_of(source.trained)
    self.groups = groups_of(settings, source)
    self._with_images = bool({PIXELS, PCA} & set(self.groups))
    self.fields = ("label", "tokens", "index", *(["image"] if self._with_images else []))
    self._split = source.splits["train"].select(np.arange(source.rows("train")))
    self.frozen = {LAYERS: source.trained.params}
    if RANDOM in self.groups:
      self.frozen[RANDOM] = source.random_params
    if PCA in self.groups:
      self.frozen[PCA] = _axes(source, self._pca_images())

  def _pca_images(self) -> np.ndarray:
    chunks, n_images = [], min(_PCA_IMAGES, len(self._split))
    for images in pipeline.image_stream(self._split, self._data, augment=False):
      chunks.append(images)
      if sum(map(len, chunks)) >= n_images:
        break
    return np.concatenate(chunks)[:n_images]

  def extract(self, frozen: dict, batch) -> Features:
    model, config = self._source.trained.config, self._source.features
    features = {
      name: pooled_features(model, config, frozen[name], batch["tokens"], batch["index"])
      for name in (LAYERS, RANDOM)
      if name in frozen
    }
    if "image" in batch:
      features.update(_pixel_features(self.groups, frozen, batch["image"]))
    return features

  def training(self, start_step: int) -> pipeline.Batches:
    share, shares = sharding.input_share(self._source.mesh)
    return pipeline.train_batches(
      self._split,
      self._data,
      self._spec,
      batch_size=self._settings.probe.batch_size,
      seed=self._settings.seed,
      start_step=start_step,
      process_index=share,
      process_count=shares,
      images=self._with_images,
      augment=False,
    )

  def rows_of(self, split: str) -> _Rows:
    source = self._source
    with streams.eval_stream(
      source.splits[split],
      self._data,
      self._spec,
      source.mesh,
      self._settings.probe.batch_size,
      source.limits[split],
      images=self._with_images,
    ) as batches:
      for batch in batches:
        yield {name: batch[name] for name in (*self.fields, "mask")}


class PositionFeed:
  """Another feed's features of every position, [F, B, T, D], each with mean 0 and variance 1.

  The moments are those of the first training images and all positions. AIM normalises by a batch's
  moments in training and by running ones in evaluation; of frozen features both estimate these, with
  which an image's features depend on no other image of its batch.
  """

  def __init__(self, feed: StoredFeed | ImageFeed, settings: Settings, source: Source):
    """Computes the moments.

    Args:
      feed: of a `by_position` source.
      settings: the job's.
      source: the feed's.
    """
    self._feed, self._width = feed, source.trained.config.n_embd
    self.groups, self.fields = feed.groups, feed.fields
    self.training, self.rows_of = feed.training, feed.rows_of
    n_images = min(_MOMENT_IMAGES, source.rows("train"))
    say(f"attentive: mean and variance of the features of {n_images:,} training images")
    batches = -(-n_images // settings.probe.batch_size)
    moments = self._moments_of(source.mesh, batches)
    moments = jax.device_put(moments, sharding.replicated(source.mesh))
    self.frozen = {**feed.frozen, _MOMENTS: moments}

  def _positions(self, features: Features) -> Features:
    """The layers' features, [F, B, T, D]."""
    return {
      name: of.reshape(*of.shape[:2], -1, self._width)
      for name, of in features.items()
      if isinstance(self.groups[name], Attentive)
    }

  def _moments_of(self, mesh: Mesh, n_batches: int) -> dict[str, dict[str, np.ndarray]]:
    """Mean and inverse standard deviation, float32 [F, D], over the first batches of train."""

    def sums_of(frozen, batch):
      counts = batch["mask"][None, :, None]
      features = self._positions(self._feed.extract(frozen, batch))
      sums = {
        name: [jnp.where(counts, (x**power).mean(2), 0).sum(1) for power in (1, 2)]
        for name, x in features.items()
      }
      return sums, batch["mask"].sum()

    step, total, images = jax.jit(sums_of, out_shardings=sharding.replicated(mesh)), None, 0
    with jax.set_mesh(mesh), contextlib.closing(self._feed.rows_of("train")) as rows:
      for batch in itertools.islice(rows, n_batches):
        sums, counted = jax.device_get(step(self._feed.frozen, sharding.put_batch(batch, mesh)))
        sums = jax.tree.map(np.float64, sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        images += int(counted)
    moments = {}
    for name, (first, second) in (total or {}).items():
      mean = first / images
      variance = np.maximum(second / images - mean**2, 0)
      scale = 1 / np.sqrt(variance + _EPSILON)
      moments[name] = {"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)}
    return moments

  def extract(self, frozen: dict, batch) -> Features:
    features = self._feed.extract(frozen, batch)
    for name, positions in self._positions(features).items():
      moments = {key: of[:, None, None] for key, of in frozen[_MOMENTS][name].items()}
      features[name] = (positions - moments["mean"]) * moments["scale"]
    return features
