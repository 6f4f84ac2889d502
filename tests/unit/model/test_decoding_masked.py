"""Filling any region with a BERT model: what is known stays, and the schedule is the one it claims."""

import functools
import math

import jax
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.model.decoding import autoregressive, masked
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.model.image_gpt import bind
from igpt_jax.parallel import sharding
from igpt_jax.training.state import param_shardings
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = tiny.make_config(causal=False)
PARAMS = tiny.random_params(CONFIG)
GREEDY, PLAIN = SamplingConfig(temperature=0.0), SamplingConfig()
LENGTH = CONFIG.n_positions


@functools.cache
def compiled(steps, sampling=PLAIN):
  return tiny.jit(functools.partial(autoregressive.fill, CONFIG, steps=steps, sampling=sampling))


def fill(tokens, known, keys, *settings):
  return jax.tree.map(np.asarray, compiled(*settings)(PARAMS, tokens, known, keys))


@tiny.jit
def predict(params, tokens, keep):
  return jax.nn.log_softmax(bind(CONFIG, params)(tokens, keep), axis=-1)


def make_case(batch=5, seed=0):
  """Images, each with a region of its own; of one all is known, of one nothing."""
  rng = np.random.default_rng(seed)
  known = rng.random((batch, LENGTH)) < 0.4
  known[0], known[1] = True, False
  return (
    tiny.random_tokens(CONFIG, batch, seed),
    known,
    jax.random.split(jax.random.key(seed), batch),
  )


def literal(tokens, known, steps):
  """Greedy, image by image, in numpy: (tokens, nll)."""
  tokens, nll = np.where(known, tokens, 0), np.zeros(tokens.shape)
  for row, settled in enumerate(known.copy()):
    n_unknown = int((~settled).sum())
    for done in range(1, steps + 1):
      unknown = [t for t in range(LENGTH) if not settled[t]]
      if not unknown:
        break
      logp = np.asarray(predict(PARAMS, tokens[row : row + 1], settled[None]))[0]
      surest = sorted(unknown, key=lambda t, logp=logp: -logp[t].max())
      left = len(unknown) - 1
      if steps < n_unknown:
        left = min(left, math.floor(n_unknown * math.cos(math.pi / 2 * done / steps) + 1e-9))
      for t in surest[: len(unknown) - left]:
        settled[t], tokens[row, t], nll[row, t] = True, logp[t].argmax(), -logp[t].max()
    assert settled.all()
  return tokens, nll


@pytest.mark.parametrize("steps", [1, 3, 7, LENGTH, LENGTH + 5])
def test_greedy_is_that_of_a_literal_loop(steps):
  tokens, known, keys = make_case()
  found = fill(tokens, known, keys, steps, GREEDY)
  expected, nll = literal(tokens, known, steps)
  np.testing.assert_array_equal(found.tokens, expected)
  np.testing.assert_allclose(found.nll, nll, rtol=0, atol=1e-4)


def test_one_program_serves_every_number_of_steps_and_way_of_drawing():
  """Pass after pass: what is settled stays, and the last is what `fill` draws."""
  tokens, known, keys = make_case()
  begin = tiny.jit(masked.begin)
  extend = tiny.jit(functools.partial(masked.extend, CONFIG))
  ways = [(1, PLAIN), (3, GREEDY), (7, SamplingConfig(0.8, 5, 0.9))]
  filled = []
  with tiny.compilations() as found:
    for steps, way in ways:
      filling, values = begin(tokens, known), way.values(truncates=True)
      for done in range(1, steps + 1):
        before = jax.tree.map(np.asarray, filling)
        filling = extend(PARAMS, before, keys, 1, steps=steps, sampling=values)
        assert filling.done == done and np.sum(filling.settled & ~before.settled) > 0
        kept = np.where(before.settled, filling.tokens, 0)
        np.testing.assert_array_equal(kept, before.tokens)
      filled.append(filling)
  assert found["begin"] == found["extend"] == 1
  for (steps, way), filling in zip(ways, filled, strict=True):
    whole = fill(tokens, known, keys, steps, way)
    np.testing.assert_array_equal(filling.tokens, whole.tokens)
    np.testing.assert_allclose(filling.nll, whole.nll, rtol=0, atol=1e-5)
    assert np.all(filling.settled)


