"""All blocks in one differentiable function, for TPUs, with the residuals of all layers in stacks.

When JAX differentiates a scan over layers, it copies every residual into a stack and out of it again;
beside the fused attention kernel those copies cost as much as the kernel. Here the backward pass is
written by hand: matmuls write into the stacks, the kernels read and write one layer of them in place,
and norms and the activation are recomputed. Values and gradients are the same as the blocks'.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.model import layers
from igpt_jax.model.attention import tpu
from igpt_jax.model.attention.dispatch import attention
from igpt_jax.model.projection import sharded_einsum, sharded_einsum_gradients
from igpt_jax.parallel import sharding
from igpt_jax.parallel.sharding import constrain

_LSE = ("batch", "heads", None, None, None)
_STACKS = ((None, *layers.QKV), (None, *layers.HEADS), (None, *_LSE))


def _norm_gradients(x, scale, gain, dout) -> tuple[jax.Array, jax.Array]:
  """Gradients of `rms_norm` with respect to x and gain, float32; `scale` is x's inverse RMS."""
  unit = x.astype(jnp.float32) * scale
  dout = dout.astype(jnp.float32)
  dgain = jnp.sum(dout * unit, axis=(0, 1))
  dunit = dout * gain
  return scale * (dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True)), dgain


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def run(
  blocks: dict, x_BxTxD: jax.Array, n_head: int, causal: bool, interpret: bool = False
) -> jax.Array:
  """Returns the output of the last block [B, T, D].

  Args:
    blocks: the stacked parameters, as under "blocks" in the model's dict.
    x_BxTxD: embeddings.
    n_head, causal: the model's; the fused attention kernel must support a device's share.
    interpret: run the kernel on the CPU, for tests.
  """
  # This body runs only where nothing is differentiated: it keeps no residuals.
  implementation = "tpu_interpret" if interpret else "tpu"

  def body(x, block):
    qkv = sharded_einsum(
      layers.TO_QKV, layers.rms_norm(x, block["ln_1"]["g"]), block["attn"]["qkv"]
    )
    heads = attention(qkv, n_head=n_head, causal=causal, implementation=implementation)
    x = x + sharded_einsum(layers.FROM_HEADS, heads, block["attn"]["proj"])
    hidden = sharded_einsum(
      layers.TO_INNER, layers.rms_norm(x, block["ln_2"]["g"]), block["mlp"]["fc"]
    )
    x = x + sharded_einsum(layers.FROM_INNER, layers.activation(hidden), block["mlp"]["proj"])
    return constrain(x, *layers.STREAM), None

  return jax.lax.scan(body, x_BxTxD, blocks)[0]


class _Residuals(NamedTuple):
  """Stacks of every layer's residuals; everything else is cheap to recompute in the backward pass.

  Attributes:
    inputs: the blocks' inputs, followed by the output of the last, [L + 1, B, T, D].
    scales: inverse RMS at both norms, float32 [L, 2, B, T, 1].
    attention: stacks that the kernels read and write.
    hidden: the MLP's hidden units before the activation, [L, B, T, 4D]; None on 256 × 256 matrix
      units, where recomputing them is cheaper than laying them out for the backward pass.
  """

  inputs: jax.Array
  scales: jax.Array
  attention: tpu.Stacks
  hidden: jax.Array | None


