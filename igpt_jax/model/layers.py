"""All blocks in one differentiable function, for TPUs: what the backward pass needs is kept in stacks.

A scan over layers that is differentiated by JAX copies whatever it keeps into a stack, and out of it
again; next to the fused attention kernel those copies cost as much as the kernel. Here the backward
pass is written out: matmuls write into the stacks, the kernels read and write one layer of them in
place, and norms and the activation are computed again. Same values and gradients as the blocks'.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.model.attention import tpu
from igpt_jax.model.attention.dispatch import attention
from igpt_jax.model.projection import Product, project, project_gradients
from igpt_jax.parallel import sharding
from igpt_jax.parallel.sharding import constrain

STREAM = ("batch", "length", "channels")  # logical axes of the activations between blocks
HEADS = ("batch", "length", "heads")
QKV = ("qkv", *HEADS)
INNER = ("batch", "length", "mlp")
_LSE = ("batch", "heads", None, None, None)
_STACKS = ((None, *QKV), (None, *HEADS), (None, *_LSE))

TO_QKV = Product("btd,sde->sbte", STREAM, ("qkv", "embed", "heads"), QKV)
FROM_HEADS = Product("bte,ed->btd", HEADS, ("heads_rows", "channels"), STREAM)
TO_INNER = Product("btd,de->bte", STREAM, ("embed", "mlp"), INNER)
FROM_INNER = Product("bte,ed->btd", INNER, ("mlp_rows", "channels"), STREAM)

NORM_EPSILON = 1e-5


def activation(hidden: jax.Array) -> jax.Array:
  """x·sigmoid(1.702x)."""
  return hidden * jax.nn.sigmoid(1.702 * hidden)


def inverse_rms(x: jax.Array, axis: int = -1) -> jax.Array:
  """rsqrt(mean(x²) + 1e-5) over channels, float32 [..., 1]."""
  return jax.lax.rsqrt(
    jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axis, keepdims=True) + NORM_EPSILON
  )


def rms_norm(x: jax.Array, gain: jax.Array, axis: int = -1) -> jax.Array:
  """x · rsqrt(mean(x²) + 1e-5) · gain, in float32; in x's dtype. `axis` is that of the channels."""
  return _normed(x, inverse_rms(x, axis), gain)


def _normed(x: jax.Array, scale: jax.Array, gain: jax.Array) -> jax.Array:
  return (x.astype(jnp.float32) * scale * gain).astype(x.dtype)


def _norm_gradients(x, scale, gain, dout) -> tuple[jax.Array, jax.Array]:
  """Of `rms_norm` with respect to x and gain, float32; scale is its inverse RMS."""
  unit = x.astype(jnp.float32) * scale
  dout = dout.astype(jnp.float32)
  dgain = jnp.sum(dout * unit, axis=(0, 1))
  dunit = dout * gain
  return scale * (dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True)), dgain


