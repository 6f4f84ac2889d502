"""Cached sampling: equal to the full forward pass, and drawn from the distribution it claims."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from igpt_jax.errors import UserError
from igpt_jax.model.decoding import autoregressive, cache, decode_step
from igpt_jax.model.decoding.autoregressive import SamplingConfig, filter_logits
from igpt_jax.model.image_gpt import bind, to_compute_dtypes
from igpt_jax.parallel import sharding
from igpt_jax.training.objectives import token_nll
from igpt_jax.training.state import param_shardings
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = tiny.make_config()
PLAIN = SamplingConfig()


@functools.cache
def compiled(config, sampling, samples_per_image=1):
  return tiny.jit(
    functools.partial(
      autoregressive.complete, config, sampling=sampling, samples_per_image=samples_per_image
    )
  )


def complete(given, keys, *, config=CONFIG, sampling=PLAIN, samples_per_image=1):
  run = compiled(config, sampling, samples_per_image)
  samples = run(tiny.random_params(config), prompt_BxP=given, keys_B=keys)
  return jax.tree.map(np.asarray, samples)


@functools.partial(tiny.jit, static_argnums=0)
def full_forward(config, params, tokens):
  return bind(config, params)(tokens)


def make_keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize("n_given", [0, 5, 15])
@pytest.mark.parametrize("n_done", [0, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_cached_logits_are_those_of_the_full_forward(n_given, n_done, n):
  """Every position's, the true pixels fed: after no pixel, some, and all but one."""
  room = CONFIG.n_positions - n_given
  n_done = min(n_done, room - 1)
  tokens = jnp.asarray(tiny.random_tokens(CONFIG, n))

  @tiny.jit
  def decode(params, tokens):
    begun = autoregressive.begin(CONFIG, params, tokens[:, :n_given], make_keys(n))
    tables, weights = decode_step.lay_out(bind(CONFIG, params))

    def body(before, blocks, position):
      blocks, final = decode_step.decode_step(
        tables, weights, before, blocks, tokens[:, position - 1], position, CONFIG
      )
      return blocks, decode_step.code_logits(tables, CONFIG, final, [])

    given, drawn = zip(*begun.caches, strict=True)
    found = []
    before = [(kv, cache.take(new, 0, 0)) for kv, new in begun.caches]
    for start, end in ((0, n_done), (n_done, room)) if n_done else ((0, room),):
      blocks = [cache.take(kv, start, end) for kv in drawn]
      positions = jnp.arange(n_given + start, n_given + end)
      blocks, logits = jax.lax.scan(functools.partial(body, before), blocks, positions)
      before = list(zip(given, blocks, strict=True))
      found.append(logits)
    return jnp.concatenate(found).swapaxes(0, 1)

  params = tiny.random_params(CONFIG)
  expected = full_forward(CONFIG, params, tokens)[:, n_given:]
  np.testing.assert_allclose(decode(params, tokens), expected, rtol=0, atol=1e-4)
  assert np.std(expected) > 0.5  # there is something to be wrong about


@pytest.mark.parametrize("block", [4, 7])
@pytest.mark.parametrize("per_image", [1, 2])
def test_blocks_of_any_length_make_the_same_samples(block, per_image, monkeypatch):
  """So short that every sample needs several; with its position known when traced, and not."""
  given, keys = tiny.random_tokens(CONFIG, 2)[:, :4], make_keys(2 * per_image)
  params = tiny.random_params(CONFIG)
  whole = complete(given, keys, samples_per_image=per_image)
  settings = dict(samples_per_image=per_image)
  monkeypatch.setattr(autoregressive, "_BLOCK", block)
  run = tiny.jit(functools.partial(autoregressive.complete, CONFIG, sampling=PLAIN, **settings))
  np.testing.assert_array_equal(run(params, given, keys).tokens, whole.tokens)
  begun = tiny.jit(functools.partial(autoregressive.begin, CONFIG, **settings))(params, given, keys)
  draw_chunk = tiny.jit(
    functools.partial(autoregressive.extend, CONFIG, n_tokens=5, sampling=PLAIN)
  )
  for _ in range(3):
    begun = draw_chunk(params, begun)
  np.testing.assert_array_equal(begun.tokens, whole.tokens)
  np.testing.assert_allclose(begun.nll, whole.nll, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 5, 16])
