"""Attention in blocks, plain JAX: for CPUs, where whole matrices of scores cost more than arithmetic.

It takes a few heads at a time and one block of queries after the other: a block's scores fit in the
cache, most of what lies above the diagonal is never computed, and the backward pass recomputes the
scores. Scores are laid out [keys, queries]: that suits the CPU's matmuls, and softmax's highest score is
found along whole vectors. Forward it is mostly not looked for: where no score can be so large that its
exponential overflows, a block's scores are read once between its two products, and the second product
also sums the weights.

Nothing here depends on a backend; accelerators have better kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.model.attention.tpu import LSE_NAME, OUTPUT_NAME

_BLOCK = 128  # queries
_PAIR = 2  # heads at a time forward, each by products of its own: XLA computes them side by side
_GROUP = 4  # heads at a time backward, in products of all: enough to keep several cores busy
_SAFE = 60.0  # scores up to here, positive or negative, have exponentials that float32 sums up well


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def blocked_attention(qkv_3xBxTxE: jax.Array, n_head: int, causal: bool) -> jax.Array:
  """softmax(q kᵀ / sqrt(head_dim)) v, per head; scores and softmax in float32.

  Local to one device: under a mesh, call it inside `jax.shard_map` with batch and heads split.

  Args:
    qkv_3xBxTxE: queries, keys and values, E = n_head * head_dim; any length.
    n_head: number of heads in it.
    causal: position t sees positions 0..t; else all of them.

  Returns:
    [B, T, E] in the input's dtype; differentiable once.
  """
  return _forward(qkv_3xBxTxE, n_head, causal)[0]


def _attention_fwd(qkv: jax.Array, n_head: int, causal: bool):
  out, lse = _forward(qkv, n_head, causal)
  out, lse = checkpoint_name(out, OUTPUT_NAME), checkpoint_name(lse, LSE_NAME)
  return out, (qkv, out, lse)


def _attention_bwd(n_head: int, causal: bool, residuals, dout_BxTxE: jax.Array):
  qkv, out, lse = residuals
  batch, length, _ = out.shape
  products = out.astype(jnp.float32) * dout_BxTxE.astype(jnp.float32)
  delta_BxTxH = products.reshape(batch, length, n_head, -1).sum(-1)
  q, k, v, dout = (_split(x, n_head, _GROUP) for x in (*qkv, dout_BxTxE))
  of_queries = (*q.shape[:2], 1, length)
  lse, delta = lse.reshape(of_queries), delta_BxTxH.swapaxes(1, 2).reshape(of_queries)
  groups = q, k, v, dout, lse, delta
  _, gradients = jax.lax.scan(
    lambda _, group: (None, _backward_of_group(*group, causal=causal)), None, groups
  )
  return (jnp.stack([_merge(gradient, batch, n_head) for gradient in gradients]),)


blocked_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(qkv: jax.Array, n_head: int, causal: bool) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, T, E] and the log-sum-exp of every query's scores, float32 [B * n_head, T]."""
  q, k, v = (_split(x, n_head, _PAIR) for x in qkv)
  # No score is larger than the longest query and key allow.
  longest = [jnp.square(x.astype(jnp.float32)).sum(-1).max() for x in (q, k)]
  is_safe = jnp.sqrt(longest[0] * longest[1] / q.shape[-1]) <= _SAFE  # False for NaN, too
  results = jnp.zeros(q.shape, q.dtype), jnp.zeros(q.shape[:-1], jnp.float32)

  def of_pair(at, results, shift):
    pair = [jax.lax.dynamic_index_in_dim(x, at, keepdims=False) for x in (q, k, v)]
    heads = [
      _forward_of_head(pair[0][n], pair[1][n], pair[2][n], causal, shift) for n in range(q.shape[1])
    ]
    parts = map(jnp.stack, zip(*heads, strict=True))
    put = jax.lax.dynamic_update_index_in_dim
    return tuple(put(x, part, at, 0) for x, part in zip(results, parts, strict=True))

  # One of two loops has no pairs. (XLA doesn't share out between cores what a `cond` chooses.)
  for shift, pairs in ((False, len(q) * is_safe), (True, len(q) * ~is_safe)):
    results = jax.lax.fori_loop(0, pairs, functools.partial(of_pair, shift=shift), results)
  out, lse = results
  return _merge(out, qkv.shape[1], n_head), lse.reshape(-1, lse.shape[-1])


