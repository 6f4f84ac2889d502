"""Muon: what orthogonalisation makes of matrices, which parameters get it, and the same on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igpt_jax.model.image_gpt import abstract_params
from igpt_jax.model.parametrisation import STANDARD, Scale
from igpt_jax.parallel import sharding
from igpt_jax.training import compilation, muon
from igpt_jax.training.joint import JointLoss, make_finetune_step
from igpt_jax.training.objectives import make_objective
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from igpt_jax.training.state import HEAD, TrainState, abstract_state, make_state, state_shardings
from igpt_jax.training.step import make_train_step
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

RECIPE = OptimizerConfig(learning_rate=0.02, steps=20, schedule="constant", optimizer="muon")
OPTIMIZER = make_optimizer(RECIPE)
CONFIG = tiny.make_config(n_layer=3, n_head=4)  # 3 matrices, or 9, don't divide among 8 devices
OWN = ("blocks/attn/qkv", "blocks/attn/proj", "blocks/mlp/fc", "blocks/mlp/proj")
STEPS = 4


def matrix(m, n, values, seed=0):
  """A random matrix [m, n] with these singular values, and its singular vectors."""
  rng = np.random.default_rng(seed)
  u, _ = np.linalg.qr(rng.standard_normal((m, len(values))))
  v, _ = np.linalg.qr(rng.standard_normal((n, len(values))))
  return (u * values @ v.T).astype(np.float32), u, v


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
def test_singular_values_near_1_in_the_same_directions(shape, dtype, tolerance, size):
  given, u, v = matrix(*shape, size * np.geomspace(0.02, 1, 16))
  made = np.asarray(muon.newton_schulz(jnp.asarray(given, dtype)), np.float64)
  values = u.T @ made @ v
  assert np.all((0.65 < np.diag(values)) & (np.diag(values) < 1.25)), np.diag(values)
  np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=tolerance)
  assert np.linalg.svd(made)[1].max() < 1.25


def test_zeros_stay_zeros():
  """The gradient of every hidden matrix is zero at first: the output table is."""
  np.testing.assert_array_equal(muon.newton_schulz(jnp.zeros((2, 4, 8))), np.zeros((2, 4, 8)))


def gradients(seed, extra=None):
  params = tiny.random_params(CONFIG, seed)
  return params if extra is None else {**params, **extra}


def trace_of(config, params, grads):
  optimizer = make_optimizer(config)
  state, updates = optimizer.init(params), []
  update = tiny.jit(optimizer.update)
  for gradient in grads:
    update_now, state = update(gradient, state, params)
    updates.append(tiny.leaf_names(update_now))
  return updates


def test_a_first_update_is_that_of_optax():
  """optax.contrib.muon with consistent RMS; its momentum, corrected for its bias, differs later."""
  dimensions = {name: optax.contrib.MuonDimensionNumbers(-2, -1) for name in OWN}
  axes = jax.tree_util.tree_map_with_path(
    lambda path, _: dimensions.get("/".join(entry.key for entry in path)), abstract_params(CONFIG)
  )
  theirs = optax.contrib.muon(
    RECIPE.learning_rate,
    muon_weight_dimension_numbers=axes,
    consistent_rms=0.2,
    adam_b2=RECIPE.b2,
    nesterov=False,
  )
  params, gradient = gradients(0), gradients(1)
  expected, _ = tiny.jit(theirs.update)(gradient, theirs.init(params), params)
  (found,) = trace_of(RECIPE, params, [gradient])
  for name, update in tiny.leaf_names(expected).items():
    np.testing.assert_allclose(found[name], update, rtol=2e-4, atol=2e-6, err_msg=name)


def test_later_updates_follow_nesterovs_momentum_and_decay():
  """Jordan's Muon and decoupled decay, matrix by matrix, in numpy."""
  config = dataclasses.replace(RECIPE, weight_decay=0.3)
  params, grads = gradients(0), [gradients(seed) for seed in (1, 2, 3)]
  found = trace_of(config, params, grads)
  a, b, c = 3.4445, -4.7750, 2.0315

  def orthogonal(x):
    if x.shape[0] > x.shape[1]:
      return orthogonal(x.T).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
      gram = x @ x.T
      x = a * x + (b * gram + c * gram @ gram) @ x
    return x

  for name in OWN:
    before = np.asarray(tiny.leaf_names(params)[name], np.float64)
    momentum = 0.0
    for gradient, update in zip(grads, found, strict=True):
      g = np.asarray(tiny.leaf_names(gradient)[name], np.float64)
      momentum = 0.95 * momentum + 0.05 * g
      mixed = 0.95 * momentum + 0.05 * g
      flat = mixed.reshape(-1, *mixed.shape[-2:])
      alone = np.stack([orthogonal(x) for x in flat]).reshape(g.shape)
      expected = -0.02 * (0.2 * np.sqrt(max(g.shape[-2:])) * alone + 0.3 * before)
      np.testing.assert_allclose(update[name], expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_updates_are_as_large_as_adams():
  """Consistent RMS: 0.2 of the learning rate, whatever the matrix' shape."""
  (found,) = trace_of(RECIPE, gradients(0), [gradients(1)])
  for name in OWN:
    rms = np.sqrt(np.mean(np.square(found[name]))) / RECIPE.learning_rate
    assert rms == pytest.approx(0.2, rel=0.2), name


def test_a_stack_is_its_matrices_one_by_one():
  """No layer's, and of q, k and v none's, update depends on another's."""
  whole = trace_of(RECIPE, gradients(0), [gradients(1)])[0]
  for layer in range(CONFIG.n_layer):
    alone = tiny.make_config(n_layer=1, n_head=4)

    def only(tree, layer=layer):
      return {**tree, "blocks": jax.tree.map(lambda leaf: leaf[layer : layer + 1], tree["blocks"])}

    assert jax.tree.structure(only(gradients(0))) == jax.tree.structure(abstract_params(alone))
    found = trace_of(RECIPE, only(gradients(0)), [only(gradients(1))])[0]
    for name in OWN:
      np.testing.assert_allclose(found[name][0], whole[name][layer], rtol=1e-5, atol=1e-7)
  changed = gradients(1)
  qkv = changed["blocks"]["attn"]["qkv"].copy()
  qkv[1, 2] *= -3
  changed["blocks"]["attn"]["qkv"] = qkv
  other = trace_of(RECIPE, gradients(0), [changed])[0]["blocks/attn/qkv"]
  moved = np.abs(other - whole["blocks/attn/qkv"]).max((-2, -1))
  assert moved[1, 2] > 1e-3 and np.count_nonzero(moved > 1e-6) == 1


def test_what_isnt_a_blocks_matrix_stays_with_adam():
  """By its place, not by its shape: a table in every layer, or a classifier's head, is no matrix."""
  extra = {
    HEAD: np.ones((5, 16), np.float32),
    "value_embed": np.ones((3, 11, 16), np.float32),
    "blocks": {**gradients(0)["blocks"], "table": np.ones((3, 16, 16), np.float32)},
  }
  params, gradient = gradients(0, extra), gradients(1, extra)
  state = tiny.leaf_names(tiny.jit(OPTIMIZER.init)(params))
  adams = {name.split("/mu/")[1] for name in state if "/mu/" in name}
  muons = {name.split("/trace/")[1] for name in state if "/trace/" in name}
  assert muons == set(OWN)
  assert adams == set(tiny.leaf_names(params)) - muons
  assert {"clf", "value_embed", "blocks/table", "wte", "wtet", "sos", "blocks/ln_1/g"} <= adams
  found = trace_of(RECIPE, params, [gradient])[0]
  plain = trace_of(dataclasses.replace(RECIPE, optimizer="adam"), params, [gradient])[0]
  for name in adams:
    np.testing.assert_array_equal(found[name], plain[name], err_msg=name)


@pytest.mark.parametrize("n_classes", [0, 5])
def test_momentum_lies_with_its_parameter(n_classes):
  mesh = tiny.mesh_of((2, 2, 2))
  shardings = state_shardings(CONFIG, OPTIMIZER, mesh, n_classes)
  assert jax.tree.structure(shardings) == jax.tree.structure(
    abstract_state(CONFIG, OPTIMIZER, n_classes)
  )
  params = tiny.leaf_names(shardings.params)
  for name, leaf in tiny.leaf_names(shardings.opt_state).items():
    for moment in ("/mu/", "/nu/", "/trace/"):
      if moment in name:
        assert leaf == params[name.split(moment)[1]], name


@functools.cache
def begin(seed=0):
  return tiny.random_params(CONFIG, seed)


@functools.cache
def run_steps(shape, accumulate=1, scale=STANDARD):
  """Parameters and momentum after a few steps of pretraining, and every step's loss."""
  mesh = tiny.mesh_of(shape)
  config = dataclasses.replace(RECIPE, clip_norm=1.0, weight_decay=0.1, scale=scale)
  optimizer = make_optimizer(config)
  shardings = state_shardings(CONFIG, optimizer, mesh)
  objective = make_objective("autoregressive", 0.0)
  step = tiny.jit(
    make_train_step(CONFIG, objective, optimizer, make_schedule(config), accumulate),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )
  params = jax.device_put(begin(), shardings.params)
  state = make_state(CONFIG, optimizer, 0, mesh, params)
  losses = []
  with jax.set_mesh(mesh):
    for seed in range(STEPS):
      tokens = tiny.random_tokens(CONFIG, 16, seed).astype(np.uint16)
      state, metrics = step(state, sharding.put_batch({"tokens": tokens}, mesh))
      losses.append(float(metrics["loss"]))
  assert step._cache_size() == 1
  for name, leaf in tiny.leaf_names(state).items():
    wanted = tiny.leaf_names(shardings)[name]
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
  return losses, tiny.leaf_names(jax.device_get(state))


@pytest.mark.parametrize("shape", [*tiny.MESHES, (2, 1, 2, 2)], ids=str)
def test_every_mesh_trains_as_one_device_does(shape):
  assert_same_training(run_steps(shape), run_steps((1, 1, 1)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_batch_in_parts_trains_as_a_whole_one(shape):
  assert_same_training(run_steps(shape, accumulate=2), run_steps((1, 1, 1)))


def test_complete_p_on_a_mesh_trains_as_on_one_device():
  """Its factors are those of Adam's parameters and of Muon's."""
  scale = Scale(width=2.0, depth=1.5)
  found, expected = (run_steps(shape, scale=scale) for shape in ((2, 2, 2), (1, 1, 1)))
  assert_same_training(found, expected)
  plain = run_steps((1, 1, 1))[1]
  for name in OWN:
    moved, of_plain = (
      np.abs(run[f"params/{name}"] - tiny.leaf_names(begin())[name]).mean()
      for run in (expected[1], plain)
    )
    assert moved < 0.9 * of_plain, name


def assert_same_training(found, expected):
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for name in expected[1]:
    np.testing.assert_allclose(found[1][name], expected[1][name], rtol=0, atol=1e-3, err_msg=name)
  for name, before in tiny.leaf_names(begin()).items():
    assert np.abs(expected[1][f"params/{name}"] - before).max() > 0.01, name


def test_every_device_orthogonalises_its_share():
  """None computes all of it, though all of them hold the same momentum."""
  mesh = tiny.mesh_of((8, 1, 1))
  config = tiny.make_config(n_layer=8)
  abstract = abstract_state(config, OPTIMIZER)
  where = state_shardings(config, OPTIMIZER, mesh)
  update = tiny.jit(
    lambda state: OPTIMIZER.update(state.params, state.opt_state, state.params),
    in_shardings=(where,),
    out_shardings=(where.params, where.opt_state),
  )
  with jax.set_mesh(mesh):
    shared = update.lower(abstract).compile().cost_analysis()["flops"]
  alone = tiny.jit(OPTIMIZER.update).lower(abstract.params, abstract.opt_state, abstract.params)
  assert shared < alone.compile().cost_analysis()["flops"] / 5


def test_training_reduces_the_loss_on_a_mesh():
  """From fresh parameters, whose matrices' first gradients are zero, on images of two colours."""
  mesh = tiny.mesh_of((2, 2, 2))
  objective = make_objective("autoregressive", 0.0)
  step = tiny.jit(
    make_train_step(CONFIG, objective, OPTIMIZER, make_schedule(RECIPE)),
    out_shardings=(state_shardings(CONFIG, OPTIMIZER, mesh), None),
  )
  state = make_state(CONFIG, OPTIMIZER, 0, mesh)
  batch = sharding.put_batch({"tokens": tiny.random_tokens(CONFIG, 8) % 2}, mesh)
  losses = []
  with jax.set_mesh(mesh):
    for _ in range(11):
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
  assert losses[0] == pytest.approx(np.log(11), rel=1e-6)
  assert losses[-1] < 0.8 < np.log(11) / 2


def test_a_bad_step_leaves_the_momentum():
  objective = make_objective("autoregressive", 0.0)
  step = tiny.jit(make_train_step(CONFIG, objective, OPTIMIZER, make_schedule(RECIPE)))
  state = dataclasses.replace(make_state(CONFIG, OPTIMIZER, 0, tiny.mesh_of()), params=begin())
  state, _ = step(state, {"tokens": tiny.random_tokens(CONFIG, 8)})
  bad = dict(state.params, wte=jnp.full_like(state.params["wte"], jnp.nan))
  after, metrics = step(
    dataclasses.replace(state, params=bad), {"tokens": tiny.random_tokens(CONFIG, 8)}
  )
  assert metrics["skipped_in_row"] == 1
  jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
  assert any(np.any(leaf) for name, leaf in tiny.leaf_names(state).items() if "/trace/" in name)


@pytest.mark.parametrize("layer", [1, 3])
def test_fine_tuning_moves_model_and_head(layer):
  schedule = make_schedule(RECIPE)
  step = tiny.jit(make_finetune_step(CONFIG, JointLoss(layer), OPTIMIZER, schedule))
  state = make_state(CONFIG, OPTIMIZER, 0, tiny.mesh_of(), dict(begin()), n_classes=2)
  tokens = np.repeat(np.arange(8) % 2, CONFIG.n_positions).reshape(8, -1)  # one colour, its class
  batch = {"tokens": tokens.astype(np.uint16), "label": (np.arange(8) % 2).astype(np.int32)}
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["classification_loss"]))
  assert losses[-1] < 0.1 < losses[0]
  assert isinstance(state, TrainState) and np.any(state.params[HEAD])


def test_its_flops_are_those_of_the_program():
  """XLA's count of the products alone is met; beside them there is elementwise work."""
  config = tiny.make_config(n_layer=1, n_embd=128)
  params = abstract_params(config)
  own = compilation.flops_per_step(config, RECIPE, 4) - 4 * compilation.flops_per_image(config)
  matrices = {name: leaf for name, leaf in tiny.leaf_names(params).items() if name in OWN}
  counted = jax.jit(lambda leaves: jax.tree.map(muon.newton_schulz, leaves)).lower(matrices)
  counted = counted.compile().cost_analysis()["flops"]
  d = 128
  assert own == muon.flops(params) == 5 * (4 * 6 + 2 * 18) * d**3
  assert own < counted < 1.03 * own
  adam = dataclasses.replace(RECIPE, optimizer="adam")
  assert compilation.flops_per_step(config, adam, 4) == 4 * compilation.flops_per_image(config)