def test_chunks_of_any_size_make_the_same_samples(chunk):
  """One program draws each chunk, wherever it starts; the last may be shorter."""
  given, keys = tiny.random_tokens(CONFIG, 3)[:, :4], make_keys(3)
  params = tiny.random_params(CONFIG)
  begun = tiny.jit(functools.partial(autoregressive.begin, CONFIG))(params, given, keys)
  draw_chunk = tiny.jit(
    functools.partial(autoregressive.extend, CONFIG, n_tokens=chunk, sampling=PLAIN)
  )
  whole = complete(given, keys)
  drawn = begun
  while drawn.position < CONFIG.n_positions:
    before = int(drawn.position)
    drawn = draw_chunk(params, drawn)
    assert drawn.position == min(before + chunk, CONFIG.n_positions)
    np.testing.assert_array_equal(
      drawn.tokens[:, : drawn.position], whole.tokens[:, : drawn.position]
    )
    assert not np.any(drawn.tokens[:, drawn.position :])
  np.testing.assert_allclose(drawn.nll, whole.nll, rtol=0, atol=1e-5)
  assert draw_chunk._cache_size() == 1


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("per_image", [1, 2])
def test_one_program_serves_any_number_of_given_pixels(per_image, dtype, monkeypatch):
  """What is hidden changes nothing, though whole images are handed over."""
  monkeypatch.setattr(autoregressive, "_BLOCK", 6)
  options = dict(samples_per_image=per_image, cache_dtype=dtype)
  tokens, keys = tiny.random_tokens(CONFIG, 2), make_keys(2 * per_image)
  params = tiny.random_params(CONFIG)
  read = tiny.jit(functools.partial(autoregressive.begin, CONFIG, **options))
  draw = tiny.jit(functools.partial(autoregressive.extend, CONFIG, n_tokens=16, sampling=PLAIN))
  run = functools.partial(autoregressive.complete, CONFIG, sampling=PLAIN, **options)
  for n_given in (0, 1, 6, 9, 15):
    hidden = np.where(np.arange(16) < n_given, tokens, (tokens + 3) % CONFIG.n_vocab)
    found = draw(params, read(params, hidden, keys, n_given=np.int32(n_given)))
    expected = tiny.jit(run)(params, tokens[:, :n_given], keys)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=0, atol=1e-5)
  assert read._cache_size() == draw._cache_size() == 1


@pytest.mark.parametrize("n_given", [0, 7])
def test_nll_is_that_of_the_full_forward(n_given):
  given = tiny.random_tokens(CONFIG, 4)[:, :n_given]
  # Whatever distribution is drawn from, nll is the model's own.
  sampling = SamplingConfig(temperature=0.7, top_k=9)
  samples = complete(given, make_keys(4), sampling=sampling)
  assert samples.tokens.shape == samples.nll.shape == (4, CONFIG.n_positions)
  assert samples.tokens.dtype == np.int32 and samples.nll.dtype == np.float32
  assert samples.tokens.min() >= 0 and samples.tokens.max() < CONFIG.n_vocab
  np.testing.assert_array_equal(samples.tokens[:, :n_given], given)
  logits = full_forward(CONFIG, tiny.random_params(CONFIG), samples.tokens)
  expected = token_nll(logits, samples.tokens)
  np.testing.assert_allclose(samples.nll[:, n_given:], expected[:, n_given:], rtol=0, atol=1e-4)
  assert not np.any(samples.nll[:, :n_given])


def test_a_sample_does_not_depend_on_its_batch():
  given = tiny.random_tokens(CONFIG, 4)[:, :6]
  keys = make_keys(4)
  together = complete(given, keys)
  turned = complete(given[::-1], keys[::-1])
  np.testing.assert_array_equal(turned.tokens, together.tokens[::-1])
  alone = complete(given[2:3], keys[2:3])
  np.testing.assert_array_equal(alone.tokens, together.tokens[2:3])
  other_keys = complete(given, make_keys(4, seed=1))
  assert np.all(np.any(other_keys.tokens != together.tokens, axis=1))


