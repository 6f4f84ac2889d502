"""Plan and bodies of the kernels around attention (`block_tpu`): a tile of rows at a time, rows being positions.

Bodies take the references of operands, results and scratch in the order of their calls.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from igpt_jax.model import layers
from igpt_jax.model.attention.tpu_plan import LANES, ROWS_BY_COLUMNS, ROWS_BY_ROWS, matmul

COLUMNS_BY_COLUMNS = (((0,), (0,)), ((), ()))  # aᵀ b


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static configuration of the kernels of a block.

  Attributes:
    rows: positions of all images of a device.
    width, inner: channels of the stream, and hidden units.
    tile: rows that are worked on at a time.
    chunk: hidden units (or channels) that are worked on at a time.
    parts: number of calls that the hidden units are divided over in the backward pass.
    vmem_limit: bytes of VMEM that a kernel may take.
    interpret: run on the CPU, for tests.
  """

  rows: int
  width: int
  inner: int
  tile: int
  chunk: int
  parts: int
  vmem_limit: int
  interpret: bool

  @property
  def turns(self) -> int:
    """Turns of the loop over hidden units, for a tile."""
    return self.inner // self.parts // self.chunk

  def vmem_bytes(self, dtype, backward: bool) -> int:
    """Bytes of VMEM that the larger of one direction's two kernels takes, by arithmetic."""
    item, width = jnp.dtype(dtype).itemsize, self.width

    def needed(weights: int, streams: int, so_far: int = 0) -> int:
      # Operands and results have two buffers each, so that their transfers are hidden.
      worked_on = item + 4 + 3 * 4
      row = width * (2 * streams * item + so_far + worked_on) + self.chunk * 4 * 4
      return weights * (item + (4 if backward else 0)) + self.tile * row

    finish = needed(
      width * (width + 2 * self.inner // self.parts), 5 if backward else 3, 16 if self.parts > 1 else 0
    )  # fmt: skip
    return max(finish, needed(3 * width * width, 6 if backward else 4))


def _dot(a, b, form=ROWS_BY_COLUMNS):
  return matmul(a, b, form)


def _slope(dtype) -> float:
  """1.702 of `layers.activation`, as it is rounded there."""
  return float(np.asarray(1.702, dtype))


def _sigmoid(hidden, dtype):
  # A tanh takes half of the vector unit's work for an exponential and a reciprocal.
  return 0.5 + 0.5 * jnp.tanh(0.5 * _slope(dtype) * hidden)


def _chunk(at, size: int):
  return pl.ds(pl.multiple_of(at * size, LANES), size)


def _middle(x_ref, heads_ref, attn_ref):
  """The stream between attention and MLP."""
  attended = _dot(heads_ref[...], attn_ref[...])
  return (x_ref[...].astype(jnp.float32) + attended).astype(x_ref.dtype)


def finish_body(
  plan: Plan,
  layer_ref,
  x_ref,
  heads_ref,
  attn_ref,
  gain_ref,
  fc_ref,
  proj_ref,
  y_ref,
  normed_ref,
  sum_ref,
):
  dtype = x_ref.dtype
  middle = _middle(x_ref, heads_ref, attn_ref)
  normed_ref[...] = layers.scaled_norm(middle, layers.inverse_rms(middle), gain_ref[...])
  sum_ref[...] = middle.astype(jnp.float32)

  @pl.loop(0, plan.turns)
  def _(at):
    units = _chunk(at, plan.chunk)
    hidden = _dot(normed_ref[...], fc_ref[:, units])
    activated = (hidden * _sigmoid(hidden, dtype)).astype(dtype)
    sum_ref[...] += _dot(activated, proj_ref[units, :])

  y_ref[...] = sum_ref[...].astype(dtype)


def _norm_gradient(x, gain, dnormed):
  """Returns the gradient of the norm's input, and the tile's part of the gain's, float32."""
  dx, dgain = layers.norm_gradients(x, layers.inverse_rms(x), gain, dnormed)
  return dx, jnp.sum(dgain, axis=0, keepdims=True)


def finish_backward_body(plan: Plan, layer_ref, *refs, first: bool, last: bool):
  x_ref, heads_ref, attn_ref, gain_ref, fc_ref, proj_ref, dy_ref, *refs = refs
  if not first:
    so_far_ref, refs = refs[0], refs[3:]  # the other two are where the outputs are
  dfc_ref, dproj_ref, *results, normed_ref, dnormed_ref = refs
  summed = [dfc_ref, dproj_ref, *results[2:]]
  dtype = x_ref.dtype

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in summed:
      ref[...] = jnp.zeros_like(ref)

  middle = _middle(x_ref, heads_ref, attn_ref)
  normed_ref[...] = layers.scaled_norm(middle, layers.inverse_rms(middle), gain_ref[...])
  dnormed_ref[...] = jnp.zeros_like(dnormed_ref) if first else so_far_ref[...]

  @pl.loop(0, plan.turns)
  def _(at):
    units = _chunk(at, plan.chunk)
    normed, dy, fc = normed_ref[...], dy_ref[...], fc_ref[:, units]
    hidden = _dot(normed, fc)
    dactivated = _dot(dy, proj_ref[units, :], ROWS_BY_ROWS)
    sigmoid = _sigmoid(hidden, dtype)
    activated = hidden * sigmoid
    dproj_ref[units, :] += _dot(activated.astype(dtype), dy, COLUMNS_BY_COLUMNS)
    slope = sigmoid + _slope(dtype) * activated * (1 - sigmoid)
    dhidden = (dactivated * slope).astype(dtype)
    dfc_ref[:, units] += _dot(normed, dhidden, COLUMNS_BY_COLUMNS)
    dnormed_ref[...] += _dot(dhidden, fc, ROWS_BY_ROWS)

  if not last:
    results[0][...] = dnormed_ref[...]
    return
  dx_ref, dheads_ref, dattn_ref, dgain_ref = results
  dmiddle, dgain = _norm_gradient(middle, gain_ref[...], dnormed_ref[...])
  dx = (dy_ref[...].astype(jnp.float32) + dmiddle).astype(dtype)
  dgain_ref[...] += dgain
  dx_ref[...] = dx
  dheads_ref[...] = _dot(dx, attn_ref[...], ROWS_BY_ROWS).astype(dtype)
  dattn_ref[...] += _dot(heads_ref[...], dx, COLUMNS_BY_COLUMNS)


def qkv_body(plan: Plan, layer_ref, x_ref, gain_ref, weight_ref, *refs):
  qkv_ref, normed_ref = refs[1:]  # the first is where the result is
  x = x_ref[...]
  normed_ref[...] = layers.scaled_norm(x, layers.inverse_rms(x), gain_ref[...])
  for which in range(3):
    qkv_ref[which] = _dot(normed_ref[...], weight_ref[which]).astype(qkv_ref.dtype)


def qkv_backward_body(plan: Plan, layer_ref, x_ref, gain_ref, weight_ref, dqkv_ref, dy_ref, *refs):
  dx_ref, dweight_ref, dgain_ref = refs
  x = x_ref[...]
  normed = layers.scaled_norm(x, layers.inverse_rms(x), gain_ref[...])

  @pl.when(pl.program_id(0) == 0)
  def _():
    dweight_ref[...] = jnp.zeros_like(dweight_ref)
    dgain_ref[...] = jnp.zeros_like(dgain_ref)

  dnormed: Any = 0.0
  for which in range(3):
    dqkv = dqkv_ref[which]
    dweight_ref[which] += _dot(normed, dqkv, COLUMNS_BY_COLUMNS)
    dnormed = dnormed + _dot(dqkv, weight_ref[which], ROWS_BY_ROWS)
  dinput, dgain = _norm_gradient(x, gain_ref[...], dnormed)
  dx_ref[...] = (dy_ref[...].astype(jnp.float32) + dinput).astype(x.dtype)
  dgain_ref[...] += dgain
