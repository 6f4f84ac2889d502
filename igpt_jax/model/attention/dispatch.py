"""Attention over a whole sequence: one function with several implementations.

Their input has the layout that the qkv matmul writes, [3, batch, length, n_head * head_dim], and
their output the one that the output projection reads, [batch, length, n_head * head_dim].
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

# Names that a remat policy may save, so that the backward pass needn't run attention again.
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
    UserError: the implementation doesn't support these shapes, or its device isn't here.
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
  library = "cudnn" if implementation == "cudnn" else "xla"
  out_BxTxHxK = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=library)
  return checkpoint_name(out_BxTxHxK.reshape(batch, length, width), tpu.OUTPUT_NAME)


def choose(qkv_3xBxTxE: jax.Array | jax.ShapeDtypeStruct, n_head: int) -> str:
  """Returns what "auto" stands for on this backend, for this shape under the current mesh."""
  backend = hardware.platform()
  fused = {"tpu": "tpu", "gpu": "cudnn"}.get(backend)
  if fused and _unsupported(qkv_3xBxTxE, n_head, fused) is None:
    return fused
  if backend == "cpu" and qkv_3xBxTxE.shape[2] > _BLOCKED_ABOVE:
    # A lone image doesn't divide over a mesh; plain attention needn't divide it.
    divides = sharding.axis_share("batch", qkv_3xBxTxE.shape[1]) is not None
    if divides and _unsupported(qkv_3xBxTxE, n_head, "blocked") is None:
      return "blocked"
  return "xla"


def _unsupported(
  qkv: jax.Array | jax.ShapeDtypeStruct, n_head: int, implementation: str
) -> str | None:
  """The reason why a device can't run it on its share of these heads, or None."""
  head_dim = qkv.shape[-1] // n_head
  if implementation == "cudnn":
    return _cudnn_unsupported(head_dim, qkv.dtype)
  local = sharding.axis_share("heads", n_head)
  if local is None:
    return f"{n_head} heads, which don't divide over the mesh"
  if implementation == "blocked":
    return None
  if implementation == "tpu" and hardware.platform() != "tpu":
    return f"{hardware.target().device_kind}: expected a TPU"
  return tpu.supports(local, head_dim, qkv.shape[2], qkv.dtype)


def _cudnn_unsupported(head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
  """The reason why cuDNN's attention doesn't take heads of this size, or None.

  The rules are jax' (check_is_flash_attention of jax/_src/cudnn/fused_attention_stablehlo.py), where
  sequences without a bias may have any length; and one jax doesn't check: it needs Ampere or newer.
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
  """Runs attention on each device's own images and heads: the implementations know no meshes."""
  function = blocked.blocked_attention
  if implementation != "blocked":
    interpret = implementation == "tpu_interpret"
    function = functools.partial(tpu.fused_attention, interpret=interpret)
  local = sharding.axis_share("heads", n_head)
  function = functools.partial(function, n_head=local, causal=causal)
  heads = ("batch", "length", "heads")
  return sharding.per_device(function, [("qkv", *heads)], heads)(qkv)
