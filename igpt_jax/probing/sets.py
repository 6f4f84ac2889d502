"""The features that probes work on: every split's, of the trained model and of the baselines.

They are computed in one streamed pass per split and kept on disk (store.py), so that
an interrupted job goes on, and another job finds them.
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
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import ImageGPTConfig, Params, init_params
from igpt_jax.parallel import hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.probing.features import FeatureConfig, FeatureExtractor, feature_config
from igpt_jax.probing.linear import Labelled
from igpt_jax.probing.store import FeatureStore
from igpt_jax.reporting import progress
from igpt_jax.training.state import param_shardings
from igpt_jax.workspace import devices, provenance, streams, weights

SPLITS = ("train", "validation", "test")
PIXELS, PCA, RANDOM = "pixels", "pca", "random"
BASELINES = (PIXELS, PCA, RANDOM)

Parts = tuple[Labelled, Labelled, Labelled]  # train, validation, test


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """One row of a table: features that a classifier is fitted to.

  Attributes:
    name: for a person.
    kind: "layer", "layers" (several, side by side) or a baseline.
    layer: whose, or None.
    parts: reads them, (features float32 [n, D], labels [n]) of each split.
  """

  name: str
  kind: str
  layer: int | None
  parts: Callable[[], Parts]


@dataclasses.dataclass(frozen=True)
class Source:
  """What probes need to know of a job's model and data, everything checked.

  Attributes:
    trained: the model, its parameters on the mesh.
    splits: of the data, by name.
    limits: how many of their first images count; 0: all.
    features: what is computed.
    baselines: those to compare with.
  """

  trained: checkpoint.LoadedModel
  mesh: Mesh
  splits: dict[str, Split]
  limits: dict[str, int]
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
    """Fresh parameters of the same architecture, as training begins with them."""
    with jax.set_mesh(self.mesh):
      return jax.jit(
        functools.partial(init_params, self.trained.config),
        out_shardings=param_shardings(self.trained.config, self.mesh),
      )(jax.random.key(0))

  @functools.cached_property
  def random_checksum(self) -> str:
    with jax.set_mesh(self.mesh):
      return checksum(self.random_params)


def open_source(settings: Settings, workdir: str, mesh: Mesh | None = None) -> Source:
  """Opens data and checkpoint.

  Raises:
    UserError: before the weights are read: no labels, a layer out of range, another resolution, …
  """
  mesh = mesh or devices.mesh_of(settings)
  sharding.batch_size_per_shard(mesh, settings.features.batch_size, "features.batch_size")
  data_config = settings.data
  splits = {name: open_split(data_config, name) for name in SPLITS}
  sources.check_labels(splits)
  trained = weights.load_model(
    settings,
    workdir,
    mesh,
    needs_palette=True,
    check=lambda found: features_asked_for(settings, found),
  )
  return Source(
    trained=trained,
    mesh=mesh,
    splits=splits,
    limits={
      "train": settings.features.images,
      "validation": settings.features.eval_images,
      "test": settings.features.eval_images,
    },
    features=features_asked_for(settings, trained),
    baselines=tuple(settings.features.baselines),
  )


def features_asked_for(settings: Settings, found: checkpoint.CheckpointInfo) -> FeatureConfig:
  return feature_config(
    found.config,
    layers=tuple(settings.features.layers),
    grid=settings.features.grid,
    masks=settings.features.masks,
    mask_probability=found.run["mask_probability"],
  )


Stores = dict[str, FeatureStore]  # of each split


def compute(settings: Settings, workdir: str, source: Source) -> dict[str, Stores]:
  """Computes what isn't on disk yet: of the trained model ("layer"), and of the random one if asked for.

  Every process takes part; the main one writes, and a workdir is one that all of them see.
  """
  trained = source.trained
  folder = folder_of(settings, workdir, source)
  found = {"layer": _stores(settings, source, folder, trained.params, source.checksum)}
  if RANDOM in source.baselines:
    folder = os.path.join(workdir, "features", f"random-{source.random_checksum[:8]}")
    found[RANDOM] = _stores(
      settings, source, folder, source.random_params, source.random_checksum, "random weights, "
    )
  return found


def extract(settings: Settings, workdir: str, source: Source) -> list[FeatureSet]:
  """The sets, on disk from now on: baselines, then layers."""
  stores = compute(settings, workdir, source)
  of_model, n_embd = stores["layer"], source.trained.config.n_embd
  sets = []
  if PIXELS in source.baselines:
    sets.append(FeatureSet("raw pixels", PIXELS, None, lambda: _parts(of_model, pixels)))
  if PCA in source.baselines:
    sets.append(_pca_set(of_model, n_embd))
  return sets + [
    _layer_set("random weights, layer" if kind == RANDOM else kind, kind, stores[kind], layer)
    for kind in (RANDOM, "layer")
    if kind in stores
    for layer in source.features.layers
  ]


def folder_of(settings: Settings, workdir: str, source: Source) -> str:
  """Where the trained model's features are kept."""
  if settings.features.cache:
    return os.path.abspath(os.path.expanduser(settings.features.cache))
  return os.path.join(workdir, "features", f"{source.trained.step}-{source.checksum[:8]}")


