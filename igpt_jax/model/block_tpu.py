"""A block's work around attention in four kernels, for TPUs with 256 × 256 matrix units.

Those multiply faster than memory delivers and than XLA's fusions do the vector work between two products.
Here a tile of positions stays in VMEM from its norm to the residual sum, with whole weights and, in the
backward pass, their gradients beside it; only the residual stream, queries, keys, values and what attention
returns are read or written. Hidden units never leave VMEM.

Everything is local to one device, and positions of all images are rows of one matrix, [rows, width].
`block_tpu_bodies` has the kernels' bodies.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from igpt_jax.model.attention.tpu_plan import LANES
from igpt_jax.model.block_tpu_bodies import (
  Plan,
  finish_backward_body,
  finish_body,
  qkv_backward_body,
  qkv_body,
)

_TILES = (1024, 512, 256, 128)
_CHUNK = 512
_MOST_PARTS = 4  # each reads the stream anew and multiplies by attention's matrix again
_VMEM_SHARE = 7 / 8  # of a core's VMEM; the compiler needs some of it, too


def make_plan(
  rows: int, width: int, inner: int, dtype, *, backward: bool, vmem: int, interpret: bool = False
) -> Plan | None:
  """Returns the plan of the kernels of one direction for a device's shapes; None: they don't take them.

  In the backward pass hidden units are divided over as many calls as let weights and gradients fit VMEM, of
  which a core has `vmem` bytes.
  """
  usable = int(_VMEM_SHARE * vmem)
  units = [n for n in (_CHUNK, _CHUNK // 2, LANES) if inner % n == 0]
  tiles = [n for n in _TILES if rows % n == 0]
  if width % LANES or not units or not tiles:
    return None
  chunk = units[0]
  for parts in range(1, _MOST_PARTS + 1 if backward else 2):
    for tile in tiles[:2]:
      plan = Plan(rows, width, inner, tile, chunk, parts, usable, interpret)
      if inner % (parts * chunk) == 0 and plan.vmem_bytes(dtype, backward) <= usable:
        return plan
  return None


class _Blocks:
  """Blocks of the kernels' operands and results, by the step of the grid and the layer."""

  def __init__(self, plan: Plan):
    self.plan = plan

  def tile(self, lead: int = 0) -> pl.BlockSpec:
    """Rows of a matrix of the stream's width, or of `lead` such matrices."""
    shape = (*([lead] if lead else []), self.plan.tile, self.plan.width)
    return pl.BlockSpec(shape, lambda i, layer: (*([0] if lead else []), i, 0))

  def layer(self, lead: int = 0, ahead: int = 0) -> pl.BlockSpec:
    """Rows of one layer's matrix, or matrices, in a stack; of the one `ahead` of it."""
    shape = (None, *([lead] if lead else []), self.plan.tile, self.plan.width)
    return pl.BlockSpec(shape, lambda i, layer: (layer[0] + ahead, *([0] if lead else []), i, 0))

  def whole(self, *shape: int, at: tuple[int, ...] | None = None) -> pl.BlockSpec:
    """A block that all steps share; it is moved once, so that one buffer does."""
    index = at or (0,) * len(shape)
    return pl.BlockSpec(shape, lambda i, layer: index, pipeline_mode=pl.Buffered(1))


_UNREAD = pl.BlockSpec(memory_space=pl.ANY)  # aliased with a result


