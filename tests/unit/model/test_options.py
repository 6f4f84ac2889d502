"""Options of the model that the paper's hasn't: what each means, on every path that computes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.model import options as options_lib
from igpt_jax.model.decoding import autoregressive
from igpt_jax.model.image_gpt import abstract_params, bind, init_params
from igpt_jax.parallel import sharding
from igpt_jax.pretrained import formats
from igpt_jax.training.objectives import token_nll
from igpt_jax.training.state import param_shardings
from support import tiny

ALONE = [
  {"positions": "axial"},
  {"positions": "rope2d"},
  {"qk_norm": True},
  {"value_embeddings": True},
  {"x0_skip": True},
  tiny.ALL_OPTIONS,
]
NAMES = ["axial", "rope2d", "qk_norm", "value_embeddings", "x0_skip", "all"]
each_option = pytest.mark.parametrize("options", ALONE, ids=NAMES)


def logits_of(config, params, tokens, keep=None):
  return tiny.jit(lambda p: bind(config, p)(tokens, keep))(params)


@each_option
def test_every_option_is_seen_and_only_by_what_comes_after(options):
  config = tiny.make_config(**options)
  params, tokens = tiny.random_params(config), tiny.random_tokens(config, 2)
  assert config.options == options and not tiny.make_config().options
  changed = tokens.copy()
  changed[:, 6] = (changed[:, 6] + 1) % config.n_vocab
  before, after = (logits_of(config, params, t) for t in (tokens, changed))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert np.abs(before - after)[:, 7:].max(axis=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("name", ["value_embeddings", "x0_skip"])
def test_what_begins_at_zero_is_the_original_at_first_and_then_learns(name):
  original = tiny.make_config()
  config = dataclasses.replace(original, **{name: True})
  key, tokens = jax.random.key(3), tiny.random_tokens(original, 4)
  params = init_params(config, key)
  # The output table is zero at first, and nothing would be compared.
  head = {"wtet": tiny.random_params(original)["wtet"]}
  ours, theirs = {**params, **head}, {**init_params(original, key), **head}
  np.testing.assert_array_equal(
    logits_of(config, ours, tokens), logits_of(original, theirs, tokens)
  )

  def loss(p):
    return jnp.mean(token_nll(bind(config, p)(tokens), tokens))

  grads = tiny.leaf_names(tiny.jit(jax.grad(loss))(ours)["blocks"])
  leaf = {"value_embeddings": "attn/value_embed", "x0_skip": "x0/g"}[name]
  assert np.abs(grads[leaf]).max() > 1e-6


def test_a_masked_token_is_seen_by_no_option():
  config = tiny.make_config(causal=False, **tiny.ALL_OPTIONS)
  params, tokens = tiny.random_params(config), tiny.random_tokens(config, 2)
  keep = np.ones(tokens.shape, bool)
  keep[:, 5] = False
  other = tokens.copy()
  other[:, 5] = (other[:, 5] + 3) % config.n_vocab
  masked = logits_of(config, params, tokens, keep)
  np.testing.assert_array_equal(masked, logits_of(config, params, other, keep))
  assert np.abs(masked - logits_of(config, params, tokens)).max() > 1e-3


def test_rotated_scores_depend_on_the_offset_in_rows_and_columns_alone():
  side, head_dim = 6, 8
  rotation = options_lib.rotation_by_pixel(side**2, head_dim)
  q, k = np.random.default_rng(0).standard_normal((2, head_dim)).astype(np.float32)
  everywhere = np.broadcast_to(np.stack([q, k, k])[:, None, None, None], (3, 1, side**2, 1, 8))
  q, k, v = np.asarray(options_lib.rotate(jnp.asarray(everywhere), rotation))[:, 0, :, 0]
  np.testing.assert_array_equal(v, everywhere[2, 0, :, 0])
  scores = (q @ k.T).reshape(side, side, side, side)
  by_offset: dict = {}
  for (row, column, row_, column_), score in np.ndenumerate(scores):
    by_offset.setdefault((row - row_, column - column_), []).append(score)
  assert max(np.ptp(same) for same in by_offset.values()) < 1e-5
  # Row and column aren't mistaken for each other, nor a step for one back.
  means = {offset: np.mean(same) for offset, same in by_offset.items()}
  assert len({round(float(means[at]), 3) for at in [(0, 1), (1, 0), (0, -1), (-1, 0), (0, 0)]}) == 5
  # The plane of the highest frequency turns by a radian a pixel.
  assert rotation.cos[0, side, 0] == pytest.approx(np.cos(1.0))
  assert rotation.cos[0, 1, 0] == 1.0 and rotation.cos[0, 1, 4] == pytest.approx(np.cos(1.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tpus_rotation_is_the_same(dtype):
  rotation = options_lib.rotation_by_pixel(16, 24)
  qkv = jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 24), dtype)
  flat = options_lib._rotate_by_product(rotation, qkv.reshape(3, 2, 16, 96))
  expected = options_lib.rotate(qkv, rotation).reshape(flat.shape)
  # XLA may add the two products in one rounding.
  np.testing.assert_allclose(
    np.float32(flat), np.float32(expected), atol=1e-6 if dtype == "float32" else 2e-2
  )


def test_rotated_positions_take_images_of_another_size():
  small = tiny.make_config(positions="rope2d")
  large = dataclasses.replace(small, n_positions=64)
  assert tiny.leaf_names(abstract_params(small)) == tiny.leaf_names(abstract_params(large))
  params = tiny.random_params(small)
  tokens = tiny.random_tokens(large, 2)
  # The first row is seen before any other, in either size.
  np.testing.assert_allclose(
    logits_of(large, params, tokens[:, :4]), logits_of(small, params, tokens[:, :4]), atol=1e-5
  )
  assert logits_of(large, params, tokens).shape == (2, 64, small.n_vocab)


def test_axial_positions_are_the_sum_of_the_rows_and_the_columns():
  config = tiny.make_config(positions="axial")
  params = tiny.random_params(config)
  table = bind(config, params).position_table()
  for row, column in [(0, 0), (1, 3), (3, 1)]:
    expected = params["wpe_row"][row] + params["wpe_column"][column]
    np.testing.assert_array_equal(table[4 * row + column], expected)


def test_normed_queries_and_keys_have_no_length():
  config = tiny.make_config(qk_norm=True)
  params, tokens = tiny.random_params(config), tiny.random_tokens(config, 2)
  longer = jax.tree.map(lambda leaf: leaf, params)
  longer["blocks"]["attn"]["qkv"] = longer["blocks"]["attn"]["qkv"] * np.float32([9, 7, 1]).reshape(
    3, 1, 1
  )
  np.testing.assert_allclose(
    logits_of(config, params, tokens), logits_of(config, longer, tokens), atol=2e-3
  )
  qkv = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
  gain = jnp.arange(1.0, 9.0)
  q, k, v = options_lib.norm_queries_and_keys(qkv, (gain, 2 * gain))
  np.testing.assert_allclose(np.mean(np.square(q / gain), -1), 1, rtol=1e-3)
  np.testing.assert_allclose(np.mean(np.square(k / gain), -1), 4, rtol=1e-3)
  np.testing.assert_array_equal(v, qkv[2])


@pytest.mark.parametrize("rows", [False, True], ids=["cpu", "accelerator"])
@each_option
def test_cached_decoding_is_the_full_forward_pass(options, rows, monkeypatch):
  monkeypatch.setattr("igpt_jax.model.decoding.cache.keeps_rows", lambda: rows)
  monkeypatch.setattr("igpt_jax.model.decoding.decode_step.keeps_rows", lambda: rows)
  config = tiny.make_config(**options)
  params, prompt = tiny.random_params(config), tiny.random_tokens(config, 2)[:, :5]
  keys = jax.random.split(jax.random.key(2), 4)

  @tiny.jit
  def draw(params):
    return autoregressive.complete(
      config, params, prompt, keys, sampling=autoregressive.SamplingConfig(), samples_per_image=2
    )

  drawn = draw(params)
  nll = token_nll(logits_of(config, params, drawn.tokens), drawn.tokens)
  np.testing.assert_allclose(drawn.nll[:, 5:], nll[:, 5:], atol=2e-5)
  assert np.abs(drawn.nll[:, 5:]).min() > 0

  unconditional = tiny.jit(
    lambda p: autoregressive.complete(
      config, p, prompt[:, :0], keys[:2], sampling=autoregressive.SamplingConfig()
    )
  )(params)
  nll = token_nll(logits_of(config, params, unconditional.tokens), unconditional.tokens)
  np.testing.assert_allclose(unconditional.nll, nll, atol=2e-5)


def gradients(config, mesh, causal=True):
  params, tokens = tiny.random_params(config), tiny.random_tokens(config, 8)
  keep = None if causal else np.arange(config.n_positions) % 3 > 0

  def loss(p, tokens):
    visible = None if keep is None else jnp.broadcast_to(keep, tokens.shape)
    return jnp.mean(token_nll(bind(config, p)(tokens, visible), tokens))

  with jax.set_mesh(mesh):
    placed = jax.device_put(params, param_shardings(config, mesh))
    value, grads = tiny.jit(jax.value_and_grad(loss))(placed, sharding.put_global(tokens, mesh))
  return value, tiny.leaf_names(grads)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bert"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_a_mesh_has_the_gradients_of_one_device(shape, causal):
  for positions in ("rope2d", "axial"):
    options = {**tiny.ALL_OPTIONS, "positions": positions}
    config = tiny.make_config(causal=causal, **options)
    value, grads = gradients(config, tiny.mesh_of(shape), causal)
    expected, theirs = gradients(config, tiny.mesh_of(), causal)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name, leaf in grads.items():
      np.testing.assert_allclose(leaf, theirs[name], atol=2e-6, err_msg=name)


def test_recomputing_changes_nothing():
  config = tiny.make_config(**tiny.ALL_OPTIONS)
  _, expected = gradients(config, tiny.mesh_of())
  for remat in ("names", "full"):
    _, grads = gradients(dataclasses.replace(config, remat=remat), tiny.mesh_of())
    for name, leaf in grads.items():
      np.testing.assert_allclose(leaf, expected[name], atol=1e-6, err_msg=f"{remat} {name}")


@pytest.mark.parametrize("stacked", [False, True], ids=["scanned", "stack"])
def test_bfloat16_gradients_are_near(stacked):
  """Sums over positions and layers are float32: of tables, gains, and skips of the embeddings."""
  shape = {"n_head": 2, "n_embd": 64, "n_layer": 12, "n_positions": 64}
  config = tiny.make_config(**shape, **tiny.ALL_OPTIONS)
  half = dataclasses.replace(config, dtype="bfloat16")
  if stacked:
    half = dataclasses.replace(half, attention="tpu_interpret", remat="names")
  _, expected = gradients(config, tiny.mesh_of())
  _, grads = gradients(half, tiny.mesh_of())
  for name, leaf in grads.items():
    assert leaf.dtype == jnp.float32, name
    error = np.linalg.norm(leaf - expected[name]) / np.linalg.norm(expected[name])
    assert error < 0.06, (name, error)


def test_skips_sum_the_embeddings_gradient_in_float32():
  config = tiny.make_config(x0_skip=True, dtype="bfloat16", n_layer=5)
  tokens = tiny.random_tokens(config, 2)

  def loss(params):
    return jnp.sum(bind(config, params)(tokens))

  program = jax.make_jaxpr(jax.grad(loss))(tiny.random_params(config))
  (back,) = [e for e in program.eqns if e.primitive.name == "scan" and e.params["reverse"]]
  # What is stacked over layers has an axis more.
  shape = (2, config.n_positions, config.n_embd)
  sums = {str(out.aval.dtype) for out in back.outvars if out.aval.shape == shape}
  assert sums == {"bfloat16", "float32"}  # of the stream from block to block, and of the embeddings


def test_features_are_of_what_enters_each_block():
  config = tiny.make_config(**tiny.ALL_OPTIONS)
  params, tokens = tiny.random_params(config), tiny.random_tokens(config, 2)
  model = bind(config, params)
  first = tiny.jit(lambda p: bind(config, p).features(tokens))(params)[0]
  embedded = model.embed(tokens)
  block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
  normed = block.ln_1(block.enter(embedded.stream, embedded))
  np.testing.assert_allclose(first, normed.mean(1), atol=1e-5)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"positions": "polar"}, "model.positions: 'polar'; expected one of learned, axial, rope2d"),
    ({"positions": "rope2d", "n_head": 8}, r"rope2d takes heads of 4 channels, 8, 12, …, not .* 2"),
    ({"positions": "axial", "n_positions": 18}, "axial is for square images, not 18 positions"),
  ],
)
def test_impossible_options_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    tiny.make_config(**options)


@each_option
@pytest.mark.parametrize("format", ["openai", "huggingface"])
def test_formats_of_others_refuse_what_they_cannot_compute(options, format, tmp_path):
  config = tiny.make_config(**options)
  with pytest.raises(
    UserError, match=f"format: {format}, but the model was made with model.{next(iter(options))}="
  ):
    formats.save(tmp_path / "saved", format, config, tiny.random_params(config))
  assert not list(tmp_path.iterdir())
