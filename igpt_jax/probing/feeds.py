"""What SGD probes are fed with: features stored on disk, or images, whose features are made in the step.

Both know: `groups`, the widths of the features; `frozen`, arrays on the mesh that the step needs; `fields`
of a batch; `extract`, (frozen, batch) -> features; `training`, the endless shuffled stream; and
`rows_of`, a split once, in order.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax import watchdog
from igpt_jax.config.fields import Settings
from igpt_jax.data import order, pipeline
from igpt_jax.parallel import sharding
from igpt_jax.probing import sets
from igpt_jax.probing.features import pooled_features
from igpt_jax.probing.sets import PCA, PIXELS, RANDOM, Source
from igpt_jax.probing.sgd import Features, Groups
from igpt_jax.workspace import streams, weights

LAYERS = "layer"
_PCA_IMAGES = 20_000


def open_feed(settings: Settings, workdir: str, source: Source) -> "Stored | Pictures":
  """Opens the feed that `config.probe.cached` asks for."""
  return (Stored if settings.probe.cached else Pictures)(settings, workdir, source)


def groups_of(settings: Settings, source: Source) -> Groups:
  """Widths of the features that classifiers are trained on; nothing is computed for it."""
  pixels = settings.data.resolution**2 * 3
  n_embd = source.trained.config.n_embd
  layers = (len(source.features.layers), source.features.grid**2 * n_embd)
  every = {RANDOM: layers, PIXELS: (1, pixels), PCA: (1, min(n_embd, pixels))}
  return {LAYERS: layers, **{name: every[name] for name in source.baselines}}


def _of_pixels(groups: Groups, frozen: dict, images: jax.Array) -> Features:
  """The baselines that are made of pixels, [1, B, W] each."""
  pixels = images.reshape(len(images), -1).astype(jnp.float32) / 127.5 - 1
  found = {PIXELS: pixels[None]} if PIXELS in groups else {}
  if PCA in groups:
    axes = frozen[PCA]
    found[PCA] = ((pixels - axes["mean"]) @ axes["components"].T)[None]
  return found


def _axes(source: Source, images: np.ndarray) -> dict:
  """Principal axes of training images, on the mesh."""
  fitted = sets.fit_pca(images, source.trained.config.n_embd)
  arrays = {"mean": fitted.mean_, "components": fitted.components_}
  everywhere = sharding.replicated(source.mesh)
  return {k: jax.device_put(np.asarray(v, np.float32), everywhere) for k, v in arrays.items()}


class Stored:
  """Features are computed once, for all processes to read."""

  def __init__(self, settings: Settings, workdir: str, source: Source):
    self._settings, self._source = settings, source
    self._stores = sets.compute(settings, workdir, source)
    self.groups = groups_of(settings, source)
    self.fields = (
      "label",
      *self._stores,
      *(("image",) if {PIXELS, PCA} & set(self.groups) else ()),
    )
    labels = self._of(LAYERS, "train").labels()
    self._train = np.flatnonzero(labels >= 0)
    self.frozen = {}
    if PCA in self.groups:
      images = self._of(LAYERS, "train").images()
      self.frozen[PCA] = _axes(source, images[self._train[:_PCA_IMAGES]])

  def _of(self, group: str, split: str):
    return self._stores[group][split]

  def extract(self, frozen: dict, batch) -> Features:
    found = {name: jnp.swapaxes(batch[name], 0, 1) for name in self._stores}
    if "image" in batch:
      found.update(_of_pixels(self.groups, frozen, batch["image"]))
    return found

  def _read(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    stores = {name: each[split] for name, each in self._stores.items()}
    store, layers = stores[LAYERS], self._source.features.layers
    watchdog.beat("computing")
    batch = {
      name: np.stack([each.layer(layer)[rows] for layer in layers], axis=1)
      for name, each in stores.items()
    }
    batch["label"] = store.labels()[rows]
    if "image" in self.fields:
      batch["image"] = store.images()[rows]
    return batch

  def training(self, start_step: int) -> "_Shuffled":
    return _Shuffled(self, start_step)

  def rows_of(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    size = self._settings.probe.batch_size
    share, shares = sharding.input_share(self._source.mesh)
    local = size // shares
    total = len(self._of(LAYERS, split).labels())
    for first in range(0, total, size):
      rows = np.arange(first + share * local, first + (share + 1) * local)
      inside = rows < total
      batch = self._read(split, np.where(inside, rows, 0))
      yield {**batch, "mask": inside & (batch["label"] >= 0)}


class _Shuffled:
  """Every image once an epoch, in the order of `pipeline.train_batches`, and used like that."""

  def __init__(self, feed: Stored, start_step: int):
    self._feed, self._step = feed, start_step
    self._size = feed._settings.probe.batch_size
    self._order = order.train_order(len(feed._train), feed._settings.seed)
    self._share = sharding.input_share(feed._source.mesh)
    self.wait_seconds = 0.0  # reading is the work itself: nothing runs ahead

  def place(self) -> dict[str, str]:
    """The newest batch's place, as `pipeline.Batches.place` says it."""
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


class Pictures:
  """Each image goes through the model whenever a classifier sees it; nothing is stored."""

  def __init__(self, settings: Settings, workdir: str, source: Source):
    del workdir
    self._settings, self._source = settings, source
    self._data = settings.data
    self._palette = weights.palette_of(source.trained)
    self.groups = groups_of(settings, source)
    self._with_images = bool({PIXELS, PCA} & set(self.groups))
    self.fields = ("label", "tokens", "index", *(("image",) if self._with_images else ()))
    self._split = source.splits["train"].select(np.arange(source.rows("train")))
    self.frozen = {LAYERS: source.trained.params}
    if RANDOM in self.groups:
      self.frozen[RANDOM] = source.random_params
    if PCA in self.groups:
      self.frozen[PCA] = _axes(source, self._some_images())

  def _some_images(self) -> np.ndarray:
    found, wanted = [], min(_PCA_IMAGES, len(self._split))
    for images in pipeline.image_stream(self._split, self._data, augment=False):
      found.append(images)
      if sum(map(len, found)) >= wanted:
        break
    return np.concatenate(found)[:wanted]

  def extract(self, frozen: dict, batch) -> Features:
    model, config = self._source.trained.config, self._source.features
    found = {
      name: pooled_features(model, config, frozen[name], batch["tokens"], batch["index"])
      for name in (LAYERS, RANDOM)
      if name in frozen
    }
    if "image" in batch:
      found.update(_of_pixels(self.groups, frozen, batch["image"]))
    return found

  def training(self, start_step: int) -> pipeline.Batches:
    share, shares = sharding.input_share(self._source.mesh)
    return pipeline.train_batches(
      self._split,
      self._data,
      self._palette,
      batch_size=self._settings.probe.batch_size,
      seed=self._settings.seed,
      start_step=start_step,
      process_index=share,
      process_count=shares,
      images=self._with_images,
      augment=False,
    )

  def rows_of(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    source = self._source
    with streams.eval_stream(
      source.splits[split],
      self._data,
      self._palette,
      source.mesh,
      self._settings.probe.batch_size,
      source.limits[split],
      images=self._with_images,
    ) as batches:
      for batch in batches:
        yield {name: batch[name] for name in (*self.fields, "mask")}
