"""CompleteP: its factors, what is the same at the base shape, and what stays the same as shapes grow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.config import choices
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import bind, init_params
from igpt_jax.model.parametrisation import Scale, multipliers, names, scale_of
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer
from support import rates, tiny

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_initial_values():
  """Hidden matrices by 1/√m of the base shape's standard deviation, outputs by another 1/l."""
  base = tiny.make_config(n_layer=2, n_embd=64)
  wide = tiny.make_config(
    n_layer=6, n_embd=256, parametrisation="complete_p", base_embd=64, base_layer=2
  )
  small, large = (
    tiny.leaf_names(jax.device_get(init_params(config, jax.random.key(0))))
    for config in (base, wide)
  )
  factors = {
    "blocks/attn/qkv": 1 / 2, "blocks/attn/proj": 1 / 2 / 3, "blocks/mlp/fc": 1 / 2,
    "blocks/mlp/proj": 1 / 2 / 3, "wte": 1, "wpe": 1, "sos": 1,
  }  # fmt: skip
  for name, leaf in large.items():
    if name in factors:
      expected = factors[name] * np.std(small[name])
      assert np.std(leaf) == pytest.approx(expected, rel=0.2 if name == "sos" else 0.1), name
    else:
      assert np.ptp(leaf) == 0 and leaf.flat[0] == small[name].flat[0], name


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_at_the_base_shape_it_is_the_standard_one(optimizer):
  runs = [
    rates.trained(rates.config_of(kind, 64), 0.01, 3, 4, optimizer=optimizer, weight_decay=0.1)
    for kind in ("standard", "complete_p")
  ]
  jax.tree.map(np.testing.assert_array_equal, *runs)


def test_folding_a_multiplier_into_a_weight():
  """Adam on W used as W/l is Adam on V = W/l with the factors of a block's output."""
  scale = Scale(width=1.0, depth=4.0)
  path = ("blocks", "mlp", "proj")
  own = multipliers(path, scale)
  assert own.adam == pytest.approx(1 / 4)
  rng = np.random.default_rng(0)
  weight, gradients = rng.standard_normal((2, 4, 3)), 1e-7 * rng.standard_normal((5, 2, 4, 3))

  def run(config, params, grads):
    optimizer = make_optimizer(config)
    tree = {"blocks": {"mlp": {"proj": jnp.asarray(params, jnp.float32)}}}
    state = optimizer.init(tree)
    for gradient in grads:
      gradient = {"blocks": {"mlp": {"proj": jnp.asarray(gradient, jnp.float32)}}}
      updates, state = optimizer.update(gradient, state, tree)
      tree = jax.tree.map(jnp.add, tree, updates)
    return np.asarray(tree["blocks"]["mlp"]["proj"])

  # CompleteP's ε in a block is 1/(m·l) of the base's.
  of_w = OptimizerConfig(0.1, 5, schedule="constant", eps=1e-7 / 4, weight_decay=0.2)
  of_v = OptimizerConfig(0.1, 5, schedule="constant", eps=1e-7, weight_decay=0.2, scale=scale)
  unfolded = run(of_w, weight, gradients / 4) / 4  # the gradient of W is that of V, over l
  np.testing.assert_allclose(run(of_v, weight / 4, gradients), unfolded, rtol=1e-5, atol=1e-7)


def test_rates_and_epsilon_of_every_parameter():
  """Table 1 of the paper at m = 4, l = 3, folded; everything else learns at the rate itself."""
  params = init_params(tiny.make_config(), jax.random.key(0)) | {"clf": jnp.zeros((3, 16))}
  found = {}
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    own = multipliers(names(path), Scale(4.0, 3.0))
    found["/".join(names(path))] = (own.adam, own.muon, own.epsilon)
  inner, outer = (1 / 4, 1 / 2, 1 / 12), (1 / 12, 1 / 6, 1 / 4)
  table, gain, readout = (1, 1, 1 / 4), (1, 1, 1 / 12), (1 / 4, 1, 1)
  expected = {
    "wte": table, "wpe": table, "sos": table, "ln_f/g": table, "wtet": readout, "clf": readout,
    "blocks/ln_1/g": gain, "blocks/ln_2/g": gain, "blocks/attn/qkv": inner, "blocks/mlp/fc": inner,
    "blocks/attn/proj": outer, "blocks/mlp/proj": outer,
  }  # fmt: skip
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    assert found[name] == pytest.approx(values), name


