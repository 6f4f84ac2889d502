"""A block's kernels around attention (`block_tpu`) under a mesh: weights gathered, their gradients summed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from igpt_jax.model import block_tpu, layers
from igpt_jax.model.attention import tpu
from igpt_jax.model.block_tpu_bodies import Plan
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, sharding

_NORM = ("norm",)
_STREAMS = (None, *layers.STREAM)  # logical axes of a stack
_AXES = {
  "attn": layers.FROM_HEADS.weight_axes,
  "fc": layers.TO_INNER.weight_axes,
  "proj": layers.FROM_INNER.weight_axes,
  "qkv": layers.TO_QKV.weight_axes,
}


@dataclasses.dataclass(frozen=True)
class AroundAttention:
  """The kernels of one model and mesh; arguments are those of `block_tpu`'s functions, of all devices.

  Attributes:
    dtype: the stream's.
    forward, backward: the kernels' plans.
  """

  dtype: Any
  forward: Plan
  backward: Plan

  def qkv(self, layer: jax.Array, block: dict, inputs: jax.Array, stack: jax.Array) -> jax.Array:
    """Returns the stack [L, 3, B, T, E] with a layer's queries, keys and values."""
    place = (None, *layers.QKV)
    axes = ((), _STREAMS, _NORM, sharding.whole_axes(_AXES["qkv"]), place)
    call = sharding.per_device(lambda *x: block_tpu.qkv(self.forward, *x), axes, place)
    return call(layer, inputs, block["ln_1"]["g"], self._whole(block, "qkv"), stack)

  def finish(self, layer: jax.Array, block: dict, inputs: jax.Array, heads: jax.Array) -> jax.Array:
    """Returns the stack of inputs [L + 1, B, T, D] with that of the next layer."""
    call = sharding.per_device(
      lambda *x: block_tpu.finish(self.forward, *x), self._finish_axes(), _STREAMS
    )
    return call(layer, inputs, heads, *self._finish_parameters(block))

  def finish_gradients(
    self, layer: jax.Array, block: dict, inputs: jax.Array, heads: jax.Array, dy: jax.Array
  ) -> tuple[jax.Array, jax.Array, dict]:
    """Returns gradients of the block's input, of attention's output and, as in `block`, of the parameters."""
    parameters = [_NORM, *(_AXES[name] for name in ("attn", "fc", "proj"))]
    call = sharding.per_device(
      self._summed(block_tpu.finish_gradients, 2, parameters),
      (*self._finish_axes(), layers.STREAM),
      (layers.STREAM, layers.HEADS, *parameters),
    )
    dx, dheads, dgain, dattn, dfc, dproj = call(
      layer, inputs, heads, *self._finish_parameters(block), dy
    )
    return dx, dheads, {
      "attn": {"proj": dattn}, "ln_2": {"g": dgain}, "mlp": {"fc": dfc, "proj": dproj}
    }  # fmt: skip

  def qkv_gradients(
    self, layer: jax.Array, block: dict, inputs: jax.Array, dqkv: jax.Array, dy: jax.Array
  ) -> tuple[jax.Array, dict]:
    """Returns gradients of the block's input and, as in `block`, of the parameters."""
    parameters = [_NORM, _AXES["qkv"]]
    call = sharding.per_device(
      self._summed(block_tpu.qkv_gradients, 1, parameters),
      ((), _STREAMS, _NORM, sharding.whole_axes(_AXES["qkv"]), layers.QKV, layers.STREAM),
      (layers.STREAM, *parameters),
    )
    weight = self._whole(block, "qkv")
    dx, dgain, dweight = call(layer, inputs, block["ln_1"]["g"], weight, dqkv, dy)
    return dx, {"ln_1": {"g": dgain}, "attn": {"qkv": dweight}}

  def _summed(self, gradients: Callable, n: int, axes: list) -> Callable:
    """`gradients` with a device's part of the sum for every result after the first n."""
    sums = [sharding.sum_of_shares(weight_axes) for weight_axes in axes]

    def summed(*arguments):
      results = gradients(self.backward, *arguments)
      return *results[:n], *(total(x) for total, x in zip(sums, results[n:], strict=True))

    return summed

  def _whole(self, block: dict, name: str) -> jax.Array:
    attn, mlp = block["attn"], block["mlp"]
    weight = {"attn": attn["proj"], "qkv": attn["qkv"], "fc": mlp["fc"], "proj": mlp["proj"]}[name]
    return sharding.gather_weight(weight.astype(self.dtype), *_AXES[name])

  def _finish_parameters(self, block: dict) -> list[jax.Array]:
    weights = [self._whole(block, name) for name in ("attn", "fc", "proj")]
    return [block["ln_2"]["g"], *weights]

  def _finish_axes(self) -> tuple:
    weights = [sharding.whole_axes(_AXES[name]) for name in ("attn", "fc", "proj")]
    return ((), _STREAMS, (None, *layers.HEADS), _NORM, *weights)


def around_attention(
  config: ImageGPTConfig, x: jax.Array, interpret: bool
) -> AroundAttention | None:
  """Returns the kernels around attention for a stream [B, T, D] under the current mesh; None: XLA does better.

  They are for 256 × 256 matrix units (`tpu.wide_matrix_unit`), and for weights that no heads or hidden units
  split over devices: their products would have to be summed between two that a kernel does at once.
  """
  batch = sharding.axis_share("batch", x.shape[0])
  if not tpu.wide_matrix_unit() or not batch or sharding.parts_around("mlp") > 1:
    return None
  vmem = hardware.vmem_bytes(hardware.target().device_kind)
  forward, backward = (
    block_tpu.make_plan(
      batch * x.shape[1], config.n_embd, 4 * config.n_embd, x.dtype,
      backward=backward, vmem=vmem, interpret=interpret,
    )
    for backward in (False, True)
  )  # fmt: skip
  return AroundAttention(x.dtype, forward, backward) if forward and backward else None
