"""Feature sets that probes are fitted to: those of the trained model and of the baselines.

They are computed in one streamed pass per split and kept on disk (store.py), so that an interrupted
job resumes and other jobs reuse them.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax import checkpoint, files
from igpt_jax.checkpoint.checksum import checksum
from igpt_jax.config.fields import Settings
from igpt_jax.data import sources
from igpt_jax.data.sources import Split, open_split
from igpt_jax.model.image_gpt import Params, init_params
from igpt_jax.parallel import hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.probing import bucket_stores, linear
from igpt_jax.probing.features import FeatureConfig, FeatureExtractor, feature_config
from igpt_jax.probing.linear import Labelled
from igpt_jax.probing.store import FeatureStore
from igpt_jax.reporting import progress
from igpt_jax.training.state import param_shardings
from igpt_jax.workspace import checkpoint_tokens, devices, provenance, streams, weights

SPLITS = ("train", "validation", "test")
PIXELS, PCA, RANDOM = "pixels", "pca", "random"
PCA_VERSION = 2  # of `fit_pca`: what was kept of another one is fitted again
BASELINES = (PIXELS, PCA, RANDOM)

Parts = tuple[Labelled, Labelled, Labelled]  # train, validation, test


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """Features that a classifier is fitted to: one row of the table."""

  name: str  # shown in the table
  kind: str  # "layer", "layers" (several, concatenated) or a baseline
  layer: int | None
  parts: Callable[[], Parts]  # reads (features float32 [n, D], labels [n]) of each split


@dataclasses.dataclass(frozen=True)
class Source:
  """Model and data of a probe, checked against each other."""

  trained: checkpoint.LoadedModel  # its parameters are on the mesh
  mesh: Mesh
  splits: dict[str, Split]
  limits: dict[str, int]  # images used of each split, its first ones; 0: all
  features: FeatureConfig
  baselines: tuple[str, ...]

  @property
  def n_classes(self) -> int:
    return self.splits["train"].n_classes

  def rows(self, name: str) -> int:
    return min(len(self.splits[name]), self.limits[name] or len(self.splits[name]))

  @functools.cached_property
  def checksum(self) -> str:
    """Checksum of the trained parameters."""
    return weights.checksum_of(self.trained)

  @functools.cached_property
  def random_params(self) -> Params:
    """Initial parameters of the same architecture."""
    model = self.trained.config
    init = functools.partial(init_params, model)
    with jax.set_mesh(self.mesh):
      return jax.jit(init, out_shardings=param_shardings(model, self.mesh))(jax.random.key(0))

  @functools.cached_property
  def random_checksum(self) -> str:
    with jax.set_mesh(self.mesh):
      return checksum(self.random_params)


def open_source(
  settings: Settings,
  workdir: str,
  mesh: Mesh | None = None,
  check: Callable[[dict[str, Split], FeatureConfig], object] = lambda splits, features: None,
) -> Source:
  """Opens data and checkpoint, and checks both before the weights are read.

  `check` is the job's own, of the splits and of the features asked for.

  Raises:
    UserError: no labels, a layer out of range, another resolution, …
  """
  any_mesh = mesh or devices.mesh_of(settings)
  sharding.batch_size_per_shard(any_mesh, settings.features.batch_size, "features.batch_size")
  splits = {name: open_split(settings.data, name) for name in SPLITS}
  sources.check_labels(splits)
  trained, mesh = weights.load_model(
    settings,
    workdir,
    mesh,
    needs_images=True,
    check=lambda info: check(splits, features_asked_for(settings, info)),
  )
  limits = dict.fromkeys(SPLITS, settings.features.eval_images) | {
    "train": settings.features.images
  }
  features = features_asked_for(settings, trained)
  return Source(trained, mesh, splits, limits, features, tuple(settings.features.baselines))


def features_asked_for(settings: Settings, info: checkpoint.CheckpointInfo) -> FeatureConfig:
  return feature_config(
    info.config,
    layers=tuple(settings.features.layers),
    grid=settings.features.grid,
    masks=settings.features.masks,
    mask_probability=info.run["mask_probability"],
  )


Stores = dict[str, FeatureStore]  # by split


def compute(
  settings: Settings, workdir: str, source: Source, passing: bool = False
) -> dict[str, Stores]:
  """Computes what isn't on disk yet: features of the trained model ("layer") and of RANDOM if asked for.

  Collective: every process must call it. The main one writes; all of them read the same workdir, or a
  copy of it (`bucket_stores`). The model's features that are `passing`, to be removed after the job, as
  those of a watched run are, go into a bucket only if there are other processes.
  """
  folder = folder_of(settings, workdir, source)
  passing = jax.process_count() == 1 and (passing or settings.watch)
  stores = {
    "layer": _stores(
      settings, source, folder, source.trained.params, source.checksum, passing=passing
    )
  }
  if RANDOM in source.baselines:
    folder = os.path.join(workdir, "features", f"random-{source.random_checksum[:8]}")
    stores[RANDOM] = _stores(
      settings, source, folder, source.random_params, source.random_checksum, "random weights, "
    )
  return stores


def extract(
  settings: Settings, workdir: str, source: Source, passing: bool = False
) -> list[FeatureSet]:
  """Computes the features that aren't on disk yet; returns the sets: baselines, then layers.

  The arguments are those of `compute`.
  """
  stores = compute(settings, workdir, source, passing)
  sets = []
  if PIXELS in source.baselines:
    sets.append(FeatureSet("raw pixels", PIXELS, None, lambda: _parts(stores["layer"], pixels)))
  if PCA in source.baselines:
    sets.append(_pca_set(stores["layer"], source.trained.config.n_embd))
  return sets + [
    _layer_set(kind, stores[kind], layer)
    for kind in (RANDOM, "layer")
    if kind in stores
    for layer in source.features.layers
  ]


def folder_of(settings: Settings, workdir: str, source: Source) -> str:
  """Folder of the trained model's features."""
  if settings.features.cache:
    return files.place("features.cache", settings.features.cache)
  return os.path.join(workdir, "features", f"{source.trained.step}-{source.checksum[:8]}")