def _call(
  plan: Plan, body, name: str, layer: jax.Array, operands: list, results: list, products: int,
  scratch: list, aliases: dict[int, int] | None = None, turns: int = 1,
):  # fmt: skip
  """Calls a kernel on all tiles.

  Args:
    plan: the kernel's.
    body: takes plan, reference to `layer`, and those of operands, results and scratch.
    name: the kernel's.
    layer: int32 [], prefetched for the blocks' addresses.
    operands: pairs of an array and its block.
    results: pairs of a ShapeDtypeStruct and its block.
    products: multiplications for every row.
    scratch: dtypes of scratch [tile, width].
    aliases: operand -> result in whose memory it is.
    turns: of the loop over hidden units in a step.
  """
  steps, streamed, once = plan.rows // plan.tile, 0, 0
  for array, spec in (*operands, *results):
    if spec.block_shape is not None:
      size = math.prod(n for n in spec.block_shape if n is not None) * array.dtype.itemsize
      if spec.pipeline_mode is None:
        streamed += size * steps
      else:
        once += size
  return pl.pallas_call(
    functools.partial(body, plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(steps,),
      in_specs=[spec for _, spec in operands],
      out_specs=[spec for _, spec in results],
      scratch_shapes=[pltpu.VMEM((plan.tile, plan.width), dtype) for dtype in scratch],
    ),
    out_shape=[shape for shape, _ in results],
    input_output_aliases={1 + at: result for at, result in (aliases or {}).items()},
    # Weights' gradients are sums over the steps, which therefore run in order.
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",), vmem_limit_bytes=plan.vmem_limit
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * plan.rows * products, transcendentals=0, bytes_accessed=streamed + once
    ),
    # Job compile counts its code as often as it runs, and hides nothing behind what is moved once, before or after.
    name=f"{name}_{steps}_{turns}_{once}",
    interpret=plan.interpret,
  )(layer.reshape(1), *(array for array, _ in operands))


def _rows(x: jax.Array, lead: int) -> jax.Array:
  """[..., B, T, D] -> [..., B·T, D], behind `lead` axes."""
  return x.reshape(*x.shape[:lead], -1, x.shape[-1])


def _like(x: jax.Array, dtype=None) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def qkv(
  plan: Plan,
  layer: jax.Array,
  inputs: jax.Array,
  gain: jax.Array,
  weight: jax.Array,
  stack: jax.Array,
) -> jax.Array:
  """Writes one layer's queries, keys and values into their stack, in place, and returns it.

  Args:
    plan: the kernels'.
    layer: int32 [].
    inputs: stack of the stream [L + 1, B, T, D].
    gain: of the norm, [D].
    weight: [3, D, D], whole, in the stream's dtype.
    stack: [L, 3, B, T, D].
  """
  blocks, flat = _Blocks(plan), _rows(stack, 2)
  (done,) = _call(
    plan, qkv_body, "block_qkv", layer,
    [(_rows(inputs, 1), blocks.layer()), (gain[None], blocks.whole(1, plan.width)),
     (weight, blocks.whole(*weight.shape)), (flat, _UNREAD)],
    [(_like(flat), blocks.layer(3))],
    weight.size, [inputs.dtype], {3: 0},
  )  # fmt: skip
  return done.reshape(stack.shape)


def finish(
  plan: Plan, layer: jax.Array, inputs: jax.Array, heads: jax.Array, gain: jax.Array,
  attn: jax.Array, fc: jax.Array, proj: jax.Array,
) -> jax.Array:  # fmt: skip
  """Writes the next layer's input into its stack, in place, and returns it.

  Args:
    plan: the kernels'.
    layer: int32 [].
    inputs: stack of the stream [L + 1, B, T, D].
    heads: stack of what attention returned, [L, B, T, D].
    gain: of the MLP's norm, [D].
    attn, fc, proj: whole weights [D, D], [D, F], [F, D], in the stream's dtype.
  """
  blocks, flat = _Blocks(plan), _rows(inputs, 1)
  weights = [(w, blocks.whole(*w.shape)) for w in (attn, gain[None], fc, proj)]
  (done,) = _call(
    plan, finish_body, "block_finish", layer,
    [(flat, blocks.layer()), (_rows(heads, 1), blocks.layer()), *weights],
    [(_like(flat), blocks.layer(ahead=1))],
    attn.size + fc.size + proj.size, [inputs.dtype, jnp.float32], {0: 0}, plan.turns,
  )  # fmt: skip
  return done.reshape(inputs.shape)