def test_unconditional_samples_differ_by_their_keys_alone():
  keys = make_keys(5).at[3].set(make_keys(5)[1])
  tokens = complete(np.zeros((5, 0), np.int32), keys).tokens
  np.testing.assert_array_equal(tokens[3], tokens[1])
  assert len({tuple(row) for row in tokens}) == 4
  # One key gives a fresh number at each position.
  assert np.all([len(set(row)) > 3 for row in tokens])


def test_samples_per_image_are_repeated_prompts():
  given = tiny.random_tokens(CONFIG, 2)[:, :6]
  keys = make_keys(6)
  shared = complete(given, keys, samples_per_image=3)
  repeated = complete(np.repeat(given, 3, axis=0), keys)
  np.testing.assert_array_equal(shared.tokens, repeated.tokens)
  np.testing.assert_allclose(shared.nll, repeated.nll, rtol=0, atol=1e-5)
  assert len({tuple(row) for row in shared.tokens[:3]}) == 3


def test_all_but_one_and_all_pixels_given():
  tokens = tiny.random_tokens(CONFIG, 3)
  samples = complete(tokens[:, :-1], make_keys(3))
  np.testing.assert_array_equal(samples.tokens[:, :-1], tokens[:, :-1])
  assert np.all(samples.nll[:, -1] > 0) and not np.any(samples.nll[:, :-1])
  whole = complete(tokens, make_keys(3))
  np.testing.assert_array_equal(whole.tokens, tokens)
  assert not np.any(whole.nll)
  with pytest.raises(ValueError, match="17 tokens given to a model of 16"):
    complete(np.zeros((1, 17), np.int32), make_keys(1))


def test_greedy_takes_the_likeliest_everywhere():
  greedy = SamplingConfig(temperature=0.0)
  given = tiny.random_tokens(CONFIG, 4)[:, :3]
  tokens = complete(given, make_keys(4), sampling=greedy).tokens
  logits = full_forward(CONFIG, tiny.random_params(CONFIG), tokens)
  np.testing.assert_array_equal(tokens[:, 3:], np.argmax(logits, axis=-1)[:, 3:])
  again = complete(given, make_keys(4, seed=1), sampling=greedy).tokens
  np.testing.assert_array_equal(again, tokens)
  assert np.any(complete(given, make_keys(4)).tokens != tokens)


def test_parameters_may_be_kept_as_they_are_multiplied():
  config = tiny.make_config(dtype="bfloat16")
  given, keys = tiny.random_tokens(config, 3)[:, :5], make_keys(3)
  run = tiny.jit(functools.partial(autoregressive.complete, config, sampling=PLAIN))
  expected = run(tiny.random_params(config), given, keys)
  params = jax.device_put(tiny.random_params(config))
  gains, weight = params["blocks"]["ln_1"]["g"], params["wte"]
  converted = to_compute_dtypes(config, params)
  assert converted["blocks"]["ln_1"]["g"] is gains and weight.is_deleted()
  assert converted["wte"].dtype == "bfloat16"
  found = run(converted, given, keys)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_array_equal(found.nll, expected.nll)


@pytest.mark.parametrize("shape", tiny.MESHES)
def test_samples_on_a_mesh_are_those_of_one_device(shape):
  """Whole, and in chunks; an image's samples together."""
  mesh = tiny.mesh_of(shape)
  config = tiny.make_config(n_head=4)
  given, keys = tiny.random_tokens(config, 8)[:, :5], make_keys(16)
  params = tiny.random_params(config)
  expected = complete(given, keys, config=config, samples_per_image=2)
  placed = jax.device_put(params, param_shardings(config, mesh))
  settings = dict(samples_per_image=2)
  with jax.set_mesh(mesh):
    given = sharding.put_global(given, mesh)
    run = tiny.jit(functools.partial(autoregressive.complete, config, sampling=PLAIN, **settings))
    np.testing.assert_array_equal(run(placed, given, keys).tokens, expected.tokens)
    drawn = tiny.jit(functools.partial(autoregressive.begin, config, **settings))(
      placed, given, keys
    )
    draw_chunk = tiny.jit(
      functools.partial(autoregressive.extend, config, n_tokens=6, sampling=PLAIN)
    )
    for _ in range(2):
      drawn = draw_chunk(placed, drawn)
  np.testing.assert_array_equal(drawn.tokens, expected.tokens)


