"""The training step: one of them against a plain one, and the same on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igpt_jax.parallel import sharding
from igpt_jax.training.objectives import make_objective
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from igpt_jax.training.state import TrainState, abstract_state, make_state, state_shardings
from igpt_jax.training.step import make_eval_step, make_train_step, update
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

RECIPE = OptimizerConfig(learning_rate=0.01, steps=10, warmup_steps=2)
OPTIMIZER = make_optimizer(RECIPE)
STEPS = 4


MASKED = 0.4
RARELY = 0.05  # most images have nothing masked


def objective_of(config, probability=MASKED):
  return make_objective("autoregressive" if config.causal else "masked", probability)


def build(config, accumulate=1, probability=MASKED):
  objective = objective_of(config, probability)
  return make_train_step(config, objective, OPTIMIZER, make_schedule(RECIPE), accumulate)


def plain_loss(params, tokens, keep, n_head):
  """The model in a few lines: no scan, no layout, no bound module."""

  def norm(x, g):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * g

  length = tokens.shape[1]
  x = params["wte"][tokens]
  if keep is None:
    x = jnp.concatenate([jnp.tile(params["sos"], (len(tokens), 1, 1)), x[:, :-1]], axis=1)
  else:
    x = x * keep[..., None]
  x = x + params["wpe"][:length]
  blocks = params["blocks"]
  for layer in range(blocks["ln_1"]["g"].shape[0]):
    n = norm(x, blocks["ln_1"]["g"][layer])
    q, k, v = (n @ blocks["attn"]["qkv"][layer, j] for j in range(3))
    heads = []
    for q_h, k_h, v_h in zip(*(jnp.split(a, n_head, axis=-1) for a in (q, k, v)), strict=True):
      scores = q_h @ k_h.swapaxes(1, 2) / jnp.sqrt(q_h.shape[-1])
      if keep is None:
        scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
      heads.append(jax.nn.softmax(scores) @ v_h)
    x = x + jnp.concatenate(heads, axis=-1) @ blocks["attn"]["proj"][layer]
    n = norm(x, blocks["ln_2"]["g"][layer]) @ blocks["mlp"]["fc"][layer]
    x = x + (n * jax.nn.sigmoid(1.702 * n)) @ blocks["mlp"]["proj"][layer]
  logits = norm(x, params["ln_f"]["g"]) @ params["wtet"].T
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
  if keep is None:
    return jnp.mean(nll)
  hidden = 1 - keep
  return jnp.mean(jnp.sum(nll * hidden, axis=1) / jnp.sum(hidden, axis=1))


def keep_of(config, step, batch, probability):
  """The step's masks, drawn here: float32 [B, T], 1 where a pixel is visible."""
  keys = jax.random.split(jax.random.fold_in(jax.random.key(9), step), batch)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (config.n_positions,)))(keys)
  return (uniform > probability).astype(jnp.float32)


