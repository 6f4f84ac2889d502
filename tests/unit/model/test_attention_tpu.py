"""The fused TPU kernels against plain attention, in Pallas' interpreter, and through libtpu."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from igpt_jax.model.attention import tpu
from igpt_jax.model.attention.tpu import LSE_NAME, OUTPUT_NAME, fused_attention, supports
from support import jaxprs, tiny
from support.tpu_job import NEEDS_LIBTPU

fused = functools.partial(fused_attention, interpret=True)

# In jax 0.11 XLA leaves products of bfloat16 to YNNPACK on a CPU, and has no way to compute those that
# it doesn't take.
EVERY_PRODUCT = (
  {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.__version_info__ >= (0, 11) else None
)


def plain(qkv, n_head, causal):
  """Attention as its definition has it, float32 [B, T, E]."""
  _, batch, length, width = qkv.shape
  split = qkv.astype(jnp.float32).reshape(3, batch, length, n_head, width // n_head)
  q, k, v = split
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / np.sqrt(width // n_head)
  if causal:
    scores = jnp.where(np.tril(np.ones((length, length), bool)), scores, -jnp.inf)
  weights = jax.nn.softmax(scores)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest").reshape(
    batch, length, width
  )


def draw(n_head, head_dim, length, dtype, batch=1, size=1.5):
  rng = np.random.default_rng(n_head * length + head_dim)
  qkv = size * rng.standard_normal((3, batch, length, n_head * head_dim))
  dout = rng.standard_normal((batch, length, n_head * head_dim))
  return jnp.asarray(qkv, dtype), jnp.asarray(dout, dtype)


def relative(got, want):
  """‖got - want‖ / ‖want‖."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def check(n_head, head_dim, length, causal, dtype, batch=1, size=1.5, tolerance=None):
  qkv, dout = draw(n_head, head_dim, length, dtype, batch, size)

  @functools.partial(jax.jit, compiler_options=EVERY_PRODUCT)
  def both_ways(qkv, dout):
    out, pull = jax.vjp(functools.partial(fused, n_head=n_head, causal=causal), qkv)
    return out, *pull(dout)

  out, dqkv = both_ways(qkv, dout)
  want, want_pull = jax.vjp(
    functools.partial(plain, n_head=n_head, causal=causal), qkv.astype(jnp.float32)
  )
  (want_dqkv,) = want_pull(dout.astype(jnp.float32))
  assert out.dtype == dqkv.dtype == qkv.dtype
  # Inputs are exact in both; what differs is rounding inside: of float32 sums, or of softmax and
  # score gradients to bfloat16 (2^-9 each) before they meet the matrix unit.
  tolerance = tolerance or (5e-6 if qkv.dtype == jnp.float32 else 8e-3)
  assert relative(out, want) < tolerance
  for name, got, expected in zip("qkv", dqkv, want_dqkv, strict=True):
    assert relative(got, expected) < tolerance, f"gradient of {name}"


@pytest.fixture(params=[False, True], ids=["mxu128", "mxu256"])
def matrix_unit(request, monkeypatch):
  monkeypatch.setattr(tpu, "wide_matrix_unit", lambda: request.param)


@pytest.fixture
def small_tiles(monkeypatch):
  """Tiles of 64 in spans of 128: every loop of a long sequence on a short one."""
  make_plan = tpu.make_plan

  def small(*args, **kwargs):
    plan = make_plan(*args, **kwargs)
    span = 128 if plan.length % 128 == 0 else plan.length
    return dataclasses.replace(plan, tile=64, span=span, diagonal=32 if plan.aligned else 64)

  monkeypatch.setattr(tpu, "make_plan", small)


@pytest.mark.parametrize(
  ("n_head", "head_dim", "length", "causal"),
  [
    (1, 128, 96, True),
    (3, 64, 80, False),  # an odd number of heads
  ],
)
def test_equals_plain_attention(n_head, head_dim, length, causal, small_tiles):
  check(n_head, head_dim, length, causal, jnp.float32)