def loop_bodies(text):
  """The text of every computation that a while loop of a compiled program calls, and theirs."""
  computations, name = {}, None
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")):
      name = re.match(r"(?:ENTRY )?%([\w.\-]+)", line)[1]
      computations[name] = ""
    elif name:
      computations[name] += line + "\n"
  wanted = re.findall(r"body=%([\w.\-]+)", text)
  found = {}
  while wanted:
    name = wanted.pop()
    if name not in found:
      found[name] = computations[name]
      wanted += re.findall(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)", found[name])
  return found


@pytest.mark.parametrize("per_image", [1, 2])
def test_rows_of_other_devices_heads_are_left_alone(per_image, monkeypatch):
  """The same samples, and no device sends another one what it made of its heads' keys."""
  for room in (cache, decode_step):
    monkeypatch.setattr(room, "keeps_rows", lambda: True)
  mesh = tiny.mesh_of((1, 2, 4))
  config = tiny.make_config(n_head=4, n_positions=60)
  given, keys = tiny.random_tokens(config, 4)[:, :7], make_keys(4 * per_image)
  params = tiny.random_params(config)
  expected = complete(given, keys, config=config, samples_per_image=per_image)
  placed = jax.device_put(params, param_shardings(config, mesh))
  with jax.set_mesh(mesh):
    given = sharding.put_global(given, mesh)
    run = jax.jit(
      functools.partial(
        autoregressive.complete, config, sampling=PLAIN, samples_per_image=per_image
      )
    )
    compiled = run.lower(placed, given, keys).compile()
    np.testing.assert_array_equal(compiled(placed, given, keys).tokens, expected.tokens)
  sent = [
    line
    for body in loop_bodies(compiled.as_text()).values()
    for line in body.splitlines()
    if re.search(r" (all-reduce|all-gather|all-to-all|collective-permute)", line)
  ]
  assert sent  # the sums over heads, at least
  for line in sent:
    for shape in re.findall(r"\[([\d,]+)\]", line.split("channel_id")[0]):
      *others, length = shape.split(",")
      assert length not in ("7", "53", "60") and "53" not in others, line


def test_weights_are_gathered_before_the_loop():
  """Fully sharded: no pixel waits for a weight. What the prefill gathers is another matter."""
  mesh = tiny.mesh_of((1, 8, 1))
  params = jax.device_put(tiny.random_params(CONFIG), param_shardings(CONFIG, mesh))
  with jax.set_mesh(mesh):
    given = sharding.put_global(np.zeros((8, 0), np.int32), mesh)
    run = jax.jit(functools.partial(autoregressive.complete, CONFIG, sampling=PLAIN))
    text = run.lower(params, given, make_keys(8)).compile().as_text()
  bodies = loop_bodies(text)
  assert any("dot" in body for body in bodies.values())  # the layers are in there
  assert "all-gather" in text
  for body in bodies.values():
    for line in body.splitlines():
      # The tokens drawn, a number per image, may be.
      shape = re.search(r"= \w+\[([\d,]*)\]\S* all-gather", line)
      assert not shape or int(np.prod([int(n) for n in shape[1].split(",") if n])) <= 64, line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("per_image", [1, 3])
def test_cache_dtypes(dtype, per_image):
  """float32 changes nothing; how much of the likelihood the others move is bounded."""
  config = tiny.make_config(n_embd=32, n_positions=64)
  params = tiny.random_params(config)
  given, keys = tiny.random_tokens(config, 16)[:, :32], make_keys(16 * per_image)
  settings = dict(sampling=PLAIN, samples_per_image=per_image)
  run = tiny.jit(functools.partial(autoregressive.complete, config, cache_dtype=dtype, **settings))
  samples = jax.tree.map(np.asarray, run(params, given, keys))
  logits = full_forward(config, params, samples.tokens)
  true = np.asarray(token_nll(logits, samples.tokens))[:, 32:]
  off = np.abs(samples.nll[:, 32:] - true).max()
  if dtype == "float32":
    assert off < 1e-4
  else:
    assert 1e-4 < off  # it is another cache
    assert abs(samples.nll[:, 32:].mean() / true.mean() - 1) < 0.005
    plain = complete(given, keys, config=config, samples_per_image=per_image)
    assert abs(true.mean() / plain.nll[:, 32:].mean() - 1) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("per_image", [1, 3])
