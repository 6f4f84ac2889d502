"""Attention over a whole sequence: one function, several implementations of it.

The layout is the one the qkv matmul writes, [3, batch, length, n_head * head_dim]; an
implementation finds its heads in there, and the result comes back as [batch, length, n_head *
head_dim], ready for the output projection.
"""

import jax

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def attention(
  qkv_3xBxTxE: jax.Array, *, n_head: int, causal: bool, implementation: str = "auto"
) -> jax.Array:
  """softmax(q kᵀ / sqrt(head_dim)) v, per head; scores and softmax in float32.

  Args:
    qkv_3xBxTxE: queries, keys and values, E = n_head * head_dim.
    n_head: number of heads.
    causal: position t sees positions 0..t (autoregressive); else all of them (BERT).
    implementation: one of IMPLEMENTATIONS; "auto" chooses by backend when traced.

  Returns:
    [B, T, E] in the dtype of `qkv_3xBxTxE`.
  """
  _, batch, length, width = qkv_3xBxTxE.shape
  if implementation == "auto":
    half = qkv_3xBxTxE.dtype.itemsize == 2
    implementation = "cudnn" if jax.default_backend() == "gpu" and half else "xla"
  q, k, v = qkv_3xBxTxE.reshape(3, batch, length, n_head, width // n_head)
  out_BxTxHxK = jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation=implementation
  )
  return out_BxTxHxK.reshape(batch, length, width)
