"""The model's meaning: sizes, initial values, what sees what, and that rewriting changes nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.model import image_gpt, model_config
from igpt_jax.model.image_gpt import bind, count_params, init_params
from igpt_jax.model.model_config import PRESETS, ImageGPTConfig
from igpt_jax.training.objectives import token_nll
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

CAUSAL = tiny.make_config()
BERT = tiny.make_config(causal=False)


def keep_mask(tokens, seed=0):
  return np.random.default_rng(seed).random(tokens.shape) > 0.3


@functools.partial(tiny.jit, static_argnums=0)
def apply(config, params, tokens, keep=None):
  return bind(config, params)(tokens, keep)


@pytest.mark.parametrize(
  "name, published",
  [("s", 76_571_648), ("m", 455_157_760), ("l", 1_362_250_752), ("xl", 6_801_438_720)],
)
def test_presets_have_the_published_number_of_parameters(name, published):
  preset = PRESETS[name]
  config = ImageGPTConfig(n_layer=preset.n_layer, n_head=preset.n_head, n_embd=preset.n_embd)
  assert count_params(config) == published


def test_presets_have_the_published_learning_rates():
  rates = {name: preset.learning_rate for name, preset in PRESETS.items()}
  assert rates == {"s": 0.003, "m": 0.003, "l": 0.001, "xl": 0.0003}
  masked = {name: preset.learning_rate_masked for name, preset in PRESETS.items()}
  assert masked | {"xl": None} == {"s": 0.01, "m": 0.003, "l": 0.001, "xl": None}


@pytest.mark.parametrize("causal", [True, False])
def test_parameters_are_a_plain_dict_of_stacked_layers(causal):
  config = tiny.make_config(n_layer=3, causal=causal, dtype="bfloat16")
  expected = {
    "wte": (11, 16),
    "wpe": (16, 16),
    "wtet": (11, 16),
    "ln_f/g": (16,),
    "blocks/ln_1/g": (3, 16),
    "blocks/ln_2/g": (3, 16),
    "blocks/attn/qkv": (3, 3, 16, 16),
    "blocks/attn/proj": (3, 16, 16),
    "blocks/mlp/fc": (3, 16, 64),
    "blocks/mlp/proj": (3, 64, 16),
  }
  if causal:
    expected["sos"] = (16,)
  found = tiny.leaf_names(image_gpt.abstract_params(config))
  assert {name: leaf.shape for name, leaf in found.items()} == expected
  assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float32)}
  axes = image_gpt.param_axes(config)
  for name, leaf in found.items():
    node = functools.reduce(lambda tree, key: tree[key], name.split("/"), axes)
    assert len(node) == leaf.ndim, name


def test_initial_values():
  """Mean and deviation of each variable, within five standard errors of the released code's."""
  width, n_layer = 64, 4
  config = tiny.make_config(n_layer=n_layer, n_embd=width, n_vocab=128, n_positions=256)
  init = tiny.jit(functools.partial(init_params, config))
  params = tiny.leaf_names(init(jax.random.key(1)))
  deviations = {
    "wte": 0.02,
    "wpe": 0.01,
    "sos": 0.02,
    "blocks/attn/qkv": 1 / math.sqrt(width),
    "blocks/attn/proj": 1 / math.sqrt(width * n_layer),
    "blocks/mlp/fc": 0.02,
    "blocks/mlp/proj": 0.02,
  }
  for name, expected in deviations.items():
    value = np.asarray(params[name], np.float64)
    assert abs(value.std() / expected - 1) < 5 / math.sqrt(2 * value.size), name
    assert abs(value.mean()) < 5 * expected / math.sqrt(value.size), name
    # A normal distribution's share within one deviation: a uniform one has 0.577.
    if value.size > 10_000:
      assert abs(np.mean(np.abs(value) < expected) - 0.6827) < 0.02, name
  assert not np.any(params["wtet"])
  for name in ("ln_f/g", "blocks/ln_1/g", "blocks/ln_2/g"):
    assert np.all(np.asarray(params[name]) == 1), name
  # No two draws are the same: between layers, among q, k and v, between keys.
  qkv = np.asarray(params["blocks/attn/qkv"]).reshape(3 * n_layer, -1)
  assert np.abs(np.corrcoef(qkv) - np.eye(len(qkv))).max() < 0.1
  again, other = (tiny.leaf_names(init(jax.random.key(seed))) for seed in (1, 2))
  for name in deviations:
    np.testing.assert_array_equal(params[name], again[name])
    assert not np.any(np.asarray(params[name]) == np.asarray(other[name])), name


