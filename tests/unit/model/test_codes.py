"""Raw RGB tokens in the model: an exact likelihood, the order of codes, drawing, masks, and meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.model.decoding import autoregressive, masked
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.model.image_gpt import bind, init_params, to_compute_dtypes
from igpt_jax.parallel import sharding
from igpt_jax.training.objectives import draw_visible, make_objective, token_nll
from igpt_jax.training.state import param_shardings
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

PLAIN = SamplingConfig()


def rgb(kind, side=2, **changes):
  """A small model of raw RGB images of side × side pixels."""
  positions = side**2 * (3 if kind == "subpixels" else 1)
  return tiny.make_config(token_kind=kind, n_vocab=256, n_positions=positions, **changes)


CHANNELS, SUBPIXELS = rgb("channels"), rgb("subpixels")
OPTIONS = {"qk_norm": True, "value_embeddings": True, "x0_skip": True, "positions": "rope2d"}
KINDS = [CHANNELS, SUBPIXELS, rgb("channels", **OPTIONS), rgb("subpixels", **OPTIONS)]


def params_of(config):
  return jax.tree.map(jnp.asarray, tiny.random_params(config))


def name_of(config):
  return f"{config.token_kind}{', all options' if config.options else ''}"


over_kinds = pytest.mark.parametrize("config", KINDS, ids=name_of)


@functools.partial(tiny.jit, static_argnums=0)
def logits_of(config, params, tokens):
  """[B, every code in order, 256]."""
  logits = bind(config, params)(tokens)
  return logits.reshape(len(tokens), -1, config.n_vocab)


@functools.partial(tiny.jit, static_argnums=0)
def nll_of(config, params, tokens):
  return make_objective("autoregressive")(bind(config, params), tokens, None)[0]


@pytest.mark.parametrize(
  "config",
  [*(dataclasses.replace(config, dtype="bfloat16") for config in KINDS),
   tiny.make_config(positions="axial", dtype="bfloat16")],
  ids=lambda config: f"{name_of(config)}, {config.positions}",
)  # fmt: skip
def test_parameters_may_be_kept_as_they_are_multiplied(config):
  """Sums of several rows are rounded once, after the last: in training, evaluation and drawing."""
  tokens, params = tiny.random_tokens(config, 8), with_rows_that_cancel(config)
  expected = nll_of(config, params, tokens)
  kept = to_compute_dtypes(config, with_rows_that_cancel(config))
  np.testing.assert_array_equal(nll_of(config, kept, tokens), expected)
  run = tiny.jit(functools.partial(autoregressive.complete, config, sampling=PLAIN))
  keys = jax.random.split(jax.random.key(0), 8)
  drawn, again = (run(p, tokens[:, :3], keys) for p in (params, kept))
  np.testing.assert_array_equal(again.tokens, drawn.tokens)
  np.testing.assert_array_equal(again.nll, drawn.nll)
  # What drawing says of its samples is what training says of them, up to the order of sums.
  said = nll_of(config, params, drawn.tokens)
  np.testing.assert_allclose(said[:, 3:], drawn.nll[:, 3:], atol=0.15)


def with_rows_that_cancel(config):
  """Parameters whose rows of red and of green have large parts that cancel each other."""
  params = params_of(config)
  if config.tokens.codes == 1:
    return params
  large = 64.0 * jnp.repeat(jnp.array([1.0, -1.0, 0.0]), 256)[:, None]
  params["wte"] += large
  params["heads"]["seen"] += jnp.roll(large, 256, axis=0)  # green of red; blue of red, of green
  if config.value_embeddings:
    params["blocks"]["attn"]["value_embed"] += large
  return params


@pytest.mark.parametrize("kind", ["channels", "subpixels"])
def test_a_new_model_takes_exactly_eight_bits_for_each_dimension(kind):
  """Its output table is zero: all 256 levels are equally likely."""
  config = rgb(kind)
  params = init_params(config, jax.random.key(0))
  nll = np.asarray(nll_of(config, params, tiny.random_tokens(config, 3)), np.float64)
  assert config.bits_per_dim(nll.mean()) == pytest.approx(8, abs=1e-6)
  assert nll.sum(1) / (2 * 2 * 3 * math.log(2)) == pytest.approx(np.full(3, 8), abs=1e-6)


@pytest.mark.parametrize("kind", ["channels", "subpixels"])
def test_the_likelihoods_of_all_colours_of_a_pixel_sum_to_one(kind):
  """All 256³: log p(r) + log p(g | r) + log p(b | r, g), read from the model for every r and g."""
  config = rgb(kind, side=1)
  params = params_of(config)
  red, green = np.divmod(np.arange(2**16), 256)
  shape = config.tokens.shape(config.n_positions)
  total, rng = 0.0, np.random.default_rng(0)
  for rows in np.array_split(np.arange(2**16), 16):
    colours = np.stack([red[rows], green[rows], rng.integers(256, size=len(rows))], 1)
    logits = logits_of(config, params, colours.reshape(-1, *shape).astype(np.int32))
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    at = np.arange(len(rows))
    both = log_p[at, 0, red[rows]] + log_p[at, 1, green[rows]]
    total += np.exp(both[:, None] + log_p[:, 2]).sum()
    nll = nll_of(config, params, colours.reshape(-1, *shape).astype(np.int32)).sum(1)
    np.testing.assert_allclose(-nll, both + log_p[at, 2, colours[:, 2]], rtol=0, atol=1e-4)
  assert total == pytest.approx(1, abs=1e-5)


@over_kinds
def test_a_code_depends_on_those_before_it_alone(config):
  """Red, green, blue of a pixel, then the next one; each code does change what comes after it."""
  tokens = tiny.random_tokens(config, 1)
  flat = tokens.reshape(-1)
  others = np.repeat(flat[None], len(flat), axis=0)
  others[np.arange(len(flat)), np.arange(len(flat))] ^= 1  # row i has another code i
  params = params_of(config)
  before = logits_of(config, params, tokens)
  after = logits_of(config, params, others.reshape(-1, *tokens.shape[1:]))
  changed = np.abs(np.asarray(after - before)).max(-1) > 1e-5
  np.testing.assert_array_equal(changed, ~np.tri(len(flat), dtype=bool))


@over_kinds
@pytest.mark.parametrize("rows_given", [0, 1])
def test_samples_have_the_likelihood_that_the_full_forward_gives_them(config, rows_given):
  """Their cached draws, each from the codes before: the nats told are those of the drawn tokens."""
  given = rows_given * config.n_positions // 2
  tokens, keys = tiny.random_tokens(config, 3), jax.random.split(jax.random.key(0), 6)
  params = params_of(config)
  draw = functools.partial(autoregressive.complete, config, sampling=PLAIN, samples_per_image=2)
  samples = tiny.jit(draw)(params, tokens[:, :given], keys)
  assert samples.tokens.shape == (6, *config.tokens.shape(config.n_positions))
  np.testing.assert_array_equal(samples.tokens[:, :given], tokens[:, :given].repeat(2, axis=0))
  nll = nll_of(config, params, samples.tokens)
  np.testing.assert_allclose(samples.nll[:, given:], nll[:, given:], rtol=0, atol=1e-4)
  assert np.std(samples.nll[:, given:]) > 0.1
  assert not np.any(samples.nll[:, :given])


@pytest.mark.parametrize("config", [CHANNELS, SUBPIXELS], ids=name_of)
def test_the_likeliest_codes_are_taken_in_turn(config):
  """Temperature 0: each code is the most likely one given all before it."""
  params, keys = params_of(config), jax.random.split(jax.random.key(0), 1)
  greedy = functools.partial(autoregressive.complete, config, sampling=SamplingConfig(0.0))
  drawn = tiny.jit(greedy)(params, tiny.random_tokens(config, 1)[:, :0], keys).tokens
  likeliest = np.asarray(logits_of(config, params, drawn)).argmax(-1)
  np.testing.assert_array_equal(drawn.reshape(1, -1), likeliest)


@pytest.mark.parametrize("config", [CHANNELS, SUBPIXELS], ids=name_of)
@pytest.mark.parametrize("chunk", [1, 3])
def test_rows_drawn_by_one_program_are_the_same(config, chunk):
  """The number of given tokens is traced, as where the page draws."""
  params, tokens = params_of(config), tiny.random_tokens(config, 2)
  keys, given = jax.random.split(jax.random.key(1), 2), 2
  whole = tiny.jit(functools.partial(autoregressive.complete, config, sampling=PLAIN))(
    params, tokens[:, :given], keys
  )
  begin = tiny.jit(functools.partial(autoregressive.begin, config))
  extend = functools.partial(autoregressive.extend, config, n_tokens=chunk, sampling=PLAIN)
  progress, extend = begin(params, tokens, keys, n_given=np.int32(given)), tiny.jit(extend)
  while progress.position < config.n_positions:
    progress = extend(params, progress)
  np.testing.assert_array_equal(progress.tokens, whole.tokens)
  np.testing.assert_allclose(progress.nll, whole.nll, rtol=0, atol=1e-4)


def test_the_draws_of_a_pixels_codes_are_independent():
  """A new model has all levels equally likely: the same random numbers would give grey."""
  config = rgb("channels", side=1)
  params, keys = init_params(config, jax.random.key(0)), jax.random.split(jax.random.key(0), 2_000)
  prompt = np.zeros((2_000, 0, 3), np.int32)
  draw = tiny.jit(functools.partial(autoregressive.complete, config, sampling=PLAIN))
  drawn = np.asarray(draw(params, prompt, keys).tokens, np.float64)[:, 0]
  correlation = np.corrcoef(drawn.T)[np.triu_indices(3, 1)]
  assert np.abs(correlation).max() < 5 / math.sqrt(2_000)


def test_a_masked_pixel_loses_all_its_codes():
  """BERT: what it holds changes no other pixel's prediction; a visible one's does."""
  config = rgb("channels", causal=False)
  params, tokens = params_of(config), tiny.random_tokens(config, 1)
  keep = np.array([[True, False, True, True]])
  forward = tiny.jit(lambda tokens: bind(config, params)(tokens, keep))
  before = forward(tokens)
  for pixel, shows in ((0, True), (1, False)):
    other = tokens.copy()
    other[0, pixel] ^= 1
    same = np.delete(np.asarray(forward(other) == before), pixel, axis=1).all()
    assert same != shows


def test_berts_loss_counts_masked_pixels_with_all_their_codes():
  config = rgb("channels", causal=False)
  params, tokens = params_of(config), tiny.random_tokens(config, 5)
  keys = jax.random.split(jax.random.key(0), 5)
  nll, weight = make_objective("masked", 0.4)(bind(config, params), tokens, keys)
  keep = draw_visible(keys, 4, 0.4)
  np.testing.assert_array_equal(weight, 1 - keep.astype(np.float32))
  logits = bind(config, params)(tokens, keep)
  of_codes = [token_nll(logits[:, :, code], tokens[:, :, code]) for code in range(3)]
  np.testing.assert_allclose(nll, sum(of_codes), rtol=1e-5)


def test_filling_draws_a_pixels_codes_from_each_other():
  """All unknown pixels in one pass: the nats told are the model's, of the drawn codes in order."""
  config = rgb("channels", causal=False)
  params, tokens = params_of(config), tiny.random_tokens(config, 3)
  known = np.array([[True, False, False, True]] * 3)
  keys = jax.random.split(jax.random.key(0), 3)
  fill = functools.partial(masked.fill, config, steps=1, sampling=PLAIN)
  filled = tiny.jit(fill)(params, tokens, known, keys)
  np.testing.assert_array_equal(filled.tokens[known], tokens[known])
  final, _ = bind(config, params).hidden(bind(config, params).embed(tokens, known))
  nll = token_nll(bind(config, params).logits(final, filled.tokens), filled.tokens)
  np.testing.assert_allclose(filled.nll, np.where(known, 0, nll), rtol=0, atol=1e-4)


