"""A split's features: every image once, whatever the mesh; of the layers, grid and masks asked for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.checkpoint import checksum as checksums
from igpt_jax.checkpoint.checksum import checksum
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import bind
from igpt_jax.probing.features import FeatureExtractor, feature_config
from igpt_jax.training.state import param_shardings
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")


def stream(config, count, *, without=()):
  """Batches of 8 of `count` images, the rows in another order than the split's."""
  tokens = tiny.random_tokens(config, count)
  rows = {
    "tokens": tokens,
    "image": np.repeat(tokens.reshape(count, 4, 4, 1), 3, axis=-1).astype(np.uint8),
    "label": np.arange(count, dtype=np.int32) % 3,
    "mask": ~np.isin(np.arange(count), without),
    "index": np.arange(count),
  }
  order = np.arange(count).reshape(-1, 8)[:, ::-1]
  return rows, [{name: values[of] for name, values in rows.items()} for of in order]


def on_mesh(config, mesh):
  return jax.device_put(tiny.random_params(config), param_shardings(config, mesh))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_features_of_a_stream(shape, causal):
  mesh, config = tiny.mesh_of(shape), tiny.make_config(causal=causal)
  rows, batches = stream(config, 24, without=(3, 20, 21, 22, 23))
  extract = FeatureExtractor(config, feature_config(config), mesh)
  found = list(extract(on_mesh(config, mesh), batches))
  assert [len(each.index) for each in found] == [7, 8, 4]
  assert extract._extract._cache_size() == 1
  index = np.concatenate([each.index for each in found])
  np.testing.assert_array_equal(index, np.flatnonzero(rows["mask"]))
  np.testing.assert_array_equal(np.concatenate([e.labels for e in found]), rows["label"][index])
  np.testing.assert_array_equal(np.concatenate([e.images for e in found]), rows["image"][index])
  features = np.concatenate([each.features for each in found], axis=1)
  expected = tiny.jit(lambda params: bind(config, params).features(rows["tokens"]))(
    tiny.random_params(config)
  )
  assert features.shape == (3, 19, 16) and features.dtype == np.float32
  np.testing.assert_allclose(features, expected[:, index], rtol=0, atol=1e-5)


def test_layers_and_a_grid_of_blocks():
  """Blocks' means lie side by side, row after row; their mean is the whole image's."""
  config, mesh = tiny.make_config(), tiny.mesh_of()
  _, batches = stream(config, 8)
  params = on_mesh(config, mesh)
  (whole,) = FeatureExtractor(config, feature_config(config), mesh)(params, batches)
  asked = feature_config(config, layers=(2, 0), grid=2)
  assert asked.layers == (0, 2)
  (blocks,) = FeatureExtractor(config, asked, mesh)(params, batches)
  assert blocks.features.shape == (2, 8, 4 * 16)
  np.testing.assert_allclose(
    blocks.features.reshape(2, 8, 4, 16).mean(2), whole.features[[0, 2]], rtol=0, atol=1e-5
  )
  # Layer 0 is position by position: the second block is made of the first rows' right halves.
  model = bind(config, tiny.random_params(config))
  tokens = tiny.random_tokens(config, 8)[:, ::1][np.arange(8)]
  entering = tiny.jit(lambda: model.hidden(model.embed(tokens), lambda b, x, _: b.ln_1(x))[1][0])()
  rows, halves = np.asarray(entering).reshape(8, 4, 4, 16), (np.s_[:2], np.s_[2:])
  for at, (up, left) in enumerate(itertools.product(halves, halves)):
    found = blocks.features[0].reshape(8, 4, 16)[:, at]
    np.testing.assert_allclose(found, rows[:, up, left].mean((1, 2)), rtol=0, atol=1e-5)


