"""The joint loss: its parts, its gradients, its update on every mesh, its scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igpt_jax.model.image_gpt import bind
from igpt_jax.parallel import sharding
from igpt_jax.training import joint
from igpt_jax.training.evaluation import LikelihoodEvaluator
from igpt_jax.training.joint import Classifier, JointLoss
from igpt_jax.training.objectives import make_objective, per_image
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from igpt_jax.training.state import HEAD, abstract_state, make_state, state_shardings
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

N_CLASSES = 3
RECIPE = OptimizerConfig(learning_rate=0.01, steps=10, schedule="constant")
OPTIMIZER = make_optimizer(RECIPE)
MASKED = 0.4


@functools.cache
def params_of(config):
  """The model's and a head, all of them random."""
  head = np.random.default_rng(7).standard_normal((N_CLASSES, config.n_embd)).astype(np.float32)
  return {**tiny.random_params(config), HEAD: head}


def labels(batch, seed=0):
  return np.random.default_rng(seed).integers(N_CLASSES, size=batch, dtype=np.int32)


def keep_of(config, batch, seed=0, probability=MASKED):
  if config.causal:
    return None
  return np.random.default_rng(seed).random((batch, config.n_positions)) > probability


@pytest.fixture(params=[True, False], ids=["autoregressive", "bert"])
def config(request):
  return tiny.make_config(n_layer=3, n_head=4, causal=request.param)


def loss_and_grads(config, loss, batch=5):
  function = functools.partial(joint.joint_loss, config, loss)
  found = tiny.jit(jax.value_and_grad(function, has_aux=True))
  return found(
    params_of(config), tiny.random_tokens(config, batch), labels(batch), keep_of(config, batch)
  )


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_the_parts_are_the_objectives_loss_and_cross_entropy(config, layer):
  """Put together here from the model's logits and the probe's features."""
  tokens, keep = tiny.random_tokens(config, 5), keep_of(config, 5)
  (total, parts), _ = loss_and_grads(config, JointLoss(layer, 0.7, 1.3))
  model = bind(config, tiny.random_params(config))
  log_p = jax.nn.log_softmax(model(tokens, keep))
  nll = -jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
  generative = jnp.mean(per_image(nll, jnp.ones_like(nll) if keep is None else 1.0 - keep))
  logits = model.features(tokens, keep)[layer] @ params_of(config)[HEAD].T
  classification = optax.softmax_cross_entropy_with_integer_labels(logits, labels(5)).mean()
  np.testing.assert_allclose(parts["generative_loss"], generative, rtol=1e-5)
  np.testing.assert_allclose(parts["classification_loss"], classification, rtol=1e-5)
  np.testing.assert_allclose(total, 0.7 * generative + 1.3 * classification, rtol=1e-5)
  assert parts["accuracy"] == np.mean(np.argmax(logits, -1) == labels(5))


@pytest.mark.parametrize("probability, masked_images", [(0.05, 5), (0.0, 0)])
def test_images_without_a_mask_are_in_no_generative_loss(probability, masked_images):
  """All of them are classified."""
  config = tiny.make_config(causal=False)
  tokens, keep = tiny.random_tokens(config, 8), keep_of(config, 8, probability=probability)
  some = ~keep.all(axis=1)
  assert some.sum() == masked_images
  loss = functools.partial(joint.joint_loss, config, JointLoss(2))
  run = tiny.jit(jax.value_and_grad(loss, has_aux=True))
  (total, parts), grads = run(params_of(config), tokens, labels(8), keep)
  expected = (
    run(params_of(config), tokens[some], labels(8)[some], keep[some])[0][1]
    if any(some)
    else {"generative_loss": 0}
  )
  np.testing.assert_allclose(parts["generative_loss"], expected["generative_loss"], rtol=1e-5)
  np.testing.assert_allclose(
    total, parts["generative_loss"] + parts["classification_loss"], rtol=1e-6
  )
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)) and np.any(grads[HEAD])


def test_the_joint_gradient_is_the_sum_of_both(config):
  grads = {
    weights: loss_and_grads(config, JointLoss(3, *weights))[1]
    for weights in [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)]
  }
  jax.tree.map(
    lambda both, one, other: np.testing.assert_allclose(both, one + other, rtol=0, atol=1e-5),
    *grads.values(),
  )
  assert not np.any(grads[1.0, 0.0][HEAD])
  assert np.abs(grads[0.0, 1.0][HEAD]).max() > 1e-2
  assert np.abs(grads[0.0, 1.0]["blocks"]["attn"]["qkv"]).max() > 1e-4


