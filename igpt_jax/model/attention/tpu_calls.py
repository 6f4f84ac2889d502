"""The Pallas calls of the fused TPU attention kernels: their operands, and their use of VMEM.

`tpu_bodies` has the kernels' bodies, `tpu` the public functions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from igpt_jax.model.attention.tpu_bodies import backward_body, forward_body
from igpt_jax.model.attention.tpu_plan import Plan

VMEM_BUDGET = 56 * 2**20  # of the 64 MiB that v5p and TPU7x have
_VMEM_LEAST = 16 * 2**20  # the compiler's default
_VMEM_MARGIN = 4 * 2**20  # for what the compiler spills besides tiles of scores


def _spec(shape: tuple, index: Callable, layered: bool, buffers: int = 2) -> pl.BlockSpec:
  """A block of an array, or of one layer (a prefetched scalar) of a stack of arrays."""
  mode = {} if buffers == 2 else {"pipeline_mode": pl.Buffered(buffers)}
  if layered:
    return pl.BlockSpec((None, *shape), lambda b, g, layer: (layer[0], *index(b, g)), **mode)
  return pl.BlockSpec(shape, lambda b, g, *_: index(b, g), **mode)


def _block(rows: int | None, plan: Plan, buffers: int, layered: bool = False) -> pl.BlockSpec:
  """All positions of one head group, of [batch, length, width] or of `rows` such arrays."""
  shape = (1, plan.length, plan.width)
  if rows:
    return _spec((rows, *shape), lambda b, g: (0, b, 0, g), layered, buffers)
  return _spec(shape, lambda b, g: (b, 0, g), layered, buffers)


def _lse_block(plan: Plan, layered: bool = False) -> pl.BlockSpec:
  shape = (1, 1, plan.spans, plan.heads, plan.span)
  return _spec(shape, lambda b, g: (b, g, 0, 0, 0), layered)


@dataclasses.dataclass(frozen=True)
class Memory:
  """A kernel's use of VMEM.

  Attributes:
    scratch: shapes and dtypes, in the order that its body takes them.
    streamed: bytes of the blocks that are copied in and out.
    held: bytes of scores between a tile's start and its finish.
  """

  scratch: tuple
  streamed: int
  held: int

  @classmethod
  def of(cls, plan: Plan, dtype, backward: bool) -> "Memory":
    transposed = (plan.spans, plan.width, plan.span)
    rows = ((plan.heads, plan.span), jnp.float32)
    copied = ((len(plan.copied), plan.length, plan.head_dim), dtype)
    copies = [copied] * (1 + backward) if plan.copied else []
    block = plan.length * plan.width * dtype.itemsize
    # Exact float32 matmuls hold their operands in three parts.
    tile = plan.tile * 4 * (plan.lag + 1) * (1 if dtype.itemsize == 2 else 4)
    if backward:
      scratch = [(transposed, dtype)] * 3 + [((plan.spans, *rows[0]), jnp.float32)]
      scratch += [(transposed, jnp.float32)] + [(transposed[1:], jnp.float32)] * 2
      return cls((*scratch, *copies), 8 * block, 2 * plan.tile * tile)
    scratch = [(transposed, dtype), (transposed[1:], jnp.float32), rows, rows]
    return cls((*scratch, *copies), 4 * block, plan.span * tile)

  def refs(self) -> list:
    return [pltpu.VMEM(shape, dtype) for shape, dtype in self.scratch]

  def buffers_and_bytes(self) -> tuple[int, int]:
    """Buffers per streamed block (two hide its transfers), and total bytes of VMEM."""
    sizes = [math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in self.scratch]
    for buffers in (2, 1):
      needed = buffers * self.streamed + sum(sizes) + self.held + _VMEM_MARGIN
      if needed <= VMEM_BUDGET:
        break
    return buffers, needed


class Stacks(NamedTuple):
  """Residuals of all layers for the backward pass, local to one device.

  Attributes:
    qkv: [layers, 3, B, T, E].
    out: [layers, B, T, E].
    lse: log2-sum-exp2 of the rows of scores, float32 [layers, B, groups, spans, heads, span].
  """

  qkv: jax.Array
  out: jax.Array
  lse: jax.Array


def _settings(
  plan: Plan, memory: Memory, qkv: jax.Array, layer: jax.Array | None, in_specs, out_specs, products
) -> dict:
  """Arguments of `pallas_call` that both kernels share; `layer` is prefetched for the block addresses.

  `products` is the number of matrix products that every score takes part in.
  """
  *_, batch, length, width = qkv.shape
  groups = width // plan.width
  scores = batch * (width // plan.head_dim) * length * length // (2 if plan.causal else 1)
  _, needed = memory.buffers_and_bytes()
  return {
    "grid_spec": pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0 if layer is None else 1,
      grid=(batch, groups),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=memory.refs(),
    ),
    "compiler_params": pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=max(needed, _VMEM_LEAST)
    ),
    "cost_estimate": pl.CostEstimate(
      flops=2 * products * scores * plan.head_dim,
      transcendentals=scores,
      bytes_accessed=batch * groups * memory.streamed,
    ),
  }


def _forward_of_layer(plan, layer_ref, qkv_ref, out_stack_ref, lse_stack_ref, *refs):
  del layer_ref, out_stack_ref, lse_stack_ref  # for the blocks' addresses; the stacks aren't read
  forward_body(plan, qkv_ref, *refs)


def _backward_of_layer(plan, layer_ref, *refs):
  del layer_ref  # for the blocks' addresses
  backward_body(plan, *refs)


def forward(
  qkv: jax.Array,
  plan: Plan,
  interpret: bool,
  layer: jax.Array | None = None,
  stacks: Stacks | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns outputs [B, T, E] and log2-sum-exp2 [B, groups, spans, heads of a group, span].

  With stacks, it reads `layer` of stacks.qkv, and writes into the other two in place and returns them.
  """
  *_, batch, length, width = qkv.shape
  layered = layer is not None
  dtype = qkv.dtype
  memory = Memory.of(plan, dtype, backward=False)
  buffers, _ = memory.buffers_and_bytes()
  shapes = [
    jax.ShapeDtypeStruct((batch, length, width), dtype),
    jax.ShapeDtypeStruct(lse_shape(plan, batch, width), jnp.float32),
  ]
  body, aliases = functools.partial(forward_body, plan), {}
  in_specs, operands = [_block(3, plan, buffers, layered)], [qkv]
  out_specs = [_block(None, plan, buffers, layered), _lse_block(plan, layered)]
  if layer is not None and stacks is not None:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stacks[1:]]
    in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * 2  # aliased with the outputs, not read
    operands = [layer.reshape(1), *stacks]
    aliases = {2: 0, 3: 1}
    body = functools.partial(_forward_of_layer, plan)
  return pl.pallas_call(
    body,
    **_settings(plan, memory, qkv, layer, in_specs, out_specs, products=2),
    out_shape=shapes,
    input_output_aliases=aliases,
    name="fused_attention_forward",
    interpret=interpret,
  )(*operands)