@pytest.mark.parametrize("config", [CAUSAL, BERT], ids=["causal", "bert"])
def test_initial_loss_is_that_of_the_uniform_distribution(config):
  """The output table is zero, so every colour is equally likely, exactly."""
  params = tiny.jit(functools.partial(init_params, config))(jax.random.key(0))
  tokens = tiny.random_tokens(config, 3)
  logits = apply(config, params, tokens)
  assert logits.shape == (3, config.n_positions, config.n_vocab)
  assert not np.any(logits)
  nll = np.asarray(token_nll(logits, jnp.asarray(tokens)))
  np.testing.assert_array_max_ulp(nll, np.full_like(nll, math.log(config.n_vocab)), maxulp=1)


def influence(config, tokens, keep=None):
  """[t, j]: how much the logits at t depend on pixel j's colour.

  All of an image's tokens differ, so that the gradient with respect to a row of the token table is
  the gradient with respect to one pixel. The output table is another one.
  """
  params = tiny.random_params(config)
  weights = np.random.default_rng(3).standard_normal(config.n_vocab).astype(np.float32)

  def read(wte):
    logits = bind(config, {**params, "wte": wte})(tokens[None], keep)
    return logits[0] @ weights

  rows_TxVxD = tiny.jit(jax.jacrev(read))(params["wte"])
  return np.abs(np.asarray(rows_TxVxD)).sum(-1)[:, tokens]


@pytest.mark.parametrize("remat", model_config.REMAT_POLICIES)
def test_causality_by_gradient(remat):
  """Pixel t's distribution depends on every pixel before it, and not at all on another."""
  config = tiny.make_config(n_vocab=16, remat=remat)
  tokens = np.random.default_rng(0).permutation(16).astype(np.int32)
  depends = influence(config, tokens)
  before = np.tri(16, k=-1, dtype=bool)
  assert np.all(depends[before] > 1e-6)
  assert np.all(depends[~before] == 0)


def test_start_vector_and_positions_are_seen_causally():
  params = tiny.random_params(CAUSAL)
  tokens = tiny.random_tokens(CAUSAL, 1)

  def read(sos, wpe):
    return bind(CAUSAL, {**params, "sos": sos, "wpe": wpe})(tokens)[0, :, 0]

  sos_TxD, wpe_TxTxD = tiny.jit(jax.jacrev(read, argnums=(0, 1)))(params["sos"], params["wpe"])
  assert np.all(np.abs(sos_TxD).sum(-1) > 1e-6)
  depends = np.abs(wpe_TxTxD).sum(-1)
  upto = np.tri(16, dtype=bool)
  assert np.all(depends[upto] > 1e-6)
  assert np.all(depends[~upto] == 0)


def test_bert_sees_both_sides_of_what_is_visible():
  """A visible pixel reaches every position, a masked one none, its own included."""
  config = tiny.make_config(n_vocab=16, causal=False)
  tokens = np.random.default_rng(0).permutation(16).astype(np.int32)
  keep = keep_mask(tokens[None])
  assert 2 < keep.sum() < 14
  depends = influence(config, tokens, keep)
  assert np.all(depends[:, keep[0]] > 1e-6)
  assert np.all(depends[:, ~keep[0]] == 0)
  assert np.all(influence(config, tokens) > 1e-6)  # no mask: all are visible


def test_a_causal_model_takes_no_mask():
  tokens = tiny.random_tokens(CAUSAL, 1)
  with pytest.raises(ValueError, match="no mask"):
    bind(CAUSAL, tiny.random_params(CAUSAL))(tokens, keep_mask(tokens))


def test_fewer_positions_are_the_first_ones():
  params, tokens = tiny.random_params(CAUSAL), tiny.random_tokens(CAUSAL, 2)
  whole = apply(CAUSAL, params, tokens)
  np.testing.assert_allclose(apply(CAUSAL, params, tokens[:, :5]), whole[:, :5], atol=1e-5)


@pytest.mark.parametrize("options", [{}, tiny.ALL_OPTIONS], ids=["original", "options"])
@pytest.mark.parametrize("causal", [True, False])
def test_scan_is_the_loop_over_layers(causal, options):
  config = tiny.make_config(n_layer=3, causal=causal, **options)
  params, tokens = tiny.random_params(config), tiny.random_tokens(config, 2)
  keep = None if config.causal else keep_mask(tokens)

  @tiny.jit
  def loop(params):
    model = bind(config, params)
    embedded = model.embed(tokens, keep)
    x = embedded.stream
    for layer in range(config.n_layer):
      block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)
      x, _ = block(block.enter(x, embedded), embedded)
    return model.logits(model.ln_f(x), tokens)

  logits = apply(config, params, tokens, keep)
  np.testing.assert_allclose(logits, loop(params), rtol=0, atol=2e-5)
  reverse = {**params, "blocks": jax.tree.map(lambda leaf: leaf[::-1], params["blocks"])}
  assert np.abs(logits - loop(reverse)).max() > 0.01  # the order of layers matters