@pytest.mark.parametrize("causal", [True, False])
def test_three_steps_against_plain_ones(causal):
  """Loss, gradient norm, rate, and every parameter and moment, by jax.grad and Adam in numpy."""
  config = tiny.make_config(causal=causal)
  params = tiny.random_params(config)
  state = begin(config, tiny.mesh_of())
  step = tiny.jit(build(config))
  plain = tiny.jit(jax.value_and_grad(plain_loss), static_argnums=3)

  flat = {name: np.asarray(leaf, np.float64) for name, leaf in tiny.leaf_names(params).items()}
  m, v = ({name: np.zeros_like(leaf) for name, leaf in flat.items()} for _ in range(2))
  expected_params = params
  for t in range(3):
    tokens = tiny.random_tokens(config, 4, seed=t)
    keep = None
    if not causal:
      keep = keep_of(config, t, 4, MASKED)
      assert 0.2 < 1 - keep.mean() < 0.6
    loss, grads = plain(expected_params, jnp.asarray(tokens), keep, config.n_head)
    grads = {name: np.asarray(g, np.float64) for name, g in tiny.leaf_names(grads).items()}
    rate = (0.0, 0.005, 0.01)[t]  # linear over two steps
    for name, g in grads.items():
      m[name] = 0.9 * m[name] + 0.1 * g
      v[name] = 0.95 * v[name] + 0.05 * g**2
      scaled = m[name] / (1 - 0.9 ** (t + 1)), v[name] / (1 - 0.95 ** (t + 1))
      flat[name] = flat[name] - rate * scaled[0] / (np.sqrt(scaled[1]) + 1e-8)

    state, metrics = step(state, {"tokens": tokens.astype(np.uint16)})
    assert metrics.keys() == {
      "loss", "grad_norm", "learning_rate", "skipped_updates", "skipped_in_row"
    }  # fmt: skip
    assert all(value.dtype == jnp.float32 for value in metrics.values())
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
    assert int(state.step) == t + 1
    np.testing.assert_array_equal(state.rng, [0, 9])
    found = tiny.leaf_names(state)
    for name in flat:
      for part, values, scale in (
        ("params", flat, rate),
        ("opt_state/0/mu", m, 1),
        ("opt_state/0/nu", v, 1),
      ):
        tolerance = 1e-3 * scale * (1 if part == "params" else np.abs(values[name]).max())
        np.testing.assert_allclose(
          found[f"{part}/{name}"], values[name], rtol=0, atol=tolerance, err_msg=f"{part}/{name}"
        )
    expected_params = state.params


def begin(config, mesh, step=0):
  """A state whose parameters all matter, on the mesh."""
  zeros = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_state(config, OPTIMIZER)
  )
  state = dataclasses.replace(
    zeros,
    step=np.asarray(step, np.int32),
    params=tiny.random_params(config),
    rng=np.asarray([0, 9], np.uint32),
  )
  return jax.device_put(state, state_shardings(config, OPTIMIZER, mesh))


def run_steps(config, shape, accumulate=1, probability=MASKED):
  """The metrics of a few steps made as `pretrain` makes them, with what must hold on every mesh."""
  mesh = tiny.mesh_of(shape)
  shardings = state_shardings(config, OPTIMIZER, mesh)
  made = build(config, accumulate, probability)
  step = tiny.jit(made, donate_argnums=0, out_shardings=(shardings, None))
  state, values = begin(config, mesh), []
  with jax.set_mesh(mesh):
    for seed in range(STEPS):
      tokens = tiny.random_tokens(config, 16, seed=seed).astype(np.uint16)
      batch = sharding.put_batch({"tokens": tokens}, mesh)
      before = state
      with jax.transfer_guard("disallow"):
        state, metrics = step(state, batch)
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))  # donated
      values.append(metrics)
  assert step._cache_size() == 1  # compiled once
  for name, leaf in tiny.leaf_names(state).items():
    wanted = tiny.leaf_names(shardings)[name]
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
  return jax.device_get(values), jax.device_get(state)


@functools.cache
def one_device(config, probability=MASKED):
  return run_steps(config, (1, 1, 1), probability=probability)


@pytest.mark.parametrize("shape", tiny.MESHES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["autoregressive", "bert"])
def test_every_mesh_trains_as_one_device_does(causal, shape):
  config = tiny.make_config(n_head=4, causal=causal)
  assert_trains_as_one_device(config, *run_steps(config, shape))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("causal", [True, False], ids=["autoregressive", "bert"])
def test_a_batch_in_parts_trains_as_a_whole_one(causal, accumulate, shape):
  """BERT's masks too are the image's own, whatever part it is in."""
  config = tiny.make_config(n_head=4, causal=causal)
  assert_trains_as_one_device(config, *run_steps(config, shape, accumulate))


