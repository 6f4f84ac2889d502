"""Attention over a whole sequence: one function, several implementations of it.

The layout is the one the qkv matmul writes, [3, batch, length, n_head * head_dim]; an
implementation finds its heads in there, and the result comes back as [batch, length, n_head *
head_dim], ready for the output projection.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.errors import UserError
from igpt_jax.model.attention import blocked, tpu
from igpt_jax.parallel import hardware, sharding

# tpu_interpret runs the TPU's kernel step by step on any backend: slow, for tests.
IMPLEMENTATIONS = ("auto", "xla", "blocked", "cudnn", "tpu", "tpu_interpret")

# On a CPU, blocks win from two of them up; one block is plain attention.
_BLOCKED_ABOVE = 128

# What a remat policy may keep, so that the backward pass needn't run attention again.
SAVED_NAMES = (tpu.OUTPUT_NAME, tpu.LSE_NAME)


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
    UserError: "tpu", "blocked" or "cudnn" was asked for, and doesn't take these shapes, or isn't here.
  """
  if implementation == "auto":
    implementation = choose(qkv_3xBxTxE, n_head)
  if implementation != "xla":
    reason = _unsupported(qkv_3xBxTxE, n_head, implementation)
    if reason is not None:
      raise UserError(f"model.attention: {implementation!r} doesn't take {reason}; fix: 'xla'")
  if implementation in ("blocked", "tpu", "tpu_interpret"):
    return _per_device(qkv_3xBxTxE, n_head, causal, implementation)
  _, batch, length, width = qkv_3xBxTxE.shape
  q, k, v = qkv_3xBxTxE.reshape(3, batch, length, n_head, width // n_head)
  out_BxTxHxK = jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation="cudnn" if implementation == "cudnn" else "xla"
  )
  return checkpoint_name(out_BxTxHxK.reshape(batch, length, width), tpu.OUTPUT_NAME)


def choose(qkv_3xBxTxE: jax.Array | jax.ShapeDtypeStruct, n_head: int) -> str:
  """What "auto" stands for on this backend, for this shape under the mesh around."""
  backend = hardware.platform()
  if backend == "tpu" and _unsupported(qkv_3xBxTxE, n_head, "tpu") is None:
    return "tpu"
  if backend == "gpu" and _unsupported(qkv_3xBxTxE, n_head, "cudnn") is None:
    return "cudnn"
  if backend == "cpu" and qkv_3xBxTxE.shape[2] > _BLOCKED_ABOVE:
    # A lone image doesn't divide over a mesh; plain attention needn't divide it.
    divides = sharding.axis_share("batch", qkv_3xBxTxE.shape[1]) is not None
    if divides and _unsupported(qkv_3xBxTxE, n_head, "blocked") is None:
      return "blocked"
  return "xla"


def _unsupported(
  qkv: jax.Array | jax.ShapeDtypeStruct, n_head: int, implementation: str
) -> str | None:
  """Why a device can't run it on its own share of these heads, or None."""
  head_dim = qkv.shape[-1] // n_head
  if implementation == "cudnn":
    return _cudnn_unsupported(head_dim, qkv.dtype)
  local = sharding.axis_share("heads", n_head)
  if local is None:
    return f"{n_head} heads, which don't divide over the mesh"
  if implementation == "blocked":
    return None
  return tpu.supports(local, head_dim, qkv.shape[2], qkv.dtype)


def _cudnn_unsupported(head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
  """Why cuDNN's attention doesn't take heads of this size, or None.

  As jax has it (check_is_flash_attention of jax/_src/cudnn/fused_attention_stablehlo.py): without a
  bias, sequences may be of any length. What jax doesn't check: cuDNN has it from Ampere on.
  """
  capability = hardware.cuda_capability()
  if capability is None:
    return f"{hardware.target().device_kind}: expected an NVIDIA GPU"
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return f"dtype {jnp.dtype(dtype).name}: expected bfloat16 or float16"
  if capability < (8, 0):
    return f"compute capability {'.'.join(map(str, capability))}: expected 8.0 or more"
  most = 256 if capability >= (9, 0) else 128  # from Hopper on
  if head_dim % 8 or head_dim > most:
    return f"head dim {head_dim}: expected a multiple of 8 up to {most}"
  return None


def _per_device(qkv: jax.Array, n_head: int, causal: bool, implementation: str) -> jax.Array:
  """Attention of each device's own images and heads: kernels and loops over heads know no meshes."""
  heads = {"n_head": sharding.axis_share("heads", n_head), "causal": causal}
  if implementation == "blocked":
    function = functools.partial(blocked.blocked_attention, **heads)
  else:
    interpret = implementation == "tpu_interpret"
    function = functools.partial(tpu.fused_attention, interpret=interpret, **heads)
  return sharding.per_device(
    function, [("qkv", "batch", "length", "heads")], ("batch", "length", "heads")
  )(qkv)
