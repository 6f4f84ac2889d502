"""Fréchet distances, and the job that tells them."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from igpt_jax.errors import UserError
from igpt_jax.jobs import pretrain, quality
from igpt_jax.sampling import frechet
from support.quickstart import shrunk

pytestmark = pytest.mark.usefixtures("quick_compile", "one_device")


def draw(n, mean, covariance, seed):
  return np.random.default_rng(seed).multivariate_normal(mean, covariance, n)


def test_the_distance_is_gaussians():
  """Against the formula for matrices that commute, and scipy's root for those that don't."""
  linalg = pytest.importorskip("scipy.linalg")
  rng = np.random.default_rng(0)
  a, b = (m @ m.T + np.eye(5) for m in rng.standard_normal((2, 5, 5)))
  mean = rng.standard_normal(5)
  left, right = frechet.Moments(np.zeros(5), a), frechet.Moments(mean, b)
  expected = mean @ mean + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
  assert frechet.distance(left, right) == pytest.approx(expected, rel=1e-9)
  assert frechet.distance(right, left) == pytest.approx(expected, rel=1e-9)
  assert frechet.distance(left, left) == pytest.approx(0, abs=1e-9)
  scaled = frechet.Moments(np.zeros(5), 4 * a)
  assert frechet.distance(left, scaled) == pytest.approx(np.trace(a), rel=1e-9)


def test_moments_of_few_and_flat_features():
  features = np.concatenate([np.ones((6, 3)), np.arange(6.0)[:, None]], axis=1)
  found = frechet.moments(features)
  assert found.covariance.shape == (4, 4) and found.covariance[3, 3] == pytest.approx(3.5)
  assert frechet.distance(found, found) == pytest.approx(0, abs=1e-9)
  far = frechet.moments(features + 10)
  assert frechet.distance(found, far) == pytest.approx(400)
  for bad in (features[:1], features[0], np.full((3, 2), np.nan)):
    with pytest.raises(ValueError):
      frechet.moments(bad)


def test_more_alike_is_nearer():
  eye = np.eye(4)
  reference = frechet.moments(draw(2_000, np.zeros(4), eye, 0))
  near, far = (frechet.moments(draw(2_000, np.full(4, m), eye, 1)) for m in (0.1, 1.0))
  assert frechet.distance(near, reference) < 0.2 < frechet.distance(far, reference)


def config_of(**overrides):
  return shrunk(**{"quality.images": 20, "sample.batch_size": 8} | overrides)


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
  return pathlib.Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("trained") / "run"))


def test_the_job(trained):
  quality.run(config_of(), str(trained))
  values = json.loads((trained / "quality.json").read_text())
  assert values["pictures"] == 20 and values["network"].startswith("layer 1 of ")
  assert 0 < values["train_distance"] < values["samples_distance"]
  # Half of a completion is the test image itself.
  assert values["completions_distance"] < values["samples_distance"]
  assert 2 < values["samples_nats_per_token"] < 3
  assert "| training images |" in (trained / "quality.md").read_text()
  again = dict(values)
  quality.run(config_of(sample__batch_size=5), str(trained))  # batches don't matter
  values = json.loads((trained / "quality.json").read_text())
  for name in ("samples_distance", "completions_distance"):
    assert values[name] == pytest.approx(again[name], rel=1e-4)


def test_a_network_of_another_checkpoint(trained, tmp_path):
  other = tmp_path / "other"
  pretrain.run(config_of(seed=1, model__n_layer=1, train__steps=4), str(other))
  quality.run(config_of(quality__network=str(other)), str(trained))
  values = json.loads((trained / "quality.json").read_text())
  assert str(other) in values["network"] and values["network"].startswith("layer 0 of ")


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"quality__images": 1}, r"quality\.images: 1; expected 2"),
    ({"quality__layer": 7}, r"quality\.layer: 7; expected 0 to 2"),
    ({"quality__network": "absent.onnx"}, r"quality\.network: absent\.onnx: no such file"),
    ({"quality__network": "nowhere"}, "nowhere"),
    ({"data__resolution": 16}, r"data\.resolution: 16"),
  ],
)
def test_mistakes_are_named(trained, tmp_path, overrides, message):
  with pytest.raises(UserError, match=message):
    quality.run(config_of(checkpoint=str(trained), **overrides), str(tmp_path / "out"))


def test_a_single_image_has_no_covariance(trained, tmp_path):
  """Said before anything is drawn; of one that can't be read, too."""
  for split, n in (("train", 5), ("test", 1)):
    (tmp_path / "my" / split).mkdir(parents=True)
    for i in range(n):
      Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "my" / split / f"{i}.png")
  data = {"data__name": "folder", "data__path": str(tmp_path / "my"), "data__max_bad": 0.5}
  config = config_of(checkpoint=str(trained), **data)
  with pytest.raises(UserError, match=r"data: folder test\[1 of 1\] .*: 1; .* needs 2 or more"):
    quality.run(config, str(tmp_path / "out"))
  (tmp_path / "my" / "test" / "bad.png").write_bytes(b"no image")
  with pytest.raises(UserError, match=r"readable images of .*test\[2 of 2\] .*: 1"):
    quality.run(config, str(tmp_path / "out"))


def test_without_the_extra_it_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "onnxruntime", None)
  with pytest.raises(UserError, match=r"pip install -e '.*\[onnx\]'"):
    quality.onnx_network(str(tmp_path / "inception.onnx"))


def test_a_network_in_onnx_format(tmp_path):
  pytest.importorskip("onnxruntime", reason="needs the extra onnx")
  onnx = pytest.importorskip("onnx", reason="needs onnx to make a network with")
  helper, kind = onnx.helper, onnx.TensorProto.FLOAT
  graph = helper.make_graph(
    [helper.make_node("GlobalAveragePool", ["x"], ["y"])],
    "mean",
    [helper.make_tensor_value_info("x", kind, ["n", 3, 16, 16])],
    [helper.make_tensor_value_info("y", kind, ["n", 3, 1, 1])],
  )
  path = tmp_path / "mean.onnx"
  onnx.save(
    helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path
  )
  network = quality.onnx_network(str(path))
  images = np.full((3, 8, 8, 3), (255, 0, 51), np.uint8)
  np.testing.assert_allclose(network(images), [[1, -1, -0.6]] * 3, atol=1e-5)
  (tmp_path / "broken.onnx").write_bytes(b"no network")
  with pytest.raises(UserError, match=r"broken\.onnx can't be read"):
    quality.onnx_network(str(tmp_path / "broken.onnx"))
