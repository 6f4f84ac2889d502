"""A split's features: every picture once, in order, from every layer."""

import jax
import numpy as np
import pytest
import tiny

from igpt_jax.model.image_gpt import bind
from igpt_jax.training.features import FeatureExtractor
from igpt_jax.training.state import param_shardings

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_features_of_a_stream(shape, causal):
  mesh = tiny.mesh_of(shape)
  config = tiny.make_config(causal=causal)
  tokens = tiny.random_tokens(config, 24)
  labels = np.arange(24, dtype=np.int32)
  counts = np.ones(24, bool)
  counts[[3, 20, 21, 22, 23]] = False  # an unreadable picture, and the padding at the end
  batches = [
    {
      "tokens": tokens[rows],
      "label": labels[rows],
      "mask": counts[rows],
      "index": np.arange(24)[rows],
    }
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24))
  ]
  done = []
  extract = FeatureExtractor(config, mesh)
  params = jax.device_put(tiny.random_params(config), param_shardings(config, mesh))
  # As where a mesh follows the network, and not the order of the hosts.
  shuffled = [{name: rows[::-1] for name, rows in batch.items()} for batch in batches]
  found = extract(params, shuffled, done.append)
  assert done == [7, 15, 19]
  assert extract._extract._cache_size() == 1
  np.testing.assert_array_equal(found.labels, labels[counts])
  np.testing.assert_array_equal(found.tokens, tokens[counts])
  expected = tiny.jit(lambda params: bind(config, params).features(tokens))(
    tiny.random_params(config)
  )
  assert found.features.shape == (3, 19, 16) and found.features.dtype == np.float32
  np.testing.assert_allclose(found.features, expected[:, counts], rtol=0, atol=1e-5)