def run(
  blocks: dict, x_BxTxD: jax.Array, *, n_head: int, causal: bool, interpret: bool = False
) -> jax.Array:
  """The output of the last block [B, T, D].

  Args:
    blocks: the stacked parameters, as under "blocks" in the model's dict.
    x_BxTxD: embeddings.
    n_head, causal: of the model; the fused attention kernel must take a device's share.
    interpret: run the kernel on the CPU, for tests.
  """
  return _run((n_head, causal, interpret), blocks, x_BxTxD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(settings, blocks, x):
  """Keeps nothing."""
  n_head, causal, interpret = settings
  implementation = "tpu_interpret" if interpret else "tpu"

  def body(x, block):
    qkv = project(TO_QKV, rms_norm(x, block["ln_1"]["g"]), block["attn"]["qkv"])
    heads = attention(qkv, n_head=n_head, causal=causal, implementation=implementation)
    x = x + project(FROM_HEADS, heads, block["attn"]["proj"])
    hidden = project(TO_INNER, rms_norm(x, block["ln_2"]["g"]), block["mlp"]["fc"])
    x = x + project(FROM_INNER, activation(hidden), block["mlp"]["proj"])
    return constrain(x, *STREAM), None

  return jax.lax.scan(body, x, blocks)[0]


class _Kept(NamedTuple):
  """Stacks of what the backward pass needs of every layer; what it doesn't find here is cheap.

  Attributes:
    inputs: of the blocks, and after them the output of the last, [L + 1, B, T, D].
    scales: inverse RMS at both norms, float32 [L, 2, B, T, 1].
    attention: what the kernels read and write.
    hidden: of the MLP, before the activation, [L, B, T, 4D]; None where it's cheaper to compute again
      than to lay out for the backward pass: on 256 × 256 matrix units.
  """

  inputs: jax.Array
  scales: jax.Array
  attention: tpu.Stacks
  hidden: jax.Array | None


def _room(blocks: dict, x: jax.Array, n_head: int, causal: bool) -> _Kept:
  """Stacks with nothing in them."""
  n_layer, width = blocks["ln_1"]["g"].shape
  batch, length, _ = x.shape

  def stack(shape, axes, layers=n_layer, dtype=x.dtype):
    return constrain(jax.lax.empty((layers, *shape), dtype), None, *axes)

  qkv = (3, batch, length, width)
  lse = tpu.lse_shape(
    qkv,
    x.dtype,
    n_head=sharding.axis_share("heads", n_head),
    head_dim=width // n_head,
    causal=causal,
  )
  return _Kept(
    inputs=stack(x.shape, STREAM, layers=n_layer + 1),
    scales=stack((2, batch, length, 1), (None, *STREAM), dtype=jnp.float32),
    attention=tpu.Stacks(
      qkv=stack(qkv, QKV), out=stack(x.shape, HEADS), lse=stack(lse, _LSE, dtype=jnp.float32)
    ),
    hidden=None
    if tpu.wide_matrix_unit()
    else stack((batch, length, blocks["mlp"]["fc"].shape[-1]), INNER),
  )


def _on_each_device(kernel, settings):
  n_head, causal, interpret = settings
  n_head = sharding.axis_share("heads", n_head)
  return functools.partial(kernel, n_head=n_head, causal=causal, interpret=interpret)


def _forward(settings, blocks, x):
  n_head, causal, _ = settings
  kernel = _on_each_device(tpu.forward_layer, settings)
  attend = sharding.per_device(
    lambda at, *parts: kernel(at, tpu.Stacks(*parts)), ((), *_STACKS), _STACKS[1:]
  )

  def body(carry, scanned):
    x, kept = carry
    layer, block = scanned
    scale_1 = inverse_rms(x)
    qkv = project(TO_QKV, _normed(x, scale_1, block["ln_1"]["g"]), block["attn"]["qkv"])
    qkv_stack = _put(kept.attention.qkv, qkv, layer)
    out, lse = attend(layer, qkv_stack, *kept.attention[1:])
    middle = x + project(FROM_HEADS, _get(out, layer), block["attn"]["proj"])
    scale_2 = inverse_rms(middle)
    hidden = project(TO_INNER, _normed(middle, scale_2, block["ln_2"]["g"]), block["mlp"]["fc"])
    x = middle + project(FROM_INNER, activation(hidden), block["mlp"]["proj"])
    x = constrain(x, *STREAM)
    kept = _Kept(
      inputs=_put(kept.inputs, x, layer + 1),
      scales=_put(kept.scales, jnp.stack([scale_1, scale_2]), layer),
      attention=tpu.Stacks(qkv_stack, out, lse),
      hidden=None if kept.hidden is None else _put(kept.hidden, hidden, layer),
    )
    return (x, kept), None

  kept = _room(blocks, x, n_head, causal)
  kept = kept._replace(inputs=_put(kept.inputs, x, 0))
  n_layer = len(blocks["ln_1"]["g"])
  (x, kept), _ = jax.lax.scan(body, (x, kept), (jnp.arange(n_layer), blocks))
  return x, (blocks, kept)


def _backward(settings, residuals, dx):
  blocks, kept = residuals
  kernel = _on_each_device(tpu.backward_layer, settings)
  of_attention = sharding.per_device(
    lambda at, dout, *parts: kernel(at, tpu.Stacks(*parts), dout),
    ((), HEADS, *_STACKS),
    QKV,
  )

  def body(dx, scanned):
    layer, block = scanned
    gain_1, gain_2 = block["ln_1"]["g"], block["ln_2"]["g"]
    x, out = _get(kept.inputs, layer), _get(kept.attention.out, layer)
    middle = x + project(FROM_HEADS, out, block["attn"]["proj"])  # cheaper than to keep
    scale_1, scale_2 = _get(kept.scales, layer)

    normed = _normed(middle, scale_2, gain_2)
    if kept.hidden is None:
      hidden = project(TO_INNER, normed, block["mlp"]["fc"])
    else:
      hidden = _get(kept.hidden, layer)
    activated, pull = jax.vjp(activation, hidden)
    dactivated, dproj = project_gradients(FROM_INNER, activated, block["mlp"]["proj"], dx)
    (dhidden,) = pull(dactivated)
    dnormed, dfc = project_gradients(TO_INNER, normed, block["mlp"]["fc"], dhidden)
    dmiddle, dgain_2 = _norm_gradients(middle, scale_2, gain_2, dnormed)
    dx = (dx + dmiddle).astype(x.dtype)

    dout, dattn_proj = project_gradients(FROM_HEADS, out, block["attn"]["proj"], dx)
    dqkv = of_attention(layer, dout, *kept.attention)
    normed = _normed(x, scale_1, gain_1)
    dnormed, dqkv_weight = project_gradients(TO_QKV, normed, block["attn"]["qkv"], dqkv)
    dinput, dgain_1 = _norm_gradients(x, scale_1, gain_1, dnormed)
    dx = constrain((dx + dinput).astype(x.dtype), *STREAM)
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


_run.defvjp(_forward, _backward)


def _put(stack: jax.Array, value: jax.Array, at: jax.Array | int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, value, at, 0)


def _get(stack: jax.Array, at: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, at, 0, keepdims=False)