def test_equals_plain_attention_where_heads_straddle_lanes(matrix_unit, small_tiles):
  check(4, 96, 96, True, jnp.float32)


@pytest.mark.parametrize(
  ("n_head", "head_dim", "causal"), [(2, 64, True), (2, 96, False), (1, 192, True)]
)
def test_equals_plain_attention_in_bfloat16(n_head, head_dim, causal, small_tiles):
  check(n_head, head_dim, 112, causal, jnp.bfloat16)


@pytest.mark.parametrize(
  ("n_head", "head_dim", "causal"), [(2, 64, True), (2, 96, False), (1, 128, True)]
)
def test_long_sequences_in_spans(n_head, head_dim, causal, small_tiles):
  check(n_head, head_dim, 256, causal, jnp.float32)


def test_default_tiles_and_several_groups_and_batch_rows():
  check(2, 128, 272, True, jnp.float32, batch=2)


AT_SIZE = [
  (2, 64, 1024, True),
  (4, 96, 1024, True),
  (1, 128, 1024, False),
  (4, 32, 256, True),
  (1, 256, 256, True),
  (2, 192, 576, True),
  (4, 96, 2304, True),
  (1, 128, 2304, False),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n_head", "head_dim", "length", "causal"), AT_SIZE)
def test_equals_plain_attention_at_size(n_head, head_dim, length, causal, dtype, matrix_unit):
  if reason := supports(n_head, head_dim, length, dtype):
    assert dtype == "float32" and (head_dim, length) in ((192, 576), (96, 2304)), reason
    with pytest.raises(ValueError, match="fused_attention"):
      check(n_head, head_dim, length, causal, dtype)
    return
  check(n_head, head_dim, length, causal, dtype)


@pytest.mark.parametrize("length", [64, 256])
def test_large_scores_neither_overflow_nor_vanish(length, small_tiles):
  # Scores of a few hundred, where exp overflows float32 at 89 and 2^-17 of a score is its rounding.
  check(1, 64, length, True, jnp.float32, size=5, tolerance=1e-4)


def test_no_pixel_sees_later_ones(small_tiles):
  n_head, at = 1, 50
  qkv, _ = draw(n_head, 64, 96, jnp.float32)
  dqkv = jax.grad(lambda x: fused(x, n_head=n_head, causal=True)[:, :at].sum())(qkv)
  assert np.all(np.asarray(dqkv)[:, :, at:] == 0)
  assert np.all(np.any(np.asarray(dqkv)[1:, :, :at] != 0, axis=-1))


def kernels_used(jaxpr):
  """Names of the Pallas kernels in a jaxpr, and in those within it, whose results are used."""
  used = {id(v) for e in jaxpr.eqns for v in e.invars} | {id(v) for v in jaxpr.outvars}
  names = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      if any(id(v) in used for v in equation.outvars):
        names.append(equation.params["name"])
      continue
    for inner in jaxprs.within(equation):
      names += kernels_used(inner)
  return names


def test_saved_names_spare_the_backward_pass_the_forward_kernel():
  qkv, _ = draw(2, 64, 64, jnp.float32)

  def kernels(policy):
    attend = jax.checkpoint(functools.partial(fused, n_head=2, causal=True), policy=policy)
    return kernels_used(jax.make_jaxpr(jax.grad(lambda x: attend(x).sum()))(qkv).jaxpr)

  forward, backward = "fused_attention_forward", "fused_attention_backward"
  names = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME, LSE_NAME)
  assert kernels(names) == [forward, backward]
  assert kernels(jax.checkpoint_policies.nothing_saveable) == [forward, forward, backward]