@over_kinds
def test_features_are_means_over_blocks_of_pixels(config):
  """A pixel's three positions are averaged, too."""
  params, tokens = params_of(config), tiny.random_tokens(config, 2)
  model = bind(config, params)
  final = np.asarray(model.hidden(model.embed(tokens))[0], np.float32)
  by_pixel = final.reshape(2, 2, 2, -1, config.n_embd).mean(3)
  found = model.features(tokens, grid=2)[-1].reshape(2, 2, 2, -1)
  np.testing.assert_allclose(found, by_pixel, rtol=0, atol=1e-5)
  np.testing.assert_allclose(model.features(tokens)[-1], by_pixel.mean((1, 2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (2, 1, 2, 2)])
@pytest.mark.parametrize("config", KINDS[2:], ids=name_of)
def test_on_a_mesh_losses_gradients_and_samples_are_the_same(config, shape):
  mesh = tiny.mesh_of(shape)
  params, tokens = params_of(config), tiny.random_tokens(config, 8)
  keys = jax.random.split(jax.random.key(0), 8)

  def loss_and_grads(params, tokens):
    return jax.value_and_grad(
      lambda params: jnp.mean(
        make_objective("autoregressive")(bind(config, params), tokens, keys)[0]
      )
    )(params)

  draw = functools.partial(autoregressive.complete, config, sampling=PLAIN)
  given = tokens[:, : config.n_positions // 2]
  expected = tiny.jit(loss_and_grads)(params, tokens)
  drawn = tiny.jit(draw)(params, given, keys)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, param_shardings(config, mesh))
    rows = sharding.put_global(tokens, mesh)
    found = tiny.jit(loss_and_grads)(placed, rows)
    there = tiny.jit(draw)(placed, sharding.put_global(given, mesh), keys)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
  np.testing.assert_array_equal(there.tokens, drawn.tokens)


def test_what_makes_no_sense_of_three_positions_a_pixel_is_refused():
  with pytest.raises(UserError, match=r"model.positions: axial; with data.token_kind=subpixels"):
    rgb("subpixels", positions="axial")
  with pytest.raises(UserError, match=r"objective: masked; with data.token_kind=subpixels"):
    rgb("subpixels", causal=False)
  with pytest.raises(UserError, match=r"learned is for square images, not 13 positions"):
    tiny.make_config(token_kind="subpixels", n_vocab=256, n_positions=13)
  with pytest.raises(UserError, match=r"data.token_kind: channels has codes of 256 levels"):
    tiny.make_config(token_kind="channels", n_vocab=11)