def side_by_side(sets: Sequence[FeatureSet], layers: Sequence[int]) -> FeatureSet:
  """Several layers' features as one set (paper, section 4.3: five for iGPT-XL).

  Raises:
    UserError: a layer that wasn't computed.
  """
  by_layer = {each.layer: each for each in sets if each.kind == "layer"}
  for layer in layers:
    if layer not in by_layer:
      raise UserError(
        f"config.probe.concatenate: layer {layer}; expected some of {', '.join(map(str, by_layer))}"
      )

  def parts() -> Parts:
    each = [by_layer[layer].parts() for layer in layers]
    train, validation, test = (
      (np.concatenate([of[i][0] for of in each], axis=1), each[0][i][1]) for i in range(len(SPLITS))
    )
    return train, validation, test

  return FeatureSet(f"layers {', '.join(map(str, layers))}", "layers", None, parts)


def pixels(store: FeatureStore, keep: np.ndarray) -> np.ndarray:
  """Colours in [-1, 1], float32 [n, H·W·3]."""
  return _colours(store.images()[keep])


def _colours(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1).astype(np.float32) / np.float32(127.5) - 1


def fit_pca(images: np.ndarray, components: int):
  """scikit-learn's PCA of images uint8 [N, H, W, 3]: as many components as the model is wide."""
  from sklearn.decomposition import PCA as SklearnPCA

  found = _colours(images)
  return SklearnPCA(min(components, *found.shape), random_state=0).fit(found)


def _pca_set(stores: Stores, components: int) -> FeatureSet:
  """Principal components of the training pixels, as many as the model is wide."""

  @functools.cache
  def fitted():
    train = stores["train"]
    return fit_pca(train.images()[np.flatnonzero(train.labels() >= 0)[:50_000]], components)

  width = min(components, int(np.prod(stores["train"].images().shape[1:])))
  return FeatureSet(
    f"PCA of pixels, {width}",
    PCA,
    None,
    lambda: _parts(stores, lambda store, keep: fitted().transform(pixels(store, keep))),
  )


def _layer_set(name: str, kind: str, stores: Stores, layer: int) -> FeatureSet:
  return FeatureSet(
    f"{name} {layer}",
    kind,
    layer,
    lambda: _parts(stores, lambda store, keep: store.layer(layer)[keep]),
  )


def _parts(stores: Stores, read) -> Parts:
  found = []
  for name in SPLITS:
    labels = stores[name].labels()
    keep = np.flatnonzero(labels >= 0)
    found.append((read(stores[name], keep), labels[keep]))
  return tuple(found)


def _stores(
  settings: Settings, source: Source, folder: str, params: Params, digest: str, whose: str = ""
) -> Stores:
  """Every split's features of these parameters; computes what is missing."""
  extractor = FeatureExtractor(source.trained.config, source.features, source.mesh)
  stores = {}
  for name in SPLITS:
    computed_from = identity_of(settings, source, name, digest)
    # Another checkpoint's features in a folder of the user's own are refused, not put beside these.
    label = files.digest({**computed_from, "checkpoint": ""})[:8]
    stores[name] = FeatureStore(
      os.path.join(folder, f"{name}-{label}"),
      computed_from,
      rows=source.rows(name),
      width=source.features.grid**2 * source.trained.config.n_embd,
      side=settings.data.resolution,
    )
    _fill(settings, source, name, params, stores[name], extractor, whose)
  return stores


def identity_of(settings: Settings, source: Source, name: str, digest: str) -> dict[str, Any]:
  """All that decides a split's features under the parameters of this checksum; JSON.

  Not how many there are: the first rows of more are the rows of fewer.
  """
  model: ImageGPTConfig = source.trained.config
  masks = source.features.masks
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
) -> None:
  batch_size, total = settings.features.batch_size, source.rows(name)
  layers = source.features.layers
  # Every process makes the same passes, as the main one's disk says.
  first = store.rows_done(layers) // batch_size if store.missing(layers) else -1
  first = hosts.from_main(first)
  if first < 0:
    say(f"features: {whose}{name}, found in {store.folder}")
    return
  writing = store.begin(layers) if hosts.is_main() else None
  clock = progress.Countdown(f"features: {whose}{name}", total, say)
  with streams.eval_stream(
    source.splits[name],
    settings.data,
    weights.palette_of(source.trained),
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