@pytest.mark.parametrize(
  "n_head, head_dim, length, dtype",
  [(2, 64, 64, "bfloat16"), (3, 128, 64, "float32"), (8, 96, 4096, "bfloat16")],
)
def test_kernels_declare_the_bytes_that_they_move(n_head, head_dim, length, dtype):
  """Queries, keys, values, outputs and their gradients: predictions time them by these bytes."""
  shape = (3, 5, length, n_head * head_dim)
  qkv = jax.ShapeDtypeStruct(shape, dtype)
  attend = functools.partial(fused, n_head=n_head, causal=True)
  program = jax.make_jaxpr(jax.grad(lambda x: attend(x).astype(jnp.float32).sum()))(qkv)
  calls = [e for e in jaxprs.equations(program.jaxpr) if e.primitive.name == "pallas_call"]
  assert len(calls) == 2
  for call in calls:
    moved = sum(v.aval.size * v.aval.dtype.itemsize for v in (*call.invars, *call.outvars))
    declared = call.params["cost_estimate"].bytes_accessed
    # The rows' log-sum-exp, the only other thing that is moved, is left out.
    assert 0.99 * moved < declared < moved


@pytest.mark.parametrize(
  ("n_head", "head_dim", "length", "dtype", "reason"),
  [
    (8, 80, 1024, "bfloat16", "head dim 80"),
    (9, 64, 1024, "bfloat16", "9 heads of 64"),
    (6, 96, 1024, "bfloat16", "6 heads of 96"),
    (8, 64, 1000, "bfloat16", "length 1000"),
    (8, 64, 1040, "bfloat16", "length 1040"),
    (8, 64, 8192, "bfloat16", "length 8192"),
    (8, 64, 1024, "float16", "dtype float16"),
    (8, 192, 4096, "float32", "length 4096 with 2 heads of 192 in float32"),
  ],
)
def test_what_is_refused(n_head, head_dim, length, dtype, reason):
  refusal = supports(n_head, head_dim, length, dtype)
  assert refusal.startswith(reason)
  with pytest.raises(ValueError, match=reason):
    qkv = jax.ShapeDtypeStruct((3, 1, length, n_head * head_dim), dtype)
    jax.eval_shape(functools.partial(fused, n_head=n_head, causal=True), qkv)


def test_published_shapes_are_supported():
  for n_head, head_dim in [(8, 64), (8, 128), (16, 96), (16, 192), (24, 128)]:
    for length in (64, 256, 1024, 2304, 4096):
      for tensor in (1, 2, 4, 8):
        assert supports(n_head // tensor, head_dim, length, "bfloat16") is None


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@functools.cache
def topology_mesh(name):
  grid = np.array(tiny.tpu_devices(name)).reshape(-1, 2)
  return Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@NEEDS_LIBTPU
@pytest.mark.tpu_compile
@pytest.mark.parametrize(
  ("n_head", "head_dim", "length", "causal"),
  [
    (8, 64, 1024, True),
    (8, 128, 1024, True),
    (16, 96, 1024, True),
    (16, 96, 1024, False),
    (8, 192, 1024, True),
    (16, 96, 2304, True),
    (24, 128, 4096, True),
    (24, 128, 4096, False),
    (2, 64, 64, True),
    (2, 96, 576, True),
    (8, 64, 784, False),
  ],
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_for_tpu(topology, n_head, head_dim, length, causal):
  mesh = topology_mesh(topology)
  spec = PartitionSpec(None, "data", None, "tensor")
  local = functools.partial(fused_attention, n_head=n_head // 2, causal=causal)

  def loss(qkv):
    split = jax.shard_map(local, in_specs=spec, out_specs=PartitionSpec(*spec[1:]), check_vma=False)
    return split(qkv).astype(jnp.float32).sum()

  sharding = NamedSharding(mesh, spec)
  shape = (3, 2 * mesh.shape["data"], length, n_head * head_dim)
  qkv = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss), out_shardings=sharding).lower(qkv).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2
  assert " transpose(" not in text and " pad(" not in text