def test_without_a_generative_weight_no_logits_are_computed(config):
  """No product with the output table is left: not a single array has the palette's last axis."""
  tokens, keep = tiny.random_tokens(config, 5), keep_of(config, 5)
  logits_shape = f"{5},{config.n_positions},{config.n_vocab}]"

  def traced(generative):
    function = functools.partial(joint.joint_loss, config, JointLoss(3, generative, 1.0))
    return str(jax.make_jaxpr(jax.grad(function, has_aux=True))(
      params_of(config), tokens, labels(5), keep
    ))  # fmt: skip

  assert logits_shape in traced(1.0)
  assert logits_shape not in traced(0.0)
  (_, parts), grads = loss_and_grads(config, JointLoss(3, 0.0, 1.0))
  assert "generative_loss" not in parts
  assert not np.any(grads["wtet"])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_head_in_the_middle_teaches_nothing_above_it(config, layer):
  _, grads = loss_and_grads(config, JointLoss(layer, 0.0, 1.0))
  for name, leaf in tiny.leaf_names(grads["blocks"]).items():
    assert not np.any(leaf[layer + 1 :]), name
    assert np.any(leaf[layer]) == (name == "ln_1/g"), name  # the norm that the head reads
    assert np.all([np.any(each) for each in leaf[:layer]]), name
  assert not np.any(grads["ln_f"]["g"]) and not np.any(grads["wtet"])
  assert np.any(grads["wte"]) and np.any(grads[HEAD])


def run_steps(config, layer, shape, steps=3):
  """Metrics and parameters of a few steps, made as the job makes them."""
  mesh = tiny.mesh_of(shape)
  shardings = state_shardings(config, OPTIMIZER, mesh, N_CLASSES)
  made = joint.make_finetune_step(
    config, JointLoss(layer, mask_probability=MASKED), OPTIMIZER, make_schedule(RECIPE)
  )
  step = tiny.jit(made, donate_argnums=0, out_shardings=(shardings, None))
  params = jax.device_put(params_of(config), shardings.params)
  state, values = make_state(config, OPTIMIZER, 0, mesh, params, N_CLASSES), []
  with jax.set_mesh(mesh):
    for seed in range(steps):
      tokens = tiny.random_tokens(config, 8, seed).astype(np.uint16)
      batch = sharding.put_batch({"tokens": tokens, "label": labels(8, seed)}, mesh)
      with jax.transfer_guard("disallow"):
        state, metrics = step(state, batch)
      values.append(metrics)
  assert step._cache_size() == 1
  for name, leaf in tiny.leaf_names(state).items():
    assert leaf.sharding.is_equivalent_to(tiny.leaf_names(shardings)[name], leaf.ndim), name
  return jax.device_get(values), jax.device_get(state.params)


@pytest.mark.parametrize("layer, shape", [(1, (2, 1, 2, 2)), (3, (2, 2, 2))])
def test_a_mesh_trains_as_one_device_does(config, layer, shape):
  one, params = run_steps(config, layer, (1, 1, 1))
  assert one[0].keys() == {
    "loss", "generative_loss", "classification_loss", "accuracy", "grad_norm", "learning_rate",
    "skipped_updates", "skipped_in_row",
  }  # fmt: skip
  found, theirs = run_steps(config, layer, shape)
  for mine, other in zip(one, found, strict=True):
    for name in mine:
      np.testing.assert_allclose(mine[name], other[name], rtol=1e-5, err_msg=name)
  assert np.abs(params[HEAD] - params_of(config)[HEAD]).max() > 0.01
  for name, leaf in tiny.leaf_names(params).items():
    other = tiny.leaf_names(theirs)[name]
    np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-4, err_msg=name)


def test_a_new_head_is_zero_and_the_model_is_pretrainings():
  config = tiny.make_config()
  mesh = tiny.mesh_of()
  with_head = make_state(config, OPTIMIZER, 4, mesh, n_classes=N_CLASSES)
  without = make_state(config, OPTIMIZER, 4, mesh)
  assert with_head.params[HEAD].shape == (N_CLASSES, config.n_embd)
  assert not np.any(with_head.params[HEAD])
  jax.tree.map(np.testing.assert_array_equal, joint.model_params(with_head.params), without.params)
  expected = abstract_state(config, OPTIMIZER, N_CLASSES)
  assert jax.tree.structure(with_head) == jax.tree.structure(expected)
  begun = make_state(config, OPTIMIZER, 4, mesh, without.params, N_CLASSES)  # a head is added
  jax.tree.map(np.testing.assert_array_equal, begun, with_head)


def test_the_steps_teach_the_classes():
  """Images whose one colour says their class."""
  config = tiny.make_config()
  mesh = tiny.mesh_of()
  recipe = OptimizerConfig(learning_rate=0.02, steps=30, schedule="constant")
  optimizer = make_optimizer(recipe)
  step = tiny.jit(joint.make_finetune_step(
    config, JointLoss(config.n_layer), optimizer, make_schedule(recipe)
  ))  # fmt: skip
  state = make_state(config, optimizer, 0, mesh, n_classes=N_CLASSES)
  label = labels(32)
  batch = {"tokens": np.tile(label[:, None] * 3, (1, config.n_positions)), "label": label}
  _, first = step(state, batch)
  for _ in range(30):
    state, last = step(state, batch)
  assert float(first["classification_loss"]) == pytest.approx(np.log(N_CLASSES), rel=1e-5)
  assert last["accuracy"] == 1 and last["classification_loss"] < 0.1
  assert last["generative_loss"] < 0.5 * first["generative_loss"]