def finish_gradients(
  plan: Plan, layer: jax.Array, inputs: jax.Array, heads: jax.Array, gain: jax.Array,
  attn: jax.Array, fc: jax.Array, proj: jax.Array, dy: jax.Array,
) -> tuple[jax.Array, ...]:  # fmt: skip
  """Returns the gradients of what `finish` computes, from that of the block's output.

  Args:
    plan, layer, inputs, heads, gain, attn, fc, proj: as for `finish`.
    dy: gradient of the block's output [B, T, D].

  Returns:
    Gradients of the block's input, but for what comes through attention, and of attention's output,
    [B, T, D] in the stream's dtype; of gain, attn, fc and proj, float32, this device's summands.
  """
  blocks, flat = _Blocks(plan), _rows(dy, 0)
  part = plan.inner // plan.parts
  so_far: list = []
  for at in range(plan.parts):
    fc_block, proj_block = (
      blocks.whole(plan.width, part, at=(0, at)), blocks.whole(part, plan.width, at=(at, 0)),
    )  # fmt: skip
    first, last = at == 0, at == plan.parts - 1
    # Kernels that differ have names that do: a forecast finds a kernel's code by its name.
    role = "last" if last else "first" if first else "middle"
    operands = [
      (_rows(inputs, 1), blocks.layer()), (_rows(heads, 1), blocks.layer()),
      (attn, blocks.whole(*attn.shape)), (gain[None], blocks.whole(1, plan.width)),
      (fc, fc_block), (proj, proj_block), (flat, blocks.tile()), *so_far,
    ]  # fmt: skip
    results = [(_like(fc, jnp.float32), fc_block), (_like(proj, jnp.float32), proj_block)]
    if last:
      results += [
        (_like(flat), blocks.tile()), (_like(flat), blocks.tile()),
        (_like(attn, jnp.float32), blocks.whole(*attn.shape)),
        (_like(gain[None], jnp.float32), blocks.whole(1, plan.width)),
      ]  # fmt: skip
    else:
      results.append((_like(flat, jnp.float32), blocks.tile()))
    products = attn.size + 5 * (fc.size // plan.parts) + (2 * attn.size if last else 0)
    done = _call(
      plan, functools.partial(finish_backward_body, first=first, last=last),
      f"block_finish_backward_{role}", layer, operands, results, products,
      [dy.dtype, jnp.float32], {} if first else {8: 0, 9: 1}, plan.turns,
    )  # fmt: skip
    so_far = [(done[2], blocks.tile()), (done[0], _UNREAD), (done[1], _UNREAD)]
  dfc, dproj, dx, dheads, dattn, dgain = done
  return dx.reshape(dy.shape), dheads.reshape(dy.shape), dgain[0], dattn, dfc, dproj


def qkv_gradients(
  plan: Plan, layer: jax.Array, inputs: jax.Array, gain: jax.Array, weight: jax.Array,
  dqkv: jax.Array, dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """Returns the gradients of what `qkv` computes, and of the residual sum beside it.

  Args:
    plan, layer, inputs, gain, weight: as for `qkv`.
    dqkv: gradient of queries, keys and values, [3, B, T, D].
    dy: gradient of the same input by other ways, [B, T, D].

  Returns:
    The gradient of the block's input [B, T, D], in its dtype; of gain and weight, float32, this
    device's summands.
  """
  blocks, flat = _Blocks(plan), _rows(dy, 0)
  row, matrices = blocks.whole(1, plan.width), blocks.whole(*weight.shape)
  dx, dweight, dgain = _call(
    plan, qkv_backward_body, "block_qkv_backward", layer,
    [(_rows(inputs, 1), blocks.layer()), (gain[None], row), (weight, matrices),
     (_rows(dqkv, 1), blocks.tile(3)), (flat, blocks.tile())],
    [(_like(flat), blocks.tile()), (_like(weight, jnp.float32), matrices),
     (_like(gain[None], jnp.float32), row)],
    2 * weight.size, [],
  )  # fmt: skip
  return dx.reshape(dy.shape), dgain[0], dweight
