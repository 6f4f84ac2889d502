"""Products of activations with weights: those of einsum, and on a CPU without copies of the activations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.model import codes, layers
from igpt_jax.model.projection import Einsum, sharded_einsum
from igpt_jax.parallel import hardware
from support import tiny

BATCH, LENGTH = 3, 5
SIZES = {"b": BATCH, "t": LENGTH, "d": 8, "e": 12, "s": 3, "c": 3, "v": 7}
PRODUCTS = {
  "to_qkv": layers.TO_QKV,
  "from_heads": layers.FROM_HEADS,
  "to_hidden": codes.TO_HIDDEN,
  "to_logits_of_codes": codes._TO_LOGITS,
  "to_logits": Einsum("btd,vd->btv", layers.STREAM, ("vocab", "embed"), layers.STREAM, "float32"),
}


def factors(product):
  rng = np.random.default_rng(0)
  terms = product.formula.replace("->", ",").split(",")
  return [rng.standard_normal([SIZES[a] for a in term]).astype(np.float32) for term in terms]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_values_and_gradients(product, platform, monkeypatch):
  monkeypatch.setattr(hardware, "platform", lambda: platform)
  x, weight, dout = factors(product)
  out, pull = jax.vjp(lambda *of: sharded_einsum(product, *of), x, weight)
  expected, expected_pull = jax.vjp(lambda *of: jnp.einsum(product.formula, *of), x, weight)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  for ours, plain in zip(pull(dout), expected_pull(dout), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_a_gradient_over_stacked_weights_is_summed_in_float32(monkeypatch):
  """Else three summands of bfloat16 would be rounded twice."""
  monkeypatch.setattr(hardware, "platform", lambda: "cpu")
  x, weight, dout = (jnp.asarray(part, jnp.bfloat16) for part in factors(layers.TO_QKV))
  _, pull = jax.vjp(lambda of: sharded_einsum(layers.TO_QKV, of, weight), x)
  exact = jnp.einsum("sbte,sde->btd", dout, weight, preferred_element_type="float32")
  np.testing.assert_array_equal(pull(dout)[0], exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("devices, products", [(1, 9), (2, 3)])
def test_stacked_weights_are_multiplied_together_on_several_devices(devices, products, monkeypatch):
  """A product each had its own collectives, and XLA's CPU devices waited for each other for ever."""
  monkeypatch.setattr(hardware, "platform", lambda: "cpu")
  x, weight, _ = factors(layers.TO_QKV)

  def loss(x, weight):
    return jnp.sum(jnp.square(sharded_einsum(layers.TO_QKV, x[:2], weight)))

  with jax.set_mesh(tiny.mesh_of((devices, 1, 1))):
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weight))
  assert program.count("dot_general[") == products


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA does on a CPU")
@pytest.mark.parametrize("product", [layers.TO_INNER, layers.TO_QKV], ids=["mlp", "qkv"])
def test_a_cpu_transposes_no_activations(product):
  """XLA transposes a factor of three axes by a copy, which took longer than the product."""
  batch, length, width = 4, 64, 32
  x = jnp.zeros((batch, length, width))
  weight = jnp.zeros((3, width, width) if "s" in product.formula else (width, 4 * width))

  def loss(x, weight):
    return jnp.sum(jnp.square(sharded_einsum(product, x, weight)))

  program = jax.jit(jax.grad(loss, (0, 1))).lower(x, weight).compile().as_text()
  moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:transpose|copy)\(", program)
  sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in moved]
  assert "dot(" in program and max(sizes, default=0) < x.size, moved