def lse_shape(plan: Plan, batch: int, width: int) -> tuple[int, ...]:
  return batch, width // plan.width, plan.spans, plan.heads, plan.span


def backward(
  qkv: jax.Array,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  plan: Plan,
  interpret: bool,
  layer: jax.Array | None = None,
) -> jax.Array:
  """Returns the gradient of qkv [3, B, T, E]; with a layer, qkv, out and lse are stacks."""
  *_, batch, length, width = qkv.shape
  layered = layer is not None
  dtype = qkv.dtype
  memory = Memory.of(plan, dtype, backward=True)
  buffers, _ = memory.buffers_and_bytes()
  if not interpret:
    # Blocks are streamed from HBM behind the arithmetic. Operands that XLA places in VMEM instead
    # gain nothing, and the compiler orders accesses to them less freely: 4% slower.
    qkv, out, dout = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (qkv, out, dout))
  body = functools.partial(_backward_of_layer if layered else backward_body, plan)
  in_specs = [
    _block(3, plan, buffers, layered),
    _block(None, plan, buffers, layered),
    _lse_block(plan, layered),
    _block(None, plan, buffers),
  ]
  return pl.pallas_call(
    body,
    **_settings(plan, memory, qkv, layer, in_specs, _block(3, plan, buffers), products=5),
    out_shape=jax.ShapeDtypeStruct((3, batch, length, width), dtype),
    name="fused_attention_backward",
    interpret=interpret,
  )(*([layer.reshape(1)] if layered else []), qkv, out, lse, dout)