def test_the_number_of_steps_matters():
  tokens, known, keys = make_case()
  found = {steps: fill(tokens, known, keys, steps, GREEDY).tokens for steps in (1, LENGTH)}
  assert np.any(found[1] != found[LENGTH])


@pytest.mark.parametrize("steps", [1, 4, LENGTH])
def test_known_pixels_stay_and_all_others_are_drawn(steps):
  tokens, known, keys = make_case(seed=1)
  found = fill(tokens, known, keys, steps, SamplingConfig(temperature=0.9, top_p=0.95))
  np.testing.assert_array_equal(found.tokens[known], tokens[known])
  assert np.all(found.nll[known] == 0) and np.all(found.nll[~known] > 0)
  assert found.tokens.dtype == np.int32 and found.nll.dtype == np.float32
  assert found.tokens.min() >= 0 and found.tokens.max() < CONFIG.n_vocab
  # What an unknown pixel was before is never looked at.
  other = np.where(known, tokens, (tokens + 1) % CONFIG.n_vocab)
  again = fill(other, known, keys, steps, SamplingConfig(temperature=0.9, top_p=0.95))
  np.testing.assert_array_equal(again.tokens, found.tokens)


def test_one_step_draws_from_the_first_prediction():
  """Independently at each position: their frequencies are the model's."""
  tokens = np.repeat(tiny.random_tokens(CONFIG, 1), 4_000, axis=0)
  known = np.tile(np.arange(LENGTH) % 3 == 0, (len(tokens), 1))
  found = fill(tokens, known, jax.random.split(jax.random.key(3), len(tokens)), 1)
  logp = np.asarray(predict(PARAMS, tokens[:1], known[:1]))[0]
  for t in np.flatnonzero(~known[0]):
    frequency = np.bincount(found.tokens[:, t], minlength=CONFIG.n_vocab) / len(tokens)
    assert np.abs(frequency - np.exp(logp[t])).max() < 5 * math.sqrt(0.25 / len(tokens))
    np.testing.assert_allclose(found.nll[:, t], -logp[t, found.tokens[:, t]], rtol=0, atol=1e-4)
  unknown = np.flatnonzero(~known[0])[:2]
  assert abs(np.corrcoef(found.tokens[:, unknown].T)[0, 1]) < 0.1


def test_a_picture_does_not_depend_on_its_batch_but_on_its_key():
  tokens, known, keys = make_case()
  together = fill(tokens, known, keys, 4)
  alone = fill(tokens[3:4], known[3:4], keys[3:4], 4)
  np.testing.assert_array_equal(alone.tokens, together.tokens[3:4])
  np.testing.assert_allclose(alone.nll, together.nll[3:4], rtol=0, atol=1e-5)
  turned = fill(tokens[3:4], known[3:4], keys[2:3], 4)
  assert np.any(turned.tokens != alone.tokens)


@pytest.mark.parametrize("shape", tiny.MESHES)
def test_on_a_mesh_it_is_the_same(shape):
  mesh = tiny.mesh_of(shape)
  config = tiny.make_config(causal=False, n_head=4)
  params = tiny.random_params(config)
  tokens, known, keys = make_case(8)
  run = functools.partial(autoregressive.fill, config, steps=5, sampling=PLAIN)
  expected = tiny.jit(run)(params, tokens, known, keys)
  placed = jax.device_put(params, param_shardings(config, mesh))
  with jax.set_mesh(mesh):
    put = functools.partial(sharding.put_global, mesh=mesh)
    found = tiny.jit(run)(placed, put(tokens), put(known), keys)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_allclose(found.nll, expected.nll, rtol=0, atol=1e-4)


def test_causal_models_say_why_they_cannot():
  config = tiny.make_config()
  tokens, known, keys = make_case()
  with pytest.raises(UserError, match=r"autoregressive.*raster order.*can't condition.*below"):
    autoregressive.fill(
      config, tiny.random_params(config), tokens, known, keys, steps=2, sampling=PLAIN
    )


def test_no_steps_are_refused():
  with pytest.raises(UserError, match="steps: 0"):
    autoregressive.fill(CONFIG, PARAMS, *make_case(), sampling=PLAIN, steps=0)