def test_rows_as_accelerators_keep_them_are_the_same(dtype, per_image, monkeypatch):
  given, keys = tiny.random_tokens(CONFIG, 2)[:, :6], make_keys(2 * per_image)
  settings = dict(sampling=PLAIN, samples_per_image=per_image, cache_dtype=dtype)

  def run():
    return tiny.jit(functools.partial(autoregressive.complete, CONFIG, **settings))(
      tiny.random_params(CONFIG), given, keys
    )

  expected = run()
  for room in (cache, decode_step):
    monkeypatch.setattr(room, "keeps_rows", lambda: True)
  monkeypatch.setattr(autoregressive, "_BLOCK", 4)
  found = run()
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_allclose(found.nll, expected.nll, rtol=0, atol=1e-4)


def test_an_unknown_cache_dtype_is_refused():
  with pytest.raises(
    UserError, match="cache_dtype: 'int4'; expected one of float32, bfloat16, int8"
  ):
    autoregressive.begin(
      CONFIG,
      tiny.random_params(CONFIG),
      np.zeros((1, 0), np.int32),
      make_keys(1),
      cache_dtype="int4",
    )


def filtered_reference(logits, sampling):
  """Probabilities of one row, float64: temperature, then top-k, then top-p."""
  logits = np.asarray(logits, np.float64) / sampling.temperature
  order = np.argsort(-logits)
  kept = order[: sampling.top_k] if sampling.top_k else order
  p = np.exp(logits[kept] - logits.max())
  p /= p.sum()
  if sampling.top_p < 1:
    n = 1
    while p[:n].sum() < sampling.top_p:
      n += 1
    kept, p = kept[:n], p[:n] / p[:n].sum()
  full = np.zeros(len(logits))
  full[kept] = p
  return full


SAMPLINGS = {
  "plain": PLAIN,
  "temperature": SamplingConfig(temperature=0.6),
  "top-k": SamplingConfig(top_k=2),
  "top-p": SamplingConfig(top_p=0.75),
  "all": SamplingConfig(temperature=1.3, top_k=2, top_p=0.9),
}


@pytest.mark.parametrize(
  "sampling",
  [
    *SAMPLINGS.values(),
    SamplingConfig(top_k=1),
    SamplingConfig(top_k=1_000),
    SamplingConfig(top_p=1e-6),
    SamplingConfig(temperature=2.5, top_k=7, top_p=0.5),
  ],
  ids=str,
)
def test_filters_against_numpy(sampling):
  logits = 2 * np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)
  filtered = filter_logits(jnp.asarray(logits), sampling.values())
  probabilities = np.asarray(jax.nn.softmax(filtered, axis=-1))
  expected = np.stack([filtered_reference(row, sampling) for row in logits])
  np.testing.assert_array_equal(probabilities == 0, expected == 0)
  np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6)


def test_ties_at_the_edge_of_top_k_are_all_kept():
  logits = jnp.asarray([[1.0, 3.0, 1.0, 0.0]])
  kept = filter_logits(logits, SamplingConfig(top_k=2).values()) > -jnp.inf
  np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_one_program_serves_every_way_of_drawing():
  """Also one that keeps all colours, of the program that could truncate; the logits are the same bits."""
  logits = 2 * np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)
  keys, turn = make_keys(64), jnp.int32(3)
  serve = tiny.jit(autoregressive.draw)
  ways = [
    *SAMPLINGS.values(),
    SamplingConfig(0.0),
    SamplingConfig(top_k=1_000),
    SamplingConfig(0.3),
  ]
  drawn = []
  for way in ways:
    found = serve(logits, keys, turn, way.values(truncates=True))
    np.testing.assert_array_equal(found, autoregressive.draw(logits, keys, turn, way))
    drawn.append(tuple(found.tolist()))
  assert serve._cache_size() == 1 and len(set(drawn)) == len(ways) - 1  # all but top-k of 1,000
  whole = filter_logits(logits, PLAIN.values(truncates=True))
  np.testing.assert_array_equal(whole, logits)
  assert PLAIN.values().truncation is None  # nothing is sorted where nothing is truncated


