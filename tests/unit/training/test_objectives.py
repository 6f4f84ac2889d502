"""What is predicted from what, and how losses are averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import bind
from igpt_jax.training.objectives import (
  autoregressive,
  has_counted,
  make_objective,
  masked,
  per_image,
  token_nll,
)
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

CAUSAL = tiny.make_config()
BERT = tiny.make_config(causal=False)


def make_keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def evaluate(config, objective, tokens, keys):
  params = tiny.random_params(config)
  run = tiny.jit(lambda params, tokens, keys: objective(bind(config, params), tokens, keys))
  return jax.tree.map(np.asarray, run(params, jnp.asarray(tokens), keys))


def test_token_nll_against_numpy():
  logits = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32) * 3
  tokens = tiny.random_tokens(tiny.make_config(n_vocab=7, n_positions=5), 2)
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(-1, keepdims=True)
  expected = [[-np.log(p[b, t, tokens[b, t]]) for t in range(5)] for b in range(2)]
  nll = token_nll(jnp.asarray(logits), jnp.asarray(tokens))
  np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)
  half = token_nll(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(tokens))
  assert half.dtype == jnp.float32


def test_autoregressive_counts_every_pixel():
  tokens = tiny.random_tokens(CAUSAL, 3)
  nll, weight = evaluate(CAUSAL, autoregressive, tokens, make_keys(3))
  assert np.all(weight == 1)
  logits = bind(CAUSAL, tiny.random_params(CAUSAL))(tokens)
  np.testing.assert_allclose(nll, token_nll(logits, tokens), rtol=0, atol=1e-5)
  # Raising a pixel's own logit is what lowers its loss: nothing is shifted twice.
  other = tokens.copy()
  other[:, 5] = (other[:, 5] + 1) % CAUSAL.n_vocab
  changed = evaluate(CAUSAL, autoregressive, other, make_keys(3))[0] != nll
  assert not np.any(changed[:, :5]) and np.all(changed[:, 5:].any(0))


@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_share_of_masked_pixels(probability):
  config = tiny.make_config(causal=False, n_layer=1, n_positions=64)
  tokens = tiny.random_tokens(config, 128)
  _, weight = evaluate(config, masked(probability), tokens, make_keys(128))
  assert set(np.unique(weight)) == {0.0, 1.0}
  error = np.sqrt(probability * (1 - probability) / weight.size)
  assert abs(weight.mean() - probability) < 4 * error
  # Pixels are independent: images' shares spread as a binomial's do, positions are all masked.
  deviation = np.sqrt(probability * (1 - probability) / 64)
  assert abs(weight.mean(1).std() / deviation - 1) < 0.3
  assert np.all(weight.any(0)) and np.all(weight.mean(0) < 1)


def test_masked_loss_is_of_hidden_pixels_from_visible_ones():
  objective = masked(0.3)
  tokens, keys = tiny.random_tokens(BERT, 4), make_keys(4)
  nll, weight = evaluate(BERT, objective, tokens, keys)
  hidden = weight == 1
  assert np.all(hidden.any(1)) and np.all((~hidden).any(1))
  logits = bind(BERT, tiny.random_params(BERT))(tokens, ~hidden)
  np.testing.assert_allclose(nll, token_nll(logits, tokens), rtol=0, atol=1e-5)

  # The loss is the mean over hidden pixels alone.
  expected = [row[mask].mean() for row, mask in zip(nll, hidden, strict=True)]
  np.testing.assert_allclose(per_image(nll, weight), expected, rtol=1e-6)

  # A hidden pixel's colour changes its own loss, and what no other pixel's prediction is made of.
  row, position = np.argwhere(hidden)[0]
  other = tokens.copy()
  other[row, position] = (other[row, position] + 1) % BERT.n_vocab
  nll_other, weight_other = evaluate(BERT, objective, other, keys)
  np.testing.assert_array_equal(weight_other, weight)
  np.testing.assert_array_equal(np.argwhere(nll_other != nll), [[row, position]])

  # A visible pixel's colour changes its neighbours' losses.
  row, position = np.argwhere(~hidden)[0]
  other = tokens.copy()
  other[row, position] = (other[row, position] + 1) % BERT.n_vocab
  changed = evaluate(BERT, objective, other, keys)[0] != nll
  assert np.all(changed[row][hidden[row]])


def test_what_is_drawn_for_a_picture_does_not_depend_on_its_batch():
  tokens, keys = tiny.random_tokens(BERT, 6), make_keys(6)
  _, together = evaluate(BERT, masked(0.4), tokens, keys)
  _, some = evaluate(BERT, masked(0.4), tokens[3:5], keys[3:5])
  np.testing.assert_array_equal(some, together[3:5])
  assert len({tuple(row) for row in together}) == 6  # images have masks of their own


def test_per_image_is_a_weighted_mean():
  nll = jnp.asarray([[1.0, 2.0, 6.0], [4.0, 5.0, 9.0], [7.0, 8.0, 9.0]])
  weight = jnp.asarray([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
  np.testing.assert_array_equal(per_image(nll, weight), [3.0, 7.0, 0.0])
  np.testing.assert_array_equal(has_counted(weight), [1.0, 1.0, 0.0])


def test_objectives_by_name():
  assert make_objective("autoregressive") is autoregressive
  _, weight = evaluate(
    BERT, make_objective("masked", 0.9), tiny.random_tokens(BERT, 16), make_keys(16)
  )
  assert weight.mean() > 0.8
  with pytest.raises(UserError, match=r"objective: 'gan'.*autoregressive, masked"):
    make_objective("gan")
  for probability in (0.0, 1.0, float("nan")):
    with pytest.raises(UserError, match=f"mask_probability: {probability}"):
      make_objective("masked", probability)
