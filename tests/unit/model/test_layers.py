"""The layers in one function, with their backward pass written out, against the blocks that JAX derives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.model.around_attention import around_attention
from igpt_jax.model.attention import tpu
from igpt_jax.model.image_gpt import bind
from igpt_jax.parallel import sharding
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")


def configs(causal, **changes):
  """The same model, derived by JAX with plain attention, and through the stacks."""
  shape = {"n_head": 2, "n_embd": 64, "n_layer": 3, "n_positions": 64, "causal": causal, **changes}
  plain = tiny.make_config(attention="xla", **shape)
  return plain, dataclasses.replace(plain, attention="tpu_interpret", remat="names")


def value_and_grad(config):
  def loss(params, tokens, keep):
    logits = bind(config, params)(tokens, keep)
    # Every position counts differently, so that no gradient vanishes by symmetry.
    weight = jnp.linspace(0.5, 1.5, logits.size).reshape(logits.shape)
    return jnp.mean(jnp.sin(logits) * weight)

  return tiny.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
  "causal, shape, wide, options",
  [
    (True, (1, 1, 1), False, {}),
    (False, (2, 2, 2), False, {}),
    (True, (2, 2, 2), True, {}),
    (False, (1, 1, 1), True, {}),
    (True, (1, 1, 1), False, tiny.ALL_OPTIONS),
    (False, (2, 2, 2), True, tiny.ALL_OPTIONS),
    (True, (2, 2, 1), True, {}),
    (True, (2, 2, 1), True, tiny.ALL_OPTIONS),
    (True, (1, 1, 1), True, {}),
    (True, (1, 1, 1), False, {"positions": "rope2d"}),
  ],
  ids=str,
)
def test_values_and_gradients_are_those_of_the_blocks(causal, shape, wide, options, monkeypatch):
  """On both kinds of matrix unit: they keep different things."""
  monkeypatch.setattr(tpu, "wide_matrix_unit", lambda: wide)
  plain, stacked = configs(causal, n_head=4 if shape[2] > 1 else 2, n_embd=128, **options)
  params = tiny.random_params(plain)
  tokens = tiny.random_tokens(plain, 8)
  keep = None if causal else np.random.default_rng(0).random(tokens.shape) > 0.3
  expected, expected_grads = value_and_grad(plain)(params, tokens, keep)
  mesh = tiny.mesh_of(shape)
  with jax.set_mesh(mesh):
    stream = jax.ShapeDtypeStruct((*tokens.shape, stacked.n_embd), jnp.float32)
    # Kernels around attention, too, where nothing splits hidden units.
    assert bool(around_attention(stacked, stream, True)) == (wide and shape[2] == 1)
    placed = sharding.put_global(tokens, mesh)
    seen = None if keep is None else sharding.put_global(keep, mesh)
    found, grads = value_and_grad(stacked)(params, placed, seen)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  names = tiny.leaf_names(expected_grads)
  for name, leaf in tiny.leaf_names(grads).items():
    scale = np.abs(names[name]).max()
    assert scale > 1e-6, name
    np.testing.assert_allclose(leaf, names[name], rtol=0, atol=2e-5 * scale, err_msg=name)


def test_forward_alone_keeps_nothing():
  """Evaluation makes no stacks: no array in the program has the layers in front and the batch."""
  _, stacked = configs(True)
  tokens = tiny.random_tokens(stacked, 2)
  params = tiny.random_params(stacked)
  forward = jax.make_jaxpr(lambda p: bind(stacked, p)(tokens))(params)
  backward = jax.make_jaxpr(jax.grad(lambda p: bind(stacked, p)(tokens).sum()))(params)
  kept = f"[{stacked.n_layer},3,2,{stacked.n_positions},{stacked.n_embd}]"
  assert kept not in str(forward)
  assert kept in str(backward)


def test_bfloat16_gradients_are_near():
  plain, stacked = configs(True)
  params = tiny.random_params(plain)
  tokens = tiny.random_tokens(plain, 2)
  _, expected = value_and_grad(plain)(params, tokens, None)
  _, found = value_and_grad(dataclasses.replace(stacked, dtype="bfloat16"))(params, tokens, None)
  names = tiny.leaf_names(expected)
  for name, leaf in tiny.leaf_names(found).items():
    assert leaf.dtype == jnp.float32, name
    error = np.linalg.norm(leaf - names[name]) / np.linalg.norm(names[name])
    assert error < 0.05, (name, error)


def test_it_compiles_once_whatever_the_depth():
  """Layers are scanned: the program of six is that of three but for the numbers in it."""
  sizes = []
  for n_layer in (3, 6):
    _, stacked = configs(True, n_layer=n_layer)
    step = functools.partial(value_and_grad(stacked).lower, tiny.random_params(stacked))
    sizes.append(len(step(tiny.random_tokens(stacked, 2), None).as_text().splitlines()))
  assert sizes[0] == sizes[1]