@pytest.mark.parametrize(
  "shape, accumulate, options",
  [
    ((2, 4, 1, 1), 1, {}), ((2, 1, 2, 2), 1, {"causal": False}),
    ((2, 1, 4, 1), 2, {"causal": False}), ((4, 2, 1, 1), 2, {}),
    ((2, 2, 2, 1), 2, {"qk_norm": True, "positions": "rope2d", "value_embeddings": True, "x0_skip": True}),
  ],
)  # fmt: skip
def test_slices_train_as_one_device_does(shape, accumulate, options):
  config = tiny.make_config(n_head=4, **options)
  assert_trains_as_one_device(config, *run_steps(config, shape, accumulate))


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_images_without_a_mask_are_in_no_mean(accumulate, shape):
  """Loss and gradient are over the others, wherever these are: on which device, in which part."""
  config = tiny.make_config(n_head=4, causal=False)
  found, state = run_steps(config, shape, accumulate, RARELY)
  assert_trains_as_one_device(config, found, state, RARELY)
  loss_and_grads = jax.value_and_grad(plain_loss)
  tokens = jnp.asarray(tiny.random_tokens(config, 16, seed=0))
  keep = keep_of(config, 0, 16, RARELY)
  some = np.flatnonzero(jnp.any(keep == 0, axis=1))
  assert 4 < len(some) < 12
  loss, grads = loss_and_grads(tiny.random_params(config), tokens[some], keep[some], config.n_head)
  np.testing.assert_allclose(found[0]["loss"], loss, rtol=1e-5)
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
  np.testing.assert_allclose(found[0]["grad_norm"], norm, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_a_mask_teaches_nothing(accumulate):
  """Loss and gradient are 0; moments fade, and parameters move as they say."""
  config = tiny.make_config(causal=False)
  step = tiny.jit(build(config, accumulate, probability=1e-6))
  before = begin(config, tiny.mesh_of(), step=5)
  adam, *rest = before.opt_state
  adam = adam._replace(
    mu=jax.tree.map(jnp.ones_like, adam.mu), nu=jax.tree.map(jnp.ones_like, adam.nu)
  )
  before = dataclasses.replace(before, opt_state=(adam, *rest))
  after, metrics = step(before, {"tokens": jnp.asarray(tiny.random_tokens(config, 4))})
  assert {name: float(metrics[name]) for name in ("loss", "grad_norm", "skipped_updates")} == {
    "loss": 0, "grad_norm": 0, "skipped_updates": 0
  }  # fmt: skip
  for name, leaf in tiny.leaf_names(after.opt_state[0].mu).items():
    np.testing.assert_allclose(leaf, 0.9, rtol=1e-6, err_msg=name)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


def assert_trains_as_one_device(config, found, state, probability=MASKED):
  expected, expected_state = one_device(config, probability)
  for t in range(STEPS):
    for name in ("loss", "grad_norm", "learning_rate"):
      np.testing.assert_allclose(
        found[t][name], expected[t][name], rtol=1e-5 if name == "loss" else 1e-4, err_msg=(t, name)
      )
  losses = [float(values["loss"]) for values in found]
  assert np.ptp(losses) > 0.1  # there is a curve to follow
  for name, leaf in tiny.leaf_names(state.params).items():
    moved = np.abs(leaf - tiny.leaf_names(tiny.random_params(config))[name]).max()
    assert moved > 0.01, name
    expected_leaf = tiny.leaf_names(expected_state.params)[name]
    np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-3, err_msg=name)


def test_the_learning_rate_told_is_the_one_applied():
  """It goes by steps, whichever updates were left out: else a decay wouldn't end with the run."""
  schedule = make_schedule(RECIPE)
  plain = optax.scale_by_learning_rate(schedule)  # the parameter's change is the rate, times -1
  step = tiny.jit(
    lambda state, grad: update(state, grad, {"loss": 1.0 + 0 * grad}, plain, schedule)
  )
  zeros = jnp.zeros(2, jnp.int32)
  state = TrainState(jnp.int32(0), jnp.float32(0), plain.init(0.0), jnp.zeros(2, jnp.uint32), zeros)
  told, applied, left_out = [], [], []
  for grad in (1.0, np.nan, 1.0, np.inf, np.nan, 1.0, 1.0):
    before = float(state.params)
    state, metrics = step(state, jnp.float32(grad))
    left_out.append(int(metrics["skipped_updates"]))
    if np.isfinite(grad):
      told.append(float(metrics["learning_rate"]))
      applied.append(before - float(state.params))
  assert left_out == [0, 1, 1, 2, 3, 3, 3]
  np.testing.assert_allclose(told, [schedule(n) for n in (0, 2, 5, 6)], rtol=1e-6)
  np.testing.assert_allclose(applied, told, rtol=1e-4)
  assert len(set(told)) == 4


