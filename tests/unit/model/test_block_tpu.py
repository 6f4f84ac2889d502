"""The kernels around attention against the same formulas derived by JAX, in Pallas' interpreter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.model import block_tpu, layers
from igpt_jax.parallel import hardware
from support import jaxprs

LAYERS, BATCH, LENGTH, WIDTH, INNER = 3, 2, 128, 128, 512
LAYER = 1
V6E = hardware.vmem_bytes("TPU v6 lite")


def make_plan(backward, parts=1, dtype="float32"):
  plan = block_tpu.make_plan(
    BATCH * LENGTH, WIDTH, INNER, jnp.dtype(dtype),
    backward=backward, vmem=V6E, interpret=True,
  )  # fmt: skip
  assert plan is not None
  # Several tiles, and several turns of the loop over hidden units.
  return dataclasses.replace(plan, tile=128, chunk=128, parts=parts)


def draw(dtype, *shape, size=1.0):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(size * rng.standard_normal(shape), dtype)


@pytest.fixture(params=["float32", "bfloat16"])
def case(request):
  """Stacks and parameters in a dtype, and the relative error that its rounding allows."""
  dtype = request.param
  stacks = draw(dtype, LAYERS + 1, BATCH, LENGTH, WIDTH), draw(dtype, LAYERS, BATCH, LENGTH, WIDTH)
  gain = 1 + 0.3 * draw("float32", WIDTH)
  weights = [
    draw(dtype, *shape, size=shape[-2] ** -0.5)
    for shape in ((WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH), (3, WIDTH, WIDTH))
  ]
  return stacks, gain, weights, 2e-6 if dtype == "float32" else 8e-3


def exact(*arrays):
  return [array.astype(jnp.float32) for array in arrays]


def finish(x, heads, gain, attn, fc, proj):
  """The rest of a block after attention, as its definition has it."""
  with jax.default_matmul_precision("highest"):
    middle = x + heads @ attn
    return middle + layers.activation(layers.rms_norm(middle, gain) @ fc) @ proj


def qkv(x, gain, weight):
  with jax.default_matmul_precision("highest"):
    return jnp.einsum("btd,sde->sbte", layers.rms_norm(x, gain), weight)


def check(found, expected, tolerance):
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape
  assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def test_the_rest_of_a_block_goes_into_the_next_layers_input(case):
  (inputs, heads), gain, (attn, fc, proj, _), tolerance = case
  plan = make_plan(False)
  found = block_tpu.finish(plan, jnp.int32(LAYER), inputs, heads, gain, attn, fc, proj)
  arguments = exact(inputs[LAYER], heads[LAYER], gain, attn, fc, proj)
  check(found[LAYER + 1], finish(*arguments), tolerance)
  for other in (0, LAYER, LAYERS):
    np.testing.assert_array_equal(found[other], inputs[other])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_gradients_of_the_rest_of_a_block(case, parts):
  (inputs, heads), gain, (attn, fc, proj, _), tolerance = case
  dy = draw(inputs.dtype, BATCH, LENGTH, WIDTH)
  plan = make_plan(True, parts)
  found = block_tpu.finish_gradients(
    plan, jnp.int32(LAYER), inputs, heads, gain, attn, fc, proj, dy
  )
  _, pull = jax.vjp(finish, *exact(inputs[LAYER], heads[LAYER], gain, attn, fc, proj))
  names = ("x", "heads", "gain", "attn", "fc", "proj")
  for name, got, expected in zip(names, found, pull(*exact(dy)), strict=True):
    assert got.dtype == (inputs.dtype if name in ("x", "heads") else jnp.float32), name
    check(got, expected, 2 * tolerance)


def test_queries_keys_and_values_go_into_their_stack(case):
  (inputs, _), gain, (*_, weight), tolerance = case
  stack = draw(inputs.dtype, LAYERS, 3, BATCH, LENGTH, WIDTH)
  found = block_tpu.qkv(make_plan(False), jnp.int32(LAYER), inputs, gain, weight, stack)
  check(found[LAYER], qkv(*exact(inputs[LAYER], gain, weight)), tolerance)
  for other in (0, 2):
    np.testing.assert_array_equal(found[other], stack[other])


def test_the_gradients_of_queries_keys_and_values(case):
  (inputs, _), gain, (*_, weight), tolerance = case
  dqkv = draw(inputs.dtype, 3, BATCH, LENGTH, WIDTH)
  dy = draw(inputs.dtype, BATCH, LENGTH, WIDTH, size=2)
  plan = make_plan(True)
  dx, *found = block_tpu.qkv_gradients(plan, jnp.int32(LAYER), inputs, gain, weight, dqkv, dy)
  _, pull = jax.vjp(qkv, *exact(inputs[LAYER], gain, weight))
  expected, *others = pull(*exact(dqkv))
  check(dx, expected + dy.astype(jnp.float32), tolerance)
  for got, want in zip(found, others, strict=True):
    check(got, want, 2 * tolerance)


def test_kernels_declare_the_bytes_that_they_move():
  """Each operand and result once: predictions time kernels by these bytes."""
  shape = jax.ShapeDtypeStruct
  x = shape((1, BATCH, LENGTH, WIDTH), "bfloat16")
  weights = [shape(s, "bfloat16") for s in ((WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH))]
  arguments = (shape((), "int32"), x, x, shape((WIDTH,), "float32"), *weights)
  gradients = jax.make_jaxpr(lambda *a: block_tpu.finish_gradients(make_plan(True), *a))
  program = gradients(*arguments, shape(x.shape[1:], "bfloat16"))
  (call,) = [e for e in jaxprs.equations(program.jaxpr) if e.primitive.name == "pallas_call"]
  moved = sum(v.aval.size * v.aval.dtype.itemsize for v in (*call.invars, *call.outvars))
  assert call.params["cost_estimate"].bytes_accessed == moved - 4  # the layer's number


@pytest.mark.parametrize(
  "kind, width, parts, tile",
  [
    ("TPU v6 lite", 512, 1, 1024),
    ("TPU v6 lite", 1024, 1, 1024),
    ("TPU v6 lite", 1536, 2, 512),
    ("TPU7x", 512, 1, 1024),
    ("TPU7x", 1024, 4, 512),
  ],
  ids=["S on v6e", "M on v6e", "L on v6e", "S on tpu7x", "M on tpu7x"],
)
def test_the_published_models_fit_vmem(kind, width, parts, tile):
  """The compiler ends a kernel that takes more: 128 MiB a core on v6e, 64 on tpu7x."""
  vmem = hardware.vmem_bytes(kind)
  plan = block_tpu.make_plan(
    8192, width, 4 * width, jnp.dtype("bfloat16"), backward=True, vmem=vmem
  )
  assert plan is not None
  assert (plan.parts, plan.tile) == (parts, tile)
  assert plan.vmem_bytes(jnp.bfloat16, True) <= plan.vmem_limit < vmem


def test_what_doesnt_fit_vmem_is_left_to_xla():
  """iGPT-L's matrices and their gradients on tpu7x."""
  vmem = hardware.vmem_bytes("TPU7x")
  plan = block_tpu.make_plan(8192, 1536, 6144, jnp.dtype("bfloat16"), backward=True, vmem=vmem)
  assert plan is None


@pytest.mark.parametrize("rows, width", [(8192, 576 + 64), (1000, 512), (8192, 100)])
def test_what_fills_no_whole_tiles_is_left_to_xla(rows, width):
  plan = block_tpu.make_plan(rows, width, 4 * width, jnp.dtype("bfloat16"), backward=True, vmem=V6E)
  assert (plan is None) == bool(width % 128 or rows % 128)