def side_by_side(sets: Sequence[FeatureSet], layers: Sequence[int]) -> FeatureSet:
  """Concatenates several layers' features (paper, section 4.3: five for iGPT-XL)."""
  by_layer = {feature_set.layer: feature_set for feature_set in sets if feature_set.kind == "layer"}

  def parts() -> Parts:
    by_split = zip(*(by_layer[layer].parts() for layer in layers), strict=True)
    train, validation, test = (
      (np.concatenate([features for features, _ in parts], axis=1), parts[0][1])
      for parts in by_split
    )
    return train, validation, test

  return FeatureSet(f"layers {', '.join(map(str, layers))}", "layers", None, parts)


def pixels(store: FeatureStore, keep: np.ndarray) -> np.ndarray:
  """Flat images in [-1, 1], float32 [n, H·W·3]."""
  return _flat(store.images()[keep])


def _flat(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1).astype(np.float32) / np.float32(127.5) - 1


def fit_pca(images: np.ndarray, components: int):
  """Fits scikit-learn's PCA to images uint8 [N, H, W, 3].

  Components beyond the images' rank, which is low where channels are equal or borders constant, are 0: the
  probe scales every feature to unit variance, and would learn their rounding errors.
  """
  from sklearn.decomposition import PCA as SklearnPCA

  flat = _flat(images)
  pca = SklearnPCA(min(components, *flat.shape), random_state=0).fit(flat)
  rounding = pca.singular_values_[0] * max(flat.shape) * np.finfo(np.float32).eps
  np.asarray(pca.components_)[pca.singular_values_ <= rounding] = 0  # in place
  return pca


def _pca_set(stores: Stores, components: int) -> FeatureSet:
  """Principal components of the training pixels, as many as the model is wide."""

  @functools.cache
  def fitted():
    train = stores["train"]
    return fit_pca(train.images()[np.flatnonzero(train.labels() >= 0)[:50_000]], components)

  width = min(components, int(np.prod(stores["train"].images().shape[1:])))

  def read(store: FeatureStore, keep: np.ndarray) -> np.ndarray:
    return fitted().transform(pixels(store, keep))

  return FeatureSet(f"PCA of pixels, {width}", PCA, None, lambda: _parts(stores, read))


