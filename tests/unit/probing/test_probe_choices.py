"""What probes fit and choose on which split: axes on train, layers and rates on validation, nothing on test."""

import json
import types

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from igpt_jax.jobs import lowdata, probe
from igpt_jax.probing import feeds, linear, sgd_run
from igpt_jax.probing import sets as sets_lib
from igpt_jax.probing.linear import FewLabelsResult, ProbeResult
from support import own_checkpoint
from support.tiny import changed, settings_of

pytestmark = pytest.mark.usefixtures("quick_compile")

# Of three layers: the second is the best on validation, the worst on test.
VALIDATION, TEST = (0.5, 0.9, 0.7), (0.95, 0.6, 0.8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return own_checkpoint.write(tmp_path_factory.mktemp("own") / "run", resolution=8)


@pytest.fixture
def config(trained, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda *args: jax.local_devices()[:1])
  return settings_of(changes={
    "checkpoint": trained, "features.images": 200, "features.eval_images": 100,
    "features.baselines": ("pixels", "pca"),
  })  # fmt: skip


def test_principal_axes_are_those_of_training_images(config, tmp_path):
  source = sets_lib.open_source(config, str(tmp_path))
  sets = {each.kind: each.parts() for each in sets_lib.extract(config, str(tmp_path), source)}
  pixels = [features for features, _ in sets["pixels"]]
  assert [len(part) for part in pixels] == [200, 100, 100]
  expected = PCA(16, random_state=0).fit(pixels[0])
  for part, (features, _) in zip(pixels, sets["pca"], strict=True):
    np.testing.assert_allclose(features, expected.transform(part), rtol=0, atol=1e-4)
  for cached in (True, False):
    config = changed(config, {"probe.cached": cached})
    axes = feeds.open_feed(config, str(tmp_path), source).frozen["pca"]
    np.testing.assert_allclose(axes["mean"], pixels[0].mean(0), rtol=0, atol=1e-5)
    alike = np.abs(np.asarray(axes["components"]) @ expected.components_.T)
    np.testing.assert_allclose(alike, np.eye(16), rtol=0, atol=1e-3)


def test_components_beyond_the_images_rank_are_none():
  """Their rounding errors, scaled to unit variance, were features: other ones on every machine."""
  grey = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 1)).astype(np.uint8)
  grey[:, 0] = 255
  images = np.repeat(grey, 3, axis=-1)
  pca = sets_lib.fit_pca(images, 16)
  norms = np.linalg.norm(pca.components_, axis=1)
  np.testing.assert_allclose(norms[:12], 1, rtol=1e-5)
  assert not norms[12:].any()
  features = pca.transform(sets_lib._flat(images))
  np.testing.assert_allclose(features[:, :12].var(0), pca.explained_variance_[:12], rtol=1e-2)
  assert not features[:, 12:].any()


def test_the_best_layer_is_validations(config, tmp_path, monkeypatch):
  """In the JSON, the table, the verdict, and among its neighbours; of random weights, too."""
  config = changed(config, {"features.baselines": ("random",), "probe.around_best": 1})
  results = [ProbeResult(1.0, *both, True) for both in zip(VALIDATION, TEST, strict=True)]
  fitted = iter([*results, *results, ProbeResult(1.0, 0.0, 0.0, True)])
  monkeypatch.setattr(linear, "probe", lambda *args, **settings: next(fitted))
  probe.run(config, str(tmp_path))
  values = json.loads((tmp_path / "probe.json").read_text())
  assert values["best_layer"] == 1
  assert (values["validation_accuracy"], values["test_accuracy"]) == (0.9, 0.6)
  assert values["rows"][-1]["name"] == "layers 1"
  assert values["verdict"] == (
    "test accuracy: layer 1 60.00% > random weights (layer 1) 60.00% > layers 1 0.00%"
  )
  starred = [row for row in (tmp_path / "probe.md").read_text().splitlines() if "*" in row]
  assert len(starred) == 1 and starred[0].startswith("| layer 1 *")


def test_the_best_learning_rate_is_validations():
  source = types.SimpleNamespace(features=types.SimpleNamespace(layers=(4, 6)))
  on_validation = np.stack([VALIDATION, VALIDATION[::-1]], axis=1)  # [rates, layers]
  on_validation[0, 1] = 1.0
  on_test = np.stack([TEST, TEST], axis=1)
  rows = sgd_run._rows("layer", source, (3.0, 1.0, 0.3), on_validation, on_test)
  chosen = [
    (row["layer"], row["learning_rate"], row["validation_accuracy"], row["test_accuracy"])
    for row in rows
  ]
  assert chosen == [(4, 1.0, 0.9, 0.6), (6, 3.0, 1.0, 0.95)]


def test_the_best_layer_with_few_labels_is_validations():
  sets = [sets_lib.FeatureSet(f"layer {i}", "layer", i, lambda: ()) for i in range(3)]
  results = {
    f"layer {i}": {n: FewLabelsResult(1.0, on_validation, on_test, 0.0) for n in (1, 4)}
    for i, (on_validation, on_test) in enumerate(zip(VALIDATION, TEST, strict=True))
  }
  assert lowdata.choose(sets, results) == {"best layer": {1: "layer 1", 4: "layer 1"}}