def test_the_guard_would_notice_a_transfer():
  config = tiny.make_config()
  mesh = tiny.mesh_of()
  state, tokens = begin(config, mesh), tiny.random_tokens(config, 8)
  step = tiny.jit(build(config))
  with (
    jax.set_mesh(mesh),
    jax.transfer_guard("disallow"),
    pytest.raises(Exception, match="Disallowed host-to-device"),
  ):
    step(state, {"tokens": tokens})


def test_training_reduces_the_loss():
  """From fresh parameters, on images of two colours out of eleven."""
  config = tiny.make_config()
  mesh = tiny.mesh_of((2, 2, 2))
  recipe = OptimizerConfig(learning_rate=0.02, steps=10, schedule="constant")
  optimizer = make_optimizer(recipe)
  step = tiny.jit(
    make_train_step(config, objective_of(config), optimizer, make_schedule(recipe)),
    donate_argnums=0,
    out_shardings=(state_shardings(config, optimizer, mesh), None),
  )
  state = make_state(config, optimizer, 0, mesh)
  batch = sharding.put_batch({"tokens": tiny.random_tokens(config, 8) % 2}, mesh)
  losses = []
  with jax.set_mesh(mesh):
    for _ in range(11):
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
  assert step._cache_size() == 1
  assert losses[0] == pytest.approx(np.log(11), rel=1e-6)
  assert losses[-1] < 0.8 < np.log(11) / 2


def test_each_step_draws_masks_of_its_own():
  config = tiny.make_config(causal=False)
  step = tiny.jit(build(config))
  batch = {"tokens": jnp.asarray(tiny.random_tokens(config, 8))}

  def loss(at_step, seed):
    state = begin(config, tiny.mesh_of(), step=at_step)
    state = dataclasses.replace(state, rng=jnp.asarray([0, seed], jnp.uint32))
    return float(step(state, batch)[1]["loss"])

  losses = [loss(0, 0), loss(1, 0), loss(2, 0), loss(0, 1)]
  assert len(set(losses)) == 4
  assert loss(1, 0) == losses[1]  # and the same again


def test_evaluation_sums_over_what_the_mask_counts():
  """BERT's masks belong to the image's index: order and company don't matter."""
  config = tiny.make_config(causal=False)
  params = tiny.random_params(config)
  evaluate = tiny.jit(make_eval_step(config, objective_of(config)))
  tokens = tiny.random_tokens(config, 6)
  key = jax.random.key(0)

  def nats(rows, mask=None):
    rows = np.asarray(rows)
    counted = np.ones(len(rows), bool) if mask is None else np.asarray(mask)
    batch = {"tokens": tokens[rows], "index": rows.astype(np.int32) + 100, "mask": counted}
    sums = evaluate(params, batch, key)
    assert float(sums["images"]) == float(sums["predicted"]) == counted.sum()
    return float(sums["nats"])

  # Two images alike have masks of their own all the same.
  twins = {"tokens": tokens[[0] * 6], "mask": np.ones(6, bool)}
  shared, own = (
    float(evaluate(params, {**twins, "index": index}, key)["nats"])
    for index in (np.zeros(6, np.int32), np.arange(6, dtype=np.int32))
  )
  assert abs(own - shared) > 1e-3

  each = [nats([i] * 6, [True] + [False] * 5) for i in range(6)]
  assert len(set(each)) == 6
  assert nats([3, 0, 5, 1, 4, 2]) == pytest.approx(sum(each), rel=1e-5)
  assert nats([3, 0, 5, 1, 4, 2], [1, 1, 0, 1, 0, 0] == np.ones(6)) == pytest.approx(
    each[3] + each[0] + each[1], rel=1e-5
  )