def _empty_stacks(blocks: dict, x: jax.Array, n_head: int, causal: bool) -> _Residuals:
  """Allocates stacks for `_forward` to write; their contents are undefined."""
  n_layer, width = blocks["ln_1"]["g"].shape
  batch, length, _ = x.shape

  def stack(shape, axes, depth=n_layer, dtype: Any = x.dtype):
    return constrain(jax.lax.empty((depth, *shape), dtype), None, *axes)

  heads = sharding.axis_share("heads", n_head)
  assert heads, "the kernel is not chosen where heads don't divide over the mesh"
  qkv = (3, batch, length, width)
  lse = tpu.lse_shape(qkv, x.dtype, n_head=heads, head_dim=width // n_head, causal=causal)
  hidden = (batch, length, blocks["mlp"]["fc"].shape[-1])
  return _Residuals(
    inputs=stack(x.shape, layers.STREAM, depth=n_layer + 1),
    scales=stack((2, batch, length, 1), (None, *layers.STREAM), dtype=jnp.float32),
    attention=tpu.Stacks(
      qkv=stack(qkv, layers.QKV),
      out=stack(x.shape, layers.HEADS),
      lse=stack(lse, _LSE, dtype=jnp.float32),
    ),
    hidden=None if tpu.wide_matrix_unit() else stack(hidden, layers.INNER),
  )


def _kernel(layer_function, n_head: int, causal: bool, interpret: bool):
  local = sharding.axis_share("heads", n_head)
  return functools.partial(layer_function, n_head=local, causal=causal, interpret=interpret)


def _forward(blocks, x, n_head, causal, interpret):
  kernel = _kernel(tpu.forward_layer, n_head, causal, interpret)
  attend = sharding.per_device(
    lambda layer, *stacks: kernel(layer, tpu.Stacks(*stacks)), ((), *_STACKS), _STACKS[1:]
  )

  def body(carry, scanned):
    x, residuals = carry
    layer, block = scanned
    scale_1 = layers.inverse_rms(x)
    qkv = sharded_einsum(
      layers.TO_QKV, layers.scaled_norm(x, scale_1, block["ln_1"]["g"]), block["attn"]["qkv"]
    )
    qkv_stack = _put(residuals.attention.qkv, qkv, layer)
    out, lse = attend(layer, qkv_stack, *residuals.attention[1:])
    middle = x + sharded_einsum(layers.FROM_HEADS, _get(out, layer), block["attn"]["proj"])
    scale_2 = layers.inverse_rms(middle)
    hidden = sharded_einsum(
      layers.TO_INNER, layers.scaled_norm(middle, scale_2, block["ln_2"]["g"]), block["mlp"]["fc"]
    )
    x = middle + sharded_einsum(layers.FROM_INNER, layers.activation(hidden), block["mlp"]["proj"])
    x = constrain(x, *layers.STREAM)
    residuals = _Residuals(
      inputs=_put(residuals.inputs, x, layer + 1),
      scales=_put(residuals.scales, jnp.stack([scale_1, scale_2]), layer),
      attention=tpu.Stacks(qkv_stack, out, lse),
      hidden=None if residuals.hidden is None else _put(residuals.hidden, hidden, layer),
    )
    return (x, residuals), None

  residuals = _empty_stacks(blocks, x, n_head, causal)
  residuals = residuals._replace(inputs=_put(residuals.inputs, x, 0))
  n_layer = len(blocks["ln_1"]["g"])
  (x, residuals), _ = jax.lax.scan(body, (x, residuals), (jnp.arange(n_layer), blocks))
  return x, (blocks, residuals)


def _backward(n_head, causal, interpret, blocks_and_residuals, dx):
  blocks, residuals = blocks_and_residuals
  kernel = _kernel(tpu.backward_layer, n_head, causal, interpret)
  attention_gradient = sharding.per_device(
    lambda layer, dout, *stacks: kernel(layer, tpu.Stacks(*stacks), dout),
    ((), layers.HEADS, *_STACKS),
    layers.QKV,
  )

  def body(dx, scanned):
    layer, block = scanned
    gain_1, gain_2 = block["ln_1"]["g"], block["ln_2"]["g"]
    x, out = _get(residuals.inputs, layer), _get(residuals.attention.out, layer)
    # Recomputing it is cheaper than keeping it.
    middle = x + sharded_einsum(layers.FROM_HEADS, out, block["attn"]["proj"])
    scale_1, scale_2 = _get(residuals.scales, layer)

    normed = layers.scaled_norm(middle, scale_2, gain_2)
    if residuals.hidden is None:
      hidden = sharded_einsum(layers.TO_INNER, normed, block["mlp"]["fc"])
    else:
      hidden = _get(residuals.hidden, layer)
    activated, pull = jax.vjp(layers.activation, hidden)
    dactivated, dproj = sharded_einsum_gradients(
      layers.FROM_INNER, activated, block["mlp"]["proj"], dx
    )
    (dhidden,) = pull(dactivated)
    dnormed, dfc = sharded_einsum_gradients(layers.TO_INNER, normed, block["mlp"]["fc"], dhidden)
    dmiddle, dgain_2 = _norm_gradients(middle, scale_2, gain_2, dnormed)
    dx = (dx + dmiddle).astype(x.dtype)

    dout, dattn_proj = sharded_einsum_gradients(layers.FROM_HEADS, out, block["attn"]["proj"], dx)
    dqkv = attention_gradient(layer, dout, *residuals.attention)
    normed = layers.scaled_norm(x, scale_1, gain_1)
    dnormed, dqkv_weight = sharded_einsum_gradients(
      layers.TO_QKV, normed, block["attn"]["qkv"], dqkv
    )
    dinput, dgain_1 = _norm_gradients(x, scale_1, gain_1, dnormed)
    dx = constrain((dx + dinput).astype(x.dtype), *layers.STREAM)
    gradients = {
      "ln_1": {"g": dgain_1},
      "attn": {"qkv": dqkv_weight, "proj": dattn_proj},
      "ln_2": {"g": dgain_2},
      "mlp": {"fc": dfc, "proj": dproj},
    }
    return dx, gradients

  n_layer = len(blocks["ln_1"]["g"])
  dx, gradients = jax.lax.scan(body, dx, (jnp.arange(n_layer), blocks), reverse=True)
  return gradients, dx


run.defvjp(_forward, _backward)


def _put(stack: jax.Array, value: jax.Array, at: jax.Array | int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, value, at, 0)


def _get(stack: jax.Array, at: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, at, 0, keepdims=False)