def _split(x_BxTxE: jax.Array, n_head: int, most: int) -> jax.Array:
  """-> [groups, G, T, K]: all images' heads in groups of at most `most` that divide them evenly."""
  batch, length, width = x_BxTxE.shape
  group = next(n for n in range(most, 0, -1) if batch * n_head % n == 0)
  heads = x_BxTxE.reshape(batch, length, n_head, width // n_head).swapaxes(1, 2)
  return heads.reshape(batch * n_head // group, group, length, width // n_head)


def _merge(x: jax.Array, batch: int, n_head: int) -> jax.Array:
  """[groups, G, T, K] -> [B, T, E]."""
  _, _, length, head_dim = x.shape
  heads = x.reshape(batch, n_head, length, head_dim).swapaxes(1, 2)
  return heads.reshape(batch, length, n_head * head_dim)


_matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def _flip(x: jax.Array) -> jax.Array:
  return x.swapaxes(-1, -2)


def _blocks(length: int, causal: bool) -> list[tuple[slice, slice]]:
  """Pairs (queries, keys that some of them see), one for every block."""
  starts = range(0, length, _BLOCK)
  queries = [slice(start, min(start + _BLOCK, length)) for start in starts]
  return [(block, slice(0, block.stop if causal else length)) for block in queries]


def _scores(k: jax.Array, q_flipped: jax.Array, queries: slice, keys: slice, causal: bool):
  """A block of scaled scores [..., keys, queries]; -inf where a key comes after the query."""
  scale = q_flipped.shape[-2] ** -0.5
  scores = scale * _matmul(k[..., keys, :], q_flipped[..., queries])
  if not causal:
    return scores
  key, query = jnp.arange(keys.stop)[:, None], jnp.arange(queries.start, queries.stop)
  return jnp.where(key <= query, scores, -jnp.inf)


def _forward_of_head(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, shift: bool):
  """Maps q, k, v [T, K] to the output [T, K] and the log-sum-exp [T].

  `shift`: subtract each query's highest score from all, or else their exponentials could overflow.
  """
  length = len(q)
  q_flipped = _flip(q)
  summing = jnp.concatenate([_flip(v), jnp.ones((1, length), v.dtype)])  # the last row sums weights
  outs, lses = [], []
  for queries, keys in _blocks(length, causal):
    scores = _scores(k, q_flipped, queries, keys, causal)
    highest = jnp.max(scores, axis=0, keepdims=True) if shift else 0.0
    weights = jnp.exp(scores - highest).astype(v.dtype)
    summed = _matmul(summing[:, keys], weights)
    outs.append(summed[:-1] / summed[-1:])
    lses.append(highest + jnp.log(summed[-1:]))
  return _flip(jnp.concatenate(outs, axis=-1)).astype(q.dtype), jnp.concatenate(lses, axis=-1)[0]


def _backward_of_group(q, k, v, dout, lse, delta, *, causal: bool):
  """Gradients of q, k and v, [G, T, K]; `delta` is the sum of output · dout, [G, 1, T]."""
  dtype, scale = q.dtype, q.shape[-1] ** -0.5
  q_flipped, k_flipped, dout_flipped = _flip(q), _flip(k), _flip(dout)
  dqs = []
  dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for queries, keys in _blocks(q.shape[1], causal):
    scores = _scores(k, q_flipped, queries, keys, causal)
    weights = jnp.exp(scores - lse[..., queries])
    dweights = _matmul(v[:, keys], dout_flipped[..., queries])
    dscores = (scale * weights * (dweights - delta[..., queries])).astype(dtype)
    dqs.append(_matmul(k_flipped[..., keys], dscores))
    dv = _add_first(dv, _matmul(weights.astype(dtype), dout[:, queries]))
    dk = _add_first(dk, _matmul(dscores, q[:, queries]))
  dq = _flip(jnp.concatenate(dqs, axis=-1))
  return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)


def _add_first(total: jax.Array, part: jax.Array) -> jax.Array:
  """Adds to the first positions. (`at[].add` is a scatter, on which XLA 0.11.2 crashes in shard_map.)"""
  added = total[:, : part.shape[1]] + part
  return jax.lax.dynamic_update_slice_in_dim(total, added, 0, axis=1)