# --- scores ----------------------------------------------------------------------------------------


def test_the_majority_decides_and_the_mean_among_equals():
  def one(*rows):
    return int(joint.vote(jnp.asarray(rows, jnp.float32)[:, None])[0])

  a, b, c = [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]
  assert one(a) == 0
  assert one(b, b, [9.0, 0, 0]) == 1  # though the mean says 0
  assert one(a, b, c, c, b, [0, 1.1, 0]) == 1
  assert one(a, [0, 2.0, 0]) == 1  # a tie: 1 is surer
  assert one([2.0, 0, 0], b) == 0
  assert one(a, a, [0, 3.0, 0], [0, 3.0, 0], [0, 0, 90.0]) == 1  # 2 isn't among the leaders
  many = jnp.asarray([[a, b], [a, c], [b, c]], jnp.float32)
  np.testing.assert_array_equal(joint.vote(many), [0, 2])


def batches_of(config, n=7, size=4, order=None):
  """All of n images once, in batches of `size`, the last one filled with rows that don't count."""
  order = np.arange(n) if order is None else np.asarray(order)
  tokens, label = tiny.random_tokens(config, n), labels(n)
  for first in range(0, n, size):
    rows = order[first : first + size]
    short = size - len(rows)
    yield {
      "tokens": np.pad(tokens[rows], ((0, short), (0, 0))),
      "label": np.pad(label[rows], (0, short), constant_values=-1),
      "index": np.pad(rows, (0, short), constant_values=-1).astype(np.int32),
      "mask": np.arange(size) < len(rows),
    }


def scores_of(config, mesh, masks, probability=MASKED, **batching):
  classifier = Classifier(config, mesh, layer=2, mask_probability=probability, masks=masks)
  params = jax.device_put(
    params_of(config), state_shardings(config, OPTIMIZER, mesh, N_CLASSES).params
  )
  return classifier(params, batches_of(config, **batching))


def test_scores_dont_depend_on_batches_or_mesh(config):
  """An image's masks are its index's, whatever batch it is in; rows that don't count don't."""
  expected = dataclasses.asdict(scores_of(config, tiny.mesh_of(), 3))
  assert expected["images"] == 7
  shuffled = {"size": 8, "order": [3, 1, 6, 0, 5, 2, 4]}
  for mesh, batching in [(tiny.mesh_of(), shuffled), (tiny.mesh_of((2, 2, 2)), {})]:
    found = dataclasses.asdict(scores_of(config, mesh, 3, **batching))
    assert found == pytest.approx(expected, rel=1e-5)


def test_scores_are_those_of_every_mask_by_itself(config):
  """Against the model called outside."""
  masks = 1 if config.causal else 3
  found = scores_of(config, tiny.mesh_of(), 3)
  tokens, label = tiny.random_tokens(config, 7), labels(7)
  model, logits, seen = bind(config, tiny.random_params(config)), [], []
  for draw in range(masks):
    keep = None
    if not config.causal:
      keys = [jax.random.fold_in(jax.random.key(draw), index) for index in range(7)]
      keep = np.stack([jax.random.uniform(key, (config.n_positions,)) for key in keys]) > MASKED
    seen.append(keep)
    logits.append(model.features(tokens, keep)[2] @ params_of(config)[HEAD].T)
  logits_KxBxC = np.stack(logits)
  assert found.accuracy == pytest.approx(np.mean(np.asarray(joint.vote(logits_KxBxC)) == label))
  assert found.accuracy_of_mean == pytest.approx(np.mean(logits_KxBxC.mean(0).argmax(-1) == label))
  nats = [optax.softmax_cross_entropy_with_integer_labels(each, label).mean() for each in logits]
  assert found.classification_loss == pytest.approx(np.mean(nats), rel=1e-5)
  if not config.causal:
    assert np.ptp(logits_KxBxC, axis=0).max() > 0.1 and not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize("probability", [MASKED, 0.05])
def test_a_classifiers_likelihood_is_that_of_evaluation(config, probability):
  """Of the same masks; those that hide nothing are left out of both."""
  objective = make_objective("autoregressive" if config.causal else "masked", probability)
  masks = 1 if config.causal else 3
  expected = LikelihoodEvaluator(config, objective, tiny.mesh_of())(
    tiny.random_params(config), batches_of(config), masks=masks
  )
  assert (expected.predicted == 7 * masks) == (config.causal or probability == MASKED)
  found = scores_of(config, tiny.mesh_of(), 3, probability)
  assert found.images == expected.images == 7
  assert found.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-5)
