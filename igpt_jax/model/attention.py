"""Attention over a whole sequence: one function, several implementations of it.

The layout is the one the qkv matmul writes, [3, batch, length, n_head * head_dim]; an
implementation finds its heads in there, and the result comes back as [batch, length, n_head *
head_dim], ready for the output projection.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.errors import UserError
from igpt_jax.model import attention_tpu
from igpt_jax.parallel import sharding

# tpu_interpret runs the TPU's kernel step by step on any backend: slow, for tests.
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "tpu", "tpu_interpret")

# What a remat policy may keep, so that the backward pass needn't run attention again.
SAVED_NAMES = (attention_tpu.OUTPUT_NAME, attention_tpu.LSE_NAME)


def attention(
  qkv_3xBxTxE: jax.Array, *, n_head: int, causal: bool, implementation: str = "auto"
) -> jax.Array:
  """softmax(q kᵀ / sqrt(head_dim)) v, per head; scores and softmax in float32.

  Args:
    qkv_3xBxTxE: queries, keys and values, E = n_head * head_dim.
    n_head: number of heads.
    causal: position t sees positions 0..t (autoregressive); else all of them (BERT).
    implementation: one of IMPLEMENTATIONS; "auto" chooses by backend and shape when traced.

  Returns:
    [B, T, E] in the dtype of `qkv_3xBxTxE`.

  Raises:
    UserError: "tpu" was asked for, and the kernel doesn't take these shapes.
  """
  if implementation == "auto":
    implementation = _choose(qkv_3xBxTxE, n_head)
  if implementation.startswith("tpu"):
    reason = _unsupported(qkv_3xBxTxE, n_head)
    if reason is not None:
      raise UserError(f"model.attention: {implementation!r} doesn't take {reason}; fix: 'xla'")
    return _on_tpu(qkv_3xBxTxE, n_head, causal, interpret=implementation == "tpu_interpret")
  _, batch, length, width = qkv_3xBxTxE.shape
  q, k, v = qkv_3xBxTxE.reshape(3, batch, length, n_head, width // n_head)
  out_BxTxHxK = jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation=implementation
  )
  return checkpoint_name(out_BxTxHxK.reshape(batch, length, width), attention_tpu.OUTPUT_NAME)


def _choose(qkv: jax.Array, n_head: int) -> str:
  backend = jax.default_backend()
  if backend == "tpu" and _unsupported(qkv, n_head) is None:
    return "tpu"
  if backend == "gpu" and qkv.dtype.itemsize == 2:
    return "cudnn"
  return "xla"


def _unsupported(qkv: jax.Array, n_head: int) -> str | None:
  """Why the kernel can't run on a device's share of these heads, or None."""
  local = sharding.axis_share("heads", n_head)
  if local is None:
    return f"{n_head} heads, which don't divide over the mesh"
  return attention_tpu.supports(local, qkv.shape[-1] // n_head, qkv.shape[2], qkv.dtype)


def _on_tpu(qkv: jax.Array, n_head: int, causal: bool, interpret: bool) -> jax.Array:
  """The kernel on each device's own pictures and heads: a kernel knows nothing of meshes."""
  kernel = functools.partial(
    attention_tpu.fused_attention,
    n_head=sharding.axis_share("heads", n_head),
    causal=causal,
    interpret=interpret,
  )
  return sharding.per_device(
    kernel, ("qkv", "batch", "length", "heads"), ("batch", "length", "heads")
  )(qkv)