def test_a_draw_is_that_of_jax_random_categorical():
  logits = 2 * np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)
  keys = make_keys(64)
  expected = [
    jax.random.categorical(jax.random.fold_in(key, 3), row)
    for key, row in zip(keys, logits, strict=True)
  ]
  np.testing.assert_array_equal(autoregressive.draw(logits, keys, jnp.int32(3), PLAIN), expected)


ENUMERABLE = tiny.make_config(n_layer=1, n_vocab=4, n_positions=4)
PICTURES = np.array(list(itertools.product(range(4), repeat=4)), np.int32)  # all 256 there are
DRAWS = 100_000


def enumerable_params():
  """Flat enough for truncation to leave choices."""
  params = tiny.random_params(ENUMERABLE, seed=2)
  return {**params, "wtet": 0.4 * params["wtet"]}


def distribution(sampling, n_given=0):
  """The probability of each of the 256 images, from the full forward pass."""
  params = enumerable_params()
  logits = np.asarray(full_forward(ENUMERABLE, params, PICTURES))
  probability = np.ones(len(PICTURES))
  for picture, row in enumerate(PICTURES):
    for t in range(n_given, 4):
      probability[picture] *= filtered_reference(logits[picture, t], sampling)[row[t]]
  return probability


def p_value(counts, probability):
  """Chi-square; what can't occur must not, and what hardly does is taken together."""
  expected = probability * counts.sum()
  assert not np.any(counts[expected == 0])
  rare = (expected > 0) & (expected < 5)
  observed, expected = (
    np.append(each[~rare & (probability > 0)], each[rare].sum()) for each in (counts, expected)
  )
  if not expected[-1]:
    observed, expected = observed[:-1], expected[:-1]
  return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.parametrize(
  "name, n_given", [*((name, 0) for name in SAMPLINGS), ("plain", 1), ("all", 1)]
)
def test_samples_follow_the_distribution(name, n_given):
  given = np.full((DRAWS, n_given), 2, np.int32)
  run = compiled(ENUMERABLE, SAMPLINGS[name])
  tokens = np.asarray(
    run(enumerable_params(), prompt_BxP=given, keys_B=make_keys(DRAWS, seed=7)).tokens
  )
  counts = np.bincount(tokens @ [64, 16, 4, 1], minlength=256)
  probability = distribution(SAMPLINGS[name], n_given)
  if n_given:
    probability *= PICTURES[:, 0] == 2
  np.testing.assert_allclose(probability.sum(), 1, rtol=1e-5)
  assert np.count_nonzero(probability) >= 2 ** (4 - n_given)  # there is something to draw
  assert p_value(counts, probability) > 1e-3
  # The same draws don't pass for those at a temperature 10% higher.
  if name in ("plain", "temperature") and not n_given:
    warm = SamplingConfig(temperature=SAMPLINGS[name].temperature * 1.1)
    assert p_value(counts, distribution(warm)) < 1e-6


def test_bert_has_nothing_to_sample():
  config = tiny.make_config(causal=False)
  with pytest.raises(UserError, match="BERT"):
    complete(np.zeros((1, 0), np.int32), make_keys(1), config=config)


@pytest.mark.parametrize(
  "sampling",
  [SamplingConfig(temperature=1e-6), SamplingConfig(top_p=1e-6), SamplingConfig(1e-6, 3, 1e-6)],
  ids=str,
)
def test_the_least_temperature_and_share_take_the_likeliest_colour(sampling):
  """Logits as far apart as they come, none of them colour 0."""
  logits = jnp.asarray([[0.0, 5.0, -90.0, 5.1], [-1e3, 1e3, 999.0, 0.0]])
  keys = jax.random.split(jax.random.key(0), 2)
  assert autoregressive.draw(logits, keys, jnp.int32(1), sampling).tolist() == [3, 1]


@pytest.mark.parametrize(
  "field, value",
  [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
    ("temperature", 1e-38), ("temperature", 1e-300), ("temperature", 9e-7),
    ("top_k", -1), ("top_p", 0.0), ("top_p", 1e-300), ("top_p", 9e-7), ("top_p", 1.5), ("top_p", float("nan")),
  ],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value):
  with pytest.raises(UserError, match=f"{field}: {value}"):
    SamplingConfig(**{field: value})
