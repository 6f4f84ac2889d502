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

from igpt_jax.model import layers, options
from igpt_jax.model.around_attention import around_attention
from igpt_jax.model.attention import tpu
from igpt_jax.model.attention.dispatch import attention
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.model.options import Embedded
from igpt_jax.model.projection import sharded_einsum, sharded_einsum_gradients
from igpt_jax.parallel import sharding
from igpt_jax.parallel.sharding import constrain

_LSE = ("batch", "heads", None, None, None)
_STACKS = ((None, *layers.QKV), (None, *layers.HEADS), (None, *_LSE))


def _norm_gradients(x, scale, gain, dout) -> tuple[jax.Array, jax.Array]:
  """`layers.norm_gradients`, the gain's summed up."""
  dx, dgain = layers.norm_gradients(x, scale, gain, dout)
  return dx, jnp.sum(dgain, axis=(0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def run(
  config: ImageGPTConfig, blocks: dict, embedded: Embedded, interpret: bool = False
) -> jax.Array:
  """Returns the output of the last block [B, T, D].

  Args:
    config: the model's; the fused attention kernel must support a device's share of its heads.
    blocks: the stacked parameters, as under "blocks" in the model's dict.
    embedded: embeddings.
    interpret: run the kernel on the CPU, for tests.
  """
  # This body runs only where nothing is differentiated: it keeps no residuals.
  implementation = "tpu_interpret" if interpret else "tpu"

  def body(x, block):
    x = options.enter(config, block, x, embedded)
    qkv = sharded_einsum(
      layers.TO_QKV, layers.rms_norm(x, block["ln_1"]["g"]), block["attn"]["qkv"]
    )
    qkv = options.change_qkv(config, block["attn"], qkv, embedded)
    heads = attention(
      qkv, n_head=config.n_head, causal=config.causal, implementation=implementation
    )
    x = x + sharded_einsum(layers.FROM_HEADS, heads, block["attn"]["proj"])
    hidden = sharded_einsum(
      layers.TO_INNER, layers.rms_norm(x, block["ln_2"]["g"]), block["mlp"]["fc"]
    )
    x = x + sharded_einsum(layers.FROM_INNER, layers.activation(hidden), block["mlp"]["proj"])
    return constrain(x, *layers.STREAM), None

  return jax.lax.scan(body, embedded.stream, blocks)[0]


class _Residuals(NamedTuple):
  """Stacks of every layer's residuals; everything else is cheap to recompute in the backward pass.

  Attributes:
    inputs: the embeddings, followed by the blocks' outputs, [L + 1, B, T, D]. With `block_tpu`'s kernels
      a block's input is what `options.enter` makes of it.
    scales: inverse RMS at both norms, float32 [L, 2, B, T, 1]; None with `block_tpu`'s kernels.
    attention: stacks that the kernels read and write.
    hidden: the MLP's hidden units before the activation, [L, B, T, 4D]; None on 256 × 256 matrix
      units, where computing them again is cheaper than laying them out for the backward pass.
  """

  inputs: jax.Array
  scales: jax.Array | None
  attention: tpu.Stacks
  hidden: jax.Array | None


def _empty_stacks(config: ImageGPTConfig, blocks: dict, x: jax.Array, around: bool) -> _Residuals:
  """Allocates stacks for `_forward` to write; their contents are undefined. `around`: for kernels around attention."""
  n_layer, n_head, width = config.n_layer, config.n_head, config.n_embd
  batch, length, _ = x.shape

  def stack(shape, axes, depth=n_layer, dtype: Any = x.dtype):
    return constrain(jax.lax.empty((depth, *shape), dtype), None, *axes)

  heads = sharding.axis_share("heads", n_head)
  assert heads, "the kernel is not chosen where heads don't divide over the mesh"
  qkv = (3, batch, length, width)
  lse = tpu.lse_shape(qkv, x.dtype, n_head=heads, head_dim=config.head_dim, causal=config.causal)
  hidden = (batch, length, blocks["mlp"]["fc"].shape[-1])
  return _Residuals(
    inputs=stack(x.shape, layers.STREAM, depth=n_layer + 1),
    scales=None
    if around
    else stack((2, batch, length, 1), (None, *layers.STREAM), dtype=jnp.float32),
    attention=tpu.Stacks(
      qkv=stack(qkv, layers.QKV),
      out=stack(x.shape, layers.HEADS),
      lse=stack(lse, _LSE, dtype=jnp.float32),
    ),
    hidden=None if tpu.wide_matrix_unit() else stack(hidden, layers.INNER),
  )


def _kernel(layer_function, config: ImageGPTConfig, interpret: bool):
  local = sharding.axis_share("heads", config.n_head)
  return functools.partial(layer_function, n_head=local, causal=config.causal, interpret=interpret)


def _forward(config, blocks, embedded, interpret):
  kernel = _kernel(tpu.forward_layer, config, interpret)
  attend = sharding.per_device(
    lambda layer, *stacks: kernel(layer, tpu.Stacks(*stacks)), ((), *_STACKS), _STACKS[1:]
  )

  around = around_attention(config, embedded.stream, interpret)

  def body_of_kernels(carry, scanned):
    assert around is not None
    _, residuals = carry
    layer, block = scanned
    inputs = residuals.inputs
    if config.x0_skip:
      inputs = _put(inputs, options.enter(config, block, _get(inputs, layer), embedded), layer)
    qkv_stack = around.qkv(layer, block, inputs, residuals.attention.qkv)
    made = _get(qkv_stack, layer)
    qkv = options.change_qkv(config, block["attn"], made, embedded)
    if qkv is not made:
      qkv_stack = _put(qkv_stack, qkv, layer)
    out, lse = attend(layer, qkv_stack, *residuals.attention[1:])
    inputs = around.finish(layer, block, inputs, out)
    residuals = _Residuals(inputs, None, tpu.Stacks(qkv_stack, out, lse), None)
    return (None, residuals), None

  def body(carry, scanned):
    x, residuals = carry
    layer, block = scanned
    x = options.enter(config, block, x, embedded)
    scale_1 = layers.inverse_rms(x)
    qkv = sharded_einsum(
      layers.TO_QKV, layers.scaled_norm(x, scale_1, block["ln_1"]["g"]), block["attn"]["qkv"]
    )
    qkv = options.change_qkv(config, block["attn"], qkv, embedded)
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

  residuals = _empty_stacks(config, blocks, embedded.stream, around is not None)
  residuals = residuals._replace(inputs=_put(residuals.inputs, embedded.stream, 0))
  layers_of = jnp.arange(config.n_layer), blocks
  if around:
    (_, residuals), _ = jax.lax.scan(body_of_kernels, (None, residuals), layers_of)
    x = constrain(residuals.inputs[-1], *layers.STREAM)
  else:
    (x, residuals), _ = jax.lax.scan(body, (embedded.stream, residuals), layers_of)
  return x, (blocks, embedded, residuals)


def _backward(config, interpret, saved, dx):
  blocks, embedded, residuals = saved
  kernel = _kernel(tpu.backward_layer, config, interpret)
  attention_gradient = sharding.per_device(
    lambda layer, dout, *stacks: kernel(layer, tpu.Stacks(*stacks), dout),
    ((), layers.HEADS, *_STACKS),
    layers.QKV,
  )

  around = around_attention(config, embedded.stream, interpret)

  def body_of_kernels(carry, scanned):
    assert around is not None
    dx, dembedded = carry
    layer, block = scanned
    inputs = residuals.inputs
    # The skip is a sum: its gradient doesn't depend on what it is added to.
    _, pull_entry = _vjp_of_entry(config, block, _get(inputs, layer), embedded)
    dx, dout, gradients = around.finish_gradients(layer, block, inputs, residuals.attention.out, dx)
    dqkv = attention_gradient(layer, dout, *residuals.attention)
    normed = layers.rms_norm(_get(inputs, layer), block["ln_1"]["g"])
    dqkv, dattn = _gradients_of_change(config, block["attn"], normed, embedded, dqkv)
    dx, of_qkv = around.qkv_gradients(layer, block, inputs, dqkv, dx)
    gradients["attn"] |= of_qkv["attn"] | dattn
    dx, dstream, dentry = pull_entry(constrain(dx, *layers.STREAM))
    gradients |= {"ln_1": of_qkv["ln_1"], **dentry}
    return (dx, jax.tree.map(jnp.add, dembedded, dstream)), gradients

  def body(carry, scanned):
    dx, dembedded = carry
    layer, block = scanned
    gain_1, gain_2 = block["ln_1"]["g"], block["ln_2"]["g"]
    x, out = _get(residuals.inputs, layer), _get(residuals.attention.out, layer)
    x, pull_entry = _vjp_of_entry(config, block, x, embedded)
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
    dqkv, dattn = _gradients_of_change(config, block["attn"], normed, embedded, dqkv)
    dnormed, dqkv_weight = sharded_einsum_gradients(
      layers.TO_QKV, normed, block["attn"]["qkv"], dqkv
    )
    dinput, dgain_1 = _norm_gradients(x, scale_1, gain_1, dnormed)
    dx = constrain((dx + dinput).astype(x.dtype), *layers.STREAM)
    dx, dstream, dentry = pull_entry(dx)
    gradients = {
      **dentry,
      "ln_1": {"g": dgain_1},
      "attn": {"qkv": dqkv_weight, "proj": dattn_proj, **dattn},
      "ln_2": {"g": dgain_2},
      "mlp": {"fc": dfc, "proj": dproj},
    }
    return (dx, jax.tree.map(jnp.add, dembedded, dstream)), gradients

  # The embeddings enter every block by their skips, if there are any: a float32 sum over layers.
  carry = dx, jnp.zeros(dx.shape, jnp.float32) if config.x0_skip else None
  layers_of = jnp.arange(config.n_layer), blocks
  body = body_of_kernels if around else body
  (dx, dembedded), gradients = jax.lax.scan(body, carry, layers_of, reverse=True)
  dx = dx if dembedded is None else (dx + dembedded).astype(dx.dtype)
  no_gradient: Any = None  # of tokens
  return gradients, Embedded(dx, no_gradient, no_gradient)


def _vjp_of_entry(config: ImageGPTConfig, block: dict, x: jax.Array, embedded: Embedded):
  """Returns `options.enter`'s result and the function of its gradient.

  That returns gradients of x, of the embeddings (float32; None if they don't enter) and of the block's
  parameters that are used.
  """
  if not config.x0_skip:
    return x, lambda dx: (dx, None, {})

  def enter(x, stream, own):
    return options.enter(config, own, x, embedded._replace(stream=stream.astype(x.dtype)))

  entered, pull = jax.vjp(enter, x, embedded.stream.astype(jnp.float32), {"x0": block["x0"]})
  return entered, pull


def _gradients_of_change(
  config: ImageGPTConfig, attn: dict, normed: jax.Array, embedded: Embedded, dqkv: jax.Array
) -> tuple[jax.Array, dict]:
  """Pulls a gradient back through `options.change_qkv`.

  Args:
    config: the model's.
    attn: parameters of the block's attention.
    normed: what queries, keys and values were made from.
    embedded: embeddings.
    dqkv: gradient of what attention took.

  Returns:
    The gradient of what the matmul made; those of the parameters that were used.
  """
  own = {name: leaf for name, leaf in attn.items() if name not in ("qkv", "proj")}
  # Only norms need their inputs again; otherwise the compiler drops this product.
  made = sharded_einsum(layers.TO_QKV, normed, attn["qkv"])
  _, pull = jax.vjp(lambda qkv, own: options.change_qkv(config, own, qkv, embedded), made, own)
  return pull(dqkv)


run.defvjp(_forward, _backward)


def _put(stack: jax.Array, value: jax.Array, at: jax.Array | int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, value, at, 0)


def _get(stack: jax.Array, at: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, at, 0, keepdims=False)
