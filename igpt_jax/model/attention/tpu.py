"""Fused attention for TPUs, forward and backward, made for pixels: short rows, no masks but one.

Reads queries, keys and values where the qkv matmul wrote them and writes outputs where the output
projection reads them, so no transpose or padding surrounds the kernel. `tpu_bodies` has the kernels'
bodies; this module has the supported shapes, how the work is cut, and the gradient.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.model.attention import tpu_calls as calls
from igpt_jax.model.attention.tpu_calls import VMEM_BUDGET, Memory, Stacks
from igpt_jax.model.attention.tpu_plan import LANES, Plan
from igpt_jax.parallel import hardware

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
MAX_LENGTH = 4096
OUTPUT_NAME, LSE_NAME = "attention_out", "attention_lse"
_ONE_SPAN = 1024  # positions up to which a whole sequence is straight code
_SPAN_CODE = 3072  # heads × positions of a span above which compiling takes minutes
_LARGEST_ODD_GROUP = 512


def _group(n_head: int, head_dim: int) -> int | None:
  """Heads per group: the fewest that fill whole 128-lane vectors, or all if those are few."""
  heads = LANES // math.gcd(head_dim, LANES)
  if n_head % heads == 0:
    return heads
  return n_head if n_head * head_dim <= _LARGEST_ODD_GROUP else None


def _span(length: int, heads: int, dtype) -> int | None:
  """Positions that are unrolled into straight code: all, or the most that divide the length."""
  half = dtype.itemsize == 2
  code = _SPAN_CODE if half else _SPAN_CODE // 4  # an exact float32 matmul takes six bfloat16 ones
  straight = _ONE_SPAN if half else code // heads
  if length <= straight:
    return length
  most = max(LANES, min(straight, code // heads))
  spans = [n for n in range(LANES, most + 1, LANES) if length % n == 0]
  return spans[-1] if spans else None


def supports(n_head: int, head_dim: int, length: int, dtype) -> str | None:
  """The reason why `fused_attention` doesn't take these shapes (local to one device), or None."""
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    return f"dtype {jnp.dtype(dtype).name}: expected bfloat16 or float32"
  if head_dim not in HEAD_DIMS:
    return f"head dim {head_dim}: expected one of {', '.join(map(str, HEAD_DIMS))}"
  group = _group(n_head, head_dim)
  if group is None:
    heads = LANES // math.gcd(head_dim, LANES)
    return (
      f"{n_head} heads of {head_dim} on one device: expected a multiple of {heads}, or at most "
      f"{_LARGEST_ODD_GROUP // head_dim} heads"
    )
  if not 16 <= length <= MAX_LENGTH or length % 16:
    return f"length {length}: expected a multiple of 16 from 16 to {MAX_LENGTH}"
  dtype = jnp.dtype(dtype)
  if _span(length, group, dtype) is None:
    return f"length {length}: expected a multiple of {LANES} for so long a sequence of {dtype.name}"
  plan = _plan(n_head, head_dim, length, dtype, causal=True, backward=True, wide=False)
  _, needed = Memory.of(plan, dtype, backward=True).buffers_and_bytes()
  if needed > VMEM_BUDGET:
    return (
      f"length {length} with {plan.heads} heads of {head_dim} in {dtype.name}: "
      f"{needed >> 20} MiB of VMEM, expected at most {VMEM_BUDGET >> 20}"
    )
  return None


def wide_matrix_unit() -> bool:
  """True if programs are for a TPU with 256 × 256 matrix units (v6e on), not 128 × 128.

  Affects speed alone, never the result.
  """
  return hardware.has_wide_matrix_unit(hardware.target().device_kind)


def make_plan(
  n_head: int, head_dim: int, length: int, dtype, *, causal: bool, backward: bool, wide: bool
) -> Plan:
  """Returns the kernel's plan for these shapes; `wide` as in `wide_matrix_unit`.

  Raises:
    ValueError: `supports` refuses them.
  """
  if refusal := supports(n_head, head_dim, length, dtype):
    raise ValueError(f"fused_attention: {refusal}")
  return _plan(
    n_head, head_dim, length, jnp.dtype(dtype), causal=causal, backward=backward, wide=wide
  )