def changes(config, optimizer):
  """RMS of the changes that a few steps make: of the last block's input, the final norm's output, logits."""
  before, after, _ = rates.trained(config, 3e-3, 6, 8, optimizer=optimizer, schedule="constant")
  tokens = jnp.asarray(rates.digits()[-8:].astype(np.int32))

  @tiny.jit
  def activations(params):
    model = bind(config, params)
    final, streams = model.hidden(model.embed(tokens), collect=lambda block, x, _: x)
    return streams[-1], final, model.logits(final, tokens)

  both = zip(activations(after), activations(before), strict=True)
  return [np.sqrt(np.mean(np.square(new - old))) for new, old in both]


def powers(sizes, optimizer, kind, config_of):
  """Powers of the size that the changes grow by."""
  logs = np.log([changes(config_of(kind, size), optimizer) for size in sizes])
  return np.polyfit(np.log(sizes), logs, 1)[0]


@pytest.mark.parametrize(
  "optimizer, standard",
  [pytest.param("adam", 0.7), pytest.param("muon", 0.25, marks=pytest.mark.slow)],
)
def test_activations_move_alike_at_every_width(optimizer, standard):
  """The coordinate check. The standard ones should grow as the width (Adam), or its root (Muon)."""
  sizes = (64, 128, 256)
  found = powers(sizes, optimizer, "complete_p", rates.config_of)
  assert np.abs(found).max() < 0.2, found
  assert powers(sizes, optimizer, "standard", rates.config_of)[0] > standard


@pytest.mark.slow
def test_activations_move_alike_at_every_depth():
  """By Adam: Muon's updates of different layers add up to less, in both parametrisations."""

  def config_of(kind, n_layer):
    return rates.config_of(kind, 64, n_layer)

  sizes = (2, 4, 8)
  found = powers(sizes, "adam", "complete_p", config_of)
  assert np.abs(found).max() < 0.2, found
  assert powers(sizes, "adam", "standard", config_of)[0] > 0.4


@pytest.mark.parametrize(
  "changed, message",
  [
    (dict(parametrisation="mup"), r"model.parametrisation: 'mup'; expected one of standard, complete_p"),
    (dict(base_embd=0), r"model.base_embd: 0; expected the model.n_embd at which"),
    (dict(base_layer=0), r"model.base_layer: 0; expected the model.n_layer at which"),
    (dict(parametrisation="standard", base_layer=0), r"model.base_embd: 8; expected 0 .*complete_p"),
  ],
)  # fmt: skip
def test_a_base_shape_that_is_missing_or_of_no_use_is_refused(changed, message):
  given = dict(parametrisation="complete_p", base_embd=8, base_layer=1) | changed
  for make in (tiny.make_config, lambda **own: scale_of(n_embd=16, n_layer=2, **own)):
    with pytest.raises(UserError, match=message):
      make(**given)


def test_settings_reach_model_and_optimizer_and_a_checkpoint_keeps_them():
  settings = tiny.settings_of(
    changes={
      "model.parametrisation": "complete_p", "model.base_embd": 128, "model.base_layer": 6,
      "model.dtype": "float32",
    }
  )  # fmt: skip
  model = choices.model_config(settings, n_vocab=8)
  assert model.scale == Scale(4.0, 4.0) == choices.optimizer_config(settings).scale
  tuned = choices.settle(tiny.settings_of(), dataclasses.replace(model, n_embd=256))
  assert choices.finetuning_optimizer_config(tuned).scale == Scale(2.0, 4.0)