def mean_nll(config, params, tokens, keep):
  return jnp.mean(token_nll(bind(config, params)(tokens, keep), tokens))


@pytest.mark.parametrize("causal", [True, False])
def test_recomputing_changes_nothing(causal):
  results = {}
  for remat in model_config.REMAT_POLICIES:
    config = tiny.make_config(causal=causal, remat=remat)
    tokens = tiny.random_tokens(config, 3)
    keep = None if causal else keep_mask(tokens)
    run = tiny.jit(jax.value_and_grad(functools.partial(mean_nll, config)))
    loss, grads = run(tiny.random_params(config), jnp.asarray(tokens), keep)
    results[remat] = loss, tiny.leaf_names(grads)
  loss, grads = results["none"]
  for remat in ("names", "offload", "full"):
    loss_again, grads_again = results[remat]
    np.testing.assert_allclose(loss, loss_again, rtol=1e-6)
    for name, grad in grads.items():
      largest = np.abs(grad).max()
      assert largest > 1e-5, name
      np.testing.assert_allclose(grad, grads_again[name], rtol=0, atol=1e-5 * largest, err_msg=name)


def test_recomputing_saves_memory():
  """What the backward pass is handed shrinks from "none" to "names" to "full"."""
  held = {}
  for policy in model_config.REMAT_POLICIES:
    config = tiny.make_config(n_layer=4, n_positions=32, remat=policy)
    tokens = jnp.asarray(tiny.random_tokens(config, 8))

    def backward(params, config=config, tokens=tokens):
      return jax.vjp(lambda params: mean_nll(config, params, tokens, None), params)[1]

    residuals = jax.tree.leaves(jax.eval_shape(backward, image_gpt.abstract_params(config)))
    per_block = [leaf for leaf in residuals if leaf.shape[:1] == (4,) and 32 in leaf.shape]
    held[policy] = sum(leaf.size for leaf in per_block) / (4 * 8 * 32)  # per layer and pixel
  width = 16
  assert held["full"] == width  # a block's input, nothing else
  assert held["full"] < held["names"] <= (1 + 3 + 1 + 4) * width + 1  # input, qkv, heads, MLP
  assert held["names"] < held["none"]
  assert held["offload"] == held["names"]  # the same, elsewhere


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_close_to_float32(causal):
  full, half = (tiny.make_config(causal=causal, dtype=dtype) for dtype in ("float32", "bfloat16"))
  params, tokens = tiny.random_params(full), tiny.random_tokens(full, 4)
  expected, logits = apply(full, params, tokens), apply(half, params, tokens)
  assert logits.dtype == jnp.float32
  error = np.abs(logits - expected).max() / np.std(expected)
  assert 1e-5 < error < 0.1  # 8 bits of mantissa were used, and no more than them lost


@pytest.mark.parametrize("causal", [True, False])
def test_features_are_pooled_norms_of_what_enters_each_block(causal):
  config = tiny.make_config(n_layer=3, causal=causal)
  params, tokens = tiny.random_params(config), tiny.random_tokens(config, 4)

  @tiny.jit
  def entering(params):
    model = bind(config, params)
    embedded, states = model.embed(tokens), []
    x = embedded.stream
    for layer in range(config.n_layer):
      states.append(x)
      x, _ = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)(x, embedded)
    return jnp.stack([*states, x])

  def norm(x, g):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * g

  gains = [*params["blocks"]["ln_1"]["g"], params["ln_f"]["g"]]
  states = np.asarray(entering(params), np.float64)
  expected = np.stack([norm(x, g).mean(1) for x, g in zip(states, gains, strict=True)])
  features = tiny.jit(lambda params: bind(config, params).features(tokens))(params)
  assert features.shape == (4, 4, 16) and features.dtype == jnp.float32
  np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
  half = tiny.make_config(n_layer=3, causal=causal, dtype="bfloat16")
  assert jax.eval_shape(lambda: bind(half, params).features(tokens)).dtype == jnp.float32


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(n_embd=18, n_head=4), r"model.n_embd: 18 .*n_head: 4.*3, 6"),
    (dict(n_layer=0), "model.n_layer: 0"),
    (dict(dtype="float16"), "model.dtype: 'float16'.*'bfloat16'"),
    (dict(remat="some"), "model.remat: 'some'.*none, names, offload, full"),
  ],
)
def test_impossible_models_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    tiny.make_config(**changes)