def _layer_set(kind: str, stores: Stores, layer: int) -> FeatureSet:
  name = f"random weights, layer {layer}" if kind == RANDOM else f"layer {layer}"
  return FeatureSet(
    name, kind, layer, lambda: _parts(stores, lambda store, keep: store.layer(layer)[keep])
  )


def _parts(stores: Stores, read) -> Parts:
  parts = []
  for name in SPLITS:
    labels = stores[name].labels()
    keep = np.flatnonzero(labels >= 0)
    parts.append((read(stores[name], keep), labels[keep]))
  return tuple(parts)


def _stores(
  settings: Settings,
  source: Source,
  folder: str,
  params: Params,
  digest: str,
  whose: str = "",
  passing: bool = False,
) -> Stores:
  """Opens every split's features under these parameters; computes those that are missing.

  Those that are `passing` don't go into a bucket.
  """
  extractor = FeatureExtractor(source.trained.config, source.features, source.mesh)
  stores = {}
  for name in SPLITS:
    computed_from = identity_of(settings, source, name, digest)
    # Not labelled by checkpoint: in a folder of the user's own another checkpoint's features are refused.
    label = files.digest({**computed_from, "checkpoint": ""})[:8]
    kept_in = os.path.join(folder, f"{name}-{label}")
    stores[name], is_kept = bucket_stores.opened(
      kept_in,
      computed_from,
      rows=source.rows(name),
      width=source.features.grid**2 * source.trained.config.n_embd,
      side=settings.data.resolution,
    )
    is_new = _fill(settings, source, name, params, stores[name], extractor, whose)
    if not passing:
      bucket_stores.share(stores[name], kept_in, is_new or not is_kept)
  return stores


def identity_of(settings: Settings, source: Source, name: str, digest: str) -> dict[str, Any]:
  """Everything that determines a split's features under the parameters with checksum `digest`; JSON.

  The number of rows is left out: a longer store begins with the rows of a shorter one.
  """
  model, masks = source.trained.config, source.features.masks
  return {
    "checkpoint": digest,
    "data": source.splits[name].fingerprint,
    "resolution": settings.data.resolution,
    "recipe": provenance.recipe(settings.data),
    "palette": provenance.of_palette(source.trained.palette),
    "dtype": model.dtype,
    "heads": model.n_head,
    "grid": source.features.grid,
    "masks": masks,
    "mask_probability": source.features.mask_probability if masks else None,
  }


def _fill(
  settings: Settings,
  source: Source,
  name: str,
  params: Params,
  store: FeatureStore,
  extractor: FeatureExtractor,
  whose: str,
) -> bool:
  """Computes a split's features that are missing; returns False if none are."""
  batch_size, total = settings.features.batch_size, source.rows(name)
  layers = source.features.layers
  # Every process makes the passes that the main one's disk calls for.
  batches_done = store.rows_done(layers) // batch_size if store.missing(layers) else -1
  first = hosts.from_main(batches_done, "the features on the first host's disk")
  if first < 0:
    say(f"features: {whose}{name}, found in {store.folder}")
    return False
  writing = store.begin(layers) if hosts.is_main() else None
  clock = progress.Countdown(f"features: {whose}{name}", total, say)
  with streams.eval_stream(
    source.splits[name],
    settings.data,
    checkpoint_tokens.tokens_of(source.trained),
    source.mesh,
    batch_size,
    source.limits[name],
    images=True,
    start=first,
  ) as batches:
    for number, rows in enumerate(extractor(params, batches), first + 1):
      if writing is not None:
        writing.add(rows, number * batch_size)
      clock.tick(min(number * batch_size, total))
  hosts.wait_for_all("features written")
  return True


def fit(features: FeatureSet, source: Source, max_iterations: int) -> dict[str, Any]:
  """Fits logistic regression to a set of features; returns a row of the probe's table, as JSON."""
  with progress.doing(f"probe: {features.name}", say, after=3.0):
    result = linear.probe(
      *features.parts(),
      n_classes=source.n_classes,
      max_iterations=max_iterations,
      mesh=devices.own_mesh(source.mesh),
    )
  names = {"name": features.name, "kind": features.kind, "layer": features.layer}
  return {**names, **dataclasses.asdict(result)}