def test_masks_are_a_pictures_own():
  """BERT's masked features depend on the image's place in the split, not on its batch.

  They are means over masks of each image's own, which are drawn here once more.
  """
  config, mesh = tiny.make_config(causal=False), tiny.mesh_of()
  _, batches = stream(config, 16)
  params = on_mesh(config, mesh)
  plain = feature_config(config)
  masked = feature_config(config, masks=3, mask_probability=0.4)
  apart = [each.features for each in FeatureExtractor(config, masked, mesh)(params, batches)]
  joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
  (together,) = FeatureExtractor(config, masked, mesh)(params, [joined])
  np.testing.assert_allclose(np.concatenate(apart, axis=1), together.features, rtol=0, atol=1e-5)
  (without,) = FeatureExtractor(config, plain, mesh)(params, [joined])
  assert np.abs(together.features - without.features).max() > 0.01
  model, tokens, draws = (
    bind(config, tiny.random_params(config)),
    tiny.random_tokens(config, 16),
    [],
  )
  for draw in range(3):
    of_draw = jax.random.fold_in(jax.random.key(0), draw)
    keys = [jax.random.fold_in(of_draw, index) for index in range(16)]
    keep = np.stack([jax.random.uniform(key, (config.n_positions,)) for key in keys]) > 0.4
    draws.append(model.features(tokens, keep))
  np.testing.assert_allclose(together.features, np.mean(draws, axis=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "asked, message",
  [
    ({"layers": (0, 3)}, r"features\.layers: 3 of .*0 to 2"),
    ({"layers": (-1,)}, r"features\.layers: -1"),
    ({"layers": ("all",)}, r"features\.layers: 'all'"),
    ({"grid": 3}, r"features\.grid: 3 doesn't divide.*4×4.*1, 2, 4"),
    ({"masks": 5}, r"features\.masks: 5.*autoregressive"),
  ],
)
def test_what_a_model_does_not_have(asked, message):
  with pytest.raises(UserError, match=message):
    feature_config(tiny.make_config(), **asked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checksum_is_the_same_by_numpy_and_on_a_device(monkeypatch, dtype):
  """Of leaves of any rank, and of floats as of the float32 that they become when they are read."""
  rng = np.random.default_rng(0)
  shapes = {"three": (3, 5, 7), "one": (9,), "none": (), "empty": (0, 3)}
  tree = {
    name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()
  }
  tree |= {"step": np.int32(-5), "rng": np.array([2**32 - 1, 5], np.uint32)}
  monkeypatch.setattr(checksums, "_PIECE", 8)
  found = checksums.checksum_on_host(tree)
  monkeypatch.setattr(checksums, "_is_here", lambda leaf: False)
  assert checksum(jax.tree.map(jnp.asarray, tree)) == found
  read = {
    name: leaf if name in ("step", "rng") else leaf.astype(np.float32)
    for name, leaf in tree.items()
  }
  assert checksum(read) == found


def test_checksums_tell_parameters_apart():
  config = tiny.make_config()
  params = tiny.random_params(config)
  same = checksum(params)
  assert len(same) == 16 and same == checksum(jax.tree.map(np.copy, params))
  for shape in ((1, 1, 1), (2, 2, 2)):
    mesh = tiny.mesh_of(shape)
    with jax.set_mesh(mesh):
      assert checksum(on_mesh(config, mesh)) == same, shape

  def changed(path, change):
    tree = jax.tree.map(np.copy, params)
    node = tree
    for name in path[:-1]:
      node = node[name]
    node[path[-1]] = change(node[path[-1]])
    return checksum(tree)

  def last_bit(x):
    x.view(np.uint32).flat[5] ^= 1
    return x

  qkv = ("blocks", "attn", "qkv")
  others = [
    changed(("wte",), last_bit),
    changed(("wte",), lambda x: x[::-1].copy()),
    changed(qkv, lambda x: x[:, ::-1].copy()),
    changed(qkv, lambda x: x.swapaxes(2, 3).copy()),
    changed(("wte",), lambda x: -x),
    checksum({**params, "wte": params["wtet"], "wtet": params["wte"]}),
  ]
  assert len({same, *others}) == 1 + len(others)