def _plan(
  n_head: int, head_dim: int, length: int, dtype, *, causal: bool, backward: bool, wide: bool
) -> Plan:
  heads = _group(n_head, head_dim)
  span = heads and _span(length, heads, dtype)
  assert heads and span, "`supports` refuses what has none"
  return Plan(
    head_dim=head_dim,
    heads=heads,
    length=length,
    span=span,
    causal=causal,
    tile=256 if wide or backward else 128,
    diagonal=256 if wide else 128,
    lag=2 if wide else 3,
    transposed_queries=head_dim < LANES,
    aligned=not wide,
  )


@dataclasses.dataclass(frozen=True)
class _Plans:
  forward: Plan
  backward: Plan
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plans: _Plans, qkv: jax.Array) -> jax.Array:
  return calls.forward(qkv, plans.forward, plans.interpret)[0]


def _attention_fwd(plans: _Plans, qkv: jax.Array):
  out, lse = calls.forward(qkv, plans.forward, plans.interpret)
  out, lse = checkpoint_name(out, OUTPUT_NAME), checkpoint_name(lse, LSE_NAME)
  return out, (qkv, out, lse)


def _attention_bwd(plans: _Plans, residuals, dout: jax.Array):
  qkv, out, lse = residuals
  return (calls.backward(qkv, out, lse, dout, plans.backward, plans.interpret),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def fused_attention(
  qkv_3xBxTxE: jax.Array, *, n_head: int, causal: bool, interpret: bool = False
) -> jax.Array:
  """softmax(q kᵀ / sqrt(head_dim)) v for every head, on a TPU.

  Everything is local to one device: under a mesh, call it inside `jax.shard_map` (check_vma=False)
  with batch and heads split and n_head this device's. Matmuls take the input's dtype and sum in
  float32; scores and softmax are float32. With a remat policy that saves the names OUTPUT_NAME and
  LSE_NAME (and qkv), the backward pass doesn't run the forward kernel again.

  Args:
    qkv_3xBxTxE: queries, keys and values in bfloat16 or float32, E = n_head * head_dim.
    n_head: number of heads in it.
    causal: position t sees positions 0..t; else all of them.
    interpret: run on the CPU, slowly, for tests.

  Returns:
    [B, T, E] in the input's dtype; differentiable once.

  Raises:
    ValueError: shapes or dtype that `supports` refuses.
  """
  return _attention(_plans(qkv_3xBxTxE, n_head, causal, interpret), qkv_3xBxTxE)


def _plans(qkv: jax.Array, n_head: int, causal: bool, interpret: bool) -> _Plans:
  *_, length, width = qkv.shape
  make = functools.partial(
    make_plan, n_head, width // n_head, length, qkv.dtype, causal=causal, wide=wide_matrix_unit()
  )
  return _Plans(make(backward=False), make(backward=True), interpret)


def forward_layer(
  layer: jax.Array, stacks: Stacks, *, n_head: int, causal: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Computes one layer's attention from `stacks.qkv`; returns stacks.out and .lse, updated in place.

  Like `backward_layer`, it avoids the copies between stacks and operands that a scan over layers
  makes otherwise. Local to one device; not differentiable.

  Args:
    layer: int32 [].
    stacks: the residuals of all layers.
    n_head, causal, interpret: as for `fused_attention`.
  """
  plan = _plans(stacks.qkv, n_head, causal, interpret).forward
  return calls.forward(stacks.qkv, plan, interpret, layer, stacks)


def backward_layer(
  layer: jax.Array,
  stacks: Stacks,
  dout: jax.Array,
  *,
  n_head: int,
  causal: bool,
  interpret: bool = False,
) -> jax.Array:
  """Returns the gradient of one layer's qkv [3, B, T, E] from that of its output [B, T, E]."""
  plan = _plans(stacks.qkv, n_head, causal, interpret).backward
  return calls.backward(*stacks, dout, plan, interpret, layer)


def lse_shape(
  qkv_shape: tuple[int, ...], dtype, *, n_head: int, head_dim: int, causal: bool
) -> tuple[int, ...]:
  """Shape of one layer of `Stacks.lse` for qkv [3, B, T, E].

  `n_head` is that of one device; B and E may be those of all devices together.
  """
  _, batch, length, width = qkv_shape
  plan = make_plan(
    n_head, head_dim, length, dtype, causal=causal, backward=False, wide=wide_matrix_unit()
  )
  return calls.lse_shape(plan, batch, width)
