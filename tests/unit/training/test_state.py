"""The training state: where every leaf lives, and that it is made there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer
from igpt_jax.training.state import abstract_state, make_state, state_shardings
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = tiny.make_config(n_vocab=16)
COMPLETE_P = dataclasses.replace(CONFIG, parametrisation="complete_p", base_embd=4, base_layer=1)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, steps=10, warmup_steps=2))

# Where the parameters lie, and with them Adam's moments.
PARAMETERS = {
  "wte": P(None, "fsdp"),
  "wpe": P(None, "fsdp"),
  "sos": P(None),
  "wtet": P(None, "fsdp"),
  "ln_f/g": P(None),
  "blocks/ln_1/g": P(None, None),
  "blocks/ln_2/g": P(None, None),
  "blocks/attn/qkv": P(None, None, "fsdp", "tensor"),
  "blocks/attn/proj": P(None, ("tensor", "fsdp"), None),
  "blocks/mlp/fc": P(None, "fsdp", "tensor"),
  "blocks/mlp/proj": P(None, ("tensor", "fsdp"), None),
}
GOLDEN = {
  "skipped": P(),
  "step": P(),
  "rng": P(),
  "opt_state/0/count": P(),
  "opt_state/1/count": P(),
  **{f"params/{name}": spec for name, spec in PARAMETERS.items()},
  **{f"opt_state/0/mu/{name}": spec for name, spec in PARAMETERS.items()},
  **{f"opt_state/0/nu/{name}": spec for name, spec in PARAMETERS.items()},
}


@functools.cache
def state_on(shape, config=CONFIG):
  return make_state(config, OPTIMIZER, 3, tiny.mesh_of(shape))


@pytest.mark.parametrize("causal", [True, False])
def test_sharding_of_every_leaf(causal):
  mesh = tiny.mesh_of((2, 2, 2))
  config = tiny.make_config(n_vocab=16, causal=causal)
  found = tiny.leaf_names(state_shardings(config, OPTIMIZER, mesh))
  expected = {name: spec for name, spec in GOLDEN.items() if causal or not name.endswith("sos")}
  assert {name: leaf.spec for name, leaf in found.items()} == expected
  assert all(leaf.mesh == mesh for leaf in found.values())


def test_moments_lie_with_their_parameter_whatever_the_optimizer_adds():
  mesh = tiny.mesh_of((2, 2, 2))
  config = OptimizerConfig(learning_rate=1e-3, steps=10, weight_decay=0.1, clip_norm=1.0)
  found = tiny.leaf_names(state_shardings(CONFIG, make_optimizer(config), mesh))
  for moment in ("mu", "nu"):
    of_moment = {
      name.split(f"/{moment}/")[1]: leaf.spec
      for name, leaf in found.items()
      if f"/{moment}/" in name
    }
    assert of_moment == PARAMETERS


def test_state_is_made_in_its_place():
  shape = (2, 2, 2)
  wanted = tiny.leaf_names(state_shardings(CONFIG, OPTIMIZER, tiny.mesh_of(shape)))
  made = tiny.leaf_names(state_on(shape))
  for name, leaf in made.items():
    assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name
  # A device holds a quarter of a matrix: half its width, half its heads.
  for name in ("params/blocks/attn/qkv", "opt_state/0/mu/blocks/attn/qkv"):
    assert {shard.data.shape for shard in made[name].addressable_shards} == {(2, 3, 8, 8)}
  assert {shard.data.shape for shard in made["params/wte"].addressable_shards} == {(16, 8)}


@pytest.mark.parametrize("config", [CONFIG, COMPLETE_P], ids=["standard", "complete_p"])
def test_initial_values_do_not_depend_on_the_mesh(config):
  one, many = (tiny.leaf_names(state_on(shape, config)) for shape in ((1, 1, 1), (2, 2, 2)))
  for name, leaf in one.items():
    np.testing.assert_array_equal(leaf, many[name], err_msg=name)
  assert not any(np.any(one[name]) for name in one if name.startswith("opt_state"))
  assert int(one["step"]) == 0
  other = tiny.leaf_names(make_state(config, OPTIMIZER, 4, tiny.mesh_of()))
  for name in ("params/wte", "params/blocks/attn/qkv", "rng"):
    assert np.any(np.asarray(other[name]) != np.asarray(one[name])), name


def test_abstract_state_is_the_state_without_its_values():
  made = state_on((1, 1, 1))
  abstract = abstract_state(CONFIG, OPTIMIZER)
  assert jax.tree.structure(abstract) == jax.tree.structure(made)
  for name, leaf in tiny.leaf_names(abstract).items():
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    same = tiny.leaf_names(made)[name]
    assert (leaf.shape, leaf.dtype) == (same.shape, same.dtype), name
  half = tiny.make_config(dtype="bfloat16")
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(abstract_state(half, OPTIMIZER))}
  assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32"), jnp.dtype("uint32")}


def test_parameters_and_draws_come_from_different_keys():
  """The stream that masks are drawn from isn't the one that the parameters came from."""
  rng = jax.random.wrap_key_data(state_on((1, 1, 1)).rng)
  params_key, expected = jax.random.split(jax.random.key(3))
  np.testing.assert_array_equal(jax.random.key_data(rng), jax.random.key_data(expected))
  assert np.any(np.asarray(jax.random.key_data(rng)) != np.asarray(jax.random.key_data(params_key)))
