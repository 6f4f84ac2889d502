"""Likelihood of every image exactly once, and the baselines beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.model.image_gpt import bind
from igpt_jax.training.evaluation import LikelihoodEvaluator, count_tokens, unigram_nats
from igpt_jax.training.objectives import autoregressive, masked, token_nll
from igpt_jax.training.state import param_shardings
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

CAUSAL = tiny.make_config()
BERT = tiny.make_config(causal=False)


def batches_of(tokens, batch_size, order=None):
  """Batches as the pipeline makes them: the last one filled up with rows that don't count."""
  order = np.arange(len(tokens)) if order is None else order
  for first in range(0, len(order), batch_size):
    rows = order[first : first + batch_size]
    padding = batch_size - len(rows)
    yield {
      "tokens": np.pad(tokens[rows].astype(np.uint16), ((0, padding), (0, 0)), constant_values=3),
      "index": np.pad(rows.astype(np.int32), (0, padding)),
      "mask": np.arange(batch_size) < len(rows),
      "label": np.zeros(batch_size, np.int32),
    }


def on_mesh(config, mesh):
  return jax.device_put(tiny.random_params(config), param_shardings(config, mesh))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_last_batch_counts_for_what_is_in_it(shape):
  """21 images in batches of 8, of 16 and of 24 have one and the same likelihood."""
  mesh = tiny.mesh_of(shape)
  tokens = tiny.random_tokens(CAUSAL, 21)
  logits = tiny.jit(lambda params: bind(CAUSAL, params)(tokens))(tiny.random_params(CAUSAL))
  expected = np.asarray(token_nll(logits, jnp.asarray(tokens)), np.float64).mean()
  likelihood = LikelihoodEvaluator(CAUSAL, autoregressive, mesh)
  params = on_mesh(CAUSAL, mesh)
  done = []
  for batch_size in (8, 24):
    found = likelihood(params, batches_of(tokens, batch_size), report=done.append)
    assert found == (pytest.approx(expected, rel=1e-6), 21, 21)
  assert done == [1, 2, 3, 1]
  assert likelihood._step._cache_size() == 2  # one per batch shape


def test_masks_belong_to_pictures():
  """BERT's likelihood depends neither on the order nor on the batch."""
  mesh = tiny.mesh_of()
  tokens = tiny.random_tokens(BERT, 16)
  likelihood = LikelihoodEvaluator(BERT, masked(0.4), mesh)
  params = on_mesh(BERT, mesh)
  order = np.random.default_rng(0).permutation(16)
  found = likelihood(params, batches_of(tokens, 8))
  again = likelihood(params, batches_of(tokens, 8, order))
  assert found.images == again.images == 16
  assert again.nats_per_token == pytest.approx(found.nats_per_token, rel=1e-6)


def nats_of_masks(tokens, probability, masks):
  """Nats per token of every image under every mask [masks, N], computed here; nan: it hides nothing."""
  model, rows = bind(BERT, tiny.random_params(BERT)), []
  for seed in range(masks):
    keys = [jax.random.fold_in(jax.random.key(seed), index) for index in range(len(tokens))]
    keep = np.stack([jax.random.uniform(key, (BERT.n_positions,)) for key in keys]) > probability
    nll = np.asarray(token_nll(model(tokens, jnp.asarray(keep)), jnp.asarray(tokens)), np.float64)
    rows.append(
      [row[~seen].mean() if not seen.all() else np.nan for row, seen in zip(nll, keep, strict=True)]
    )
  return np.asarray(rows)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1)], ids=str)
@pytest.mark.parametrize("masks", [1, 3])
def test_a_mask_that_hides_nothing_is_in_no_mean(masks, shape):
  """Every image has masks of its own, and every mask that hides something counts once."""
  mesh = tiny.mesh_of(shape)
  tokens = tiny.random_tokens(BERT, 21)
  expected = nats_of_masks(tokens, 0.05, masks)
  assert 0.3 < np.isnan(expected).mean() < 0.7
  likelihood = LikelihoodEvaluator(BERT, masked(0.05), mesh)
  for batch_size in (8, 24):
    found = likelihood(on_mesh(BERT, mesh), batches_of(tokens, batch_size), masks=masks)
    assert found.nats_per_token == pytest.approx(np.nanmean(expected), rel=1e-5)
    assert (found.images, found.predicted) == (21, np.isfinite(expected).sum())


def test_without_a_masked_pixel_there_is_no_likelihood():
  mesh = tiny.mesh_of()
  likelihood = LikelihoodEvaluator(BERT, masked(1e-6), mesh)
  found = likelihood(on_mesh(BERT, mesh), batches_of(tiny.random_tokens(BERT, 5), 4), masks=2)
  assert np.isnan(found.nats_per_token) and (found.images, found.predicted) == (5, 0)


def test_no_pictures_have_no_likelihood():
  mesh = tiny.mesh_of()
  with pytest.raises(ValueError, match="no images"):
    LikelihoodEvaluator(CAUSAL, autoregressive, mesh)(on_mesh(CAUSAL, mesh), [])


@functools.cache
def skewed_tokens():
  """(train, test) of five colours over six positions, position t preferring colour t."""
  rng = np.random.default_rng(0)

  def draw(n):
    return np.where(rng.random((n, 6)) < 0.6, np.arange(6) % 4, rng.integers(5, size=(n, 6)))

  return draw(40), draw(30)


def test_token_counts():
  tokens, _ = skewed_tokens()
  expected = np.array([[np.sum(tokens[:, t] == v) for v in range(5)] for t in range(6)])
  found = count_tokens(batches_of(tokens, 16), 5, 6)
  assert found.dtype == np.int64
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(count_tokens([{"tokens": tokens}], 5, 6), expected)


def test_baselines_against_a_direct_computation():
  train, test = skewed_tokens()
  train_counts, test_counts = (count_tokens([{"tokens": t}], 5, 6) for t in (train, test))

  nats, position_nats = [], []
  for picture in test:
    for t, token in enumerate(picture):
      frequency = (np.sum(train == token) + 1) / (train.size + 5)
      nats.append(-np.log(frequency))
      frequency = (np.sum(train[:, t] == token) + 1) / (len(train) + 5)
      position_nats.append(-np.log(frequency))
  unigram = unigram_nats(train_counts.sum(0), test_counts.sum(0))
  position = unigram_nats(train_counts, test_counts)
  assert unigram == pytest.approx(np.mean(nats), rel=1e-12)
  assert position == pytest.approx(np.mean(position_nats), rel=1e-12)
  assert position < unigram < np.log(5)


def test_an_unseen_colour_costs_finite_nats():
  assert unigram_nats(np.array([7, 0]), np.array([0, 3])) == pytest.approx(np.log(9))
