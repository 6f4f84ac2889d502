"""The fused TPU attention kernels' bodies: one batch row and head group, forward and backward.

They work through tiles of the score matrix in Python loops, so that the compiler schedules one
long stretch of straight code. Sequences too long for that are cut into spans, which the bodies
visit in loops of their own.

Three choices carry the speed:

- Scores are transposed, [key, query]. Row statistics lie along lanes and cost no cross-lane
  reduction, and everything that leaves a matmul leaves it as [head_dim, position]: a head of 64 is
  64 rows to stream through the matrix unit and not half-empty vectors of 128 lanes, and a head is a
  slice of rows, whatever its alignment to lanes was.
- The scores of a tile are started `lag` tiles before they are used, so that the softmax of one
  tile runs beside the matmuls of the next; the compiler doesn't reorder that far by itself.
- scale × log2(e) is folded into the queries, so that the softmax is exp2 alone.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from igpt_jax.model.attention.tpu_plan import (
  MASKED,
  ROWS_BY_COLUMNS,
  ROWS_BY_ROWS,
  Heads,
  Index,
  Plan,
  mask,
  matmul,
  pipelined,
)


def forward_body(
  plan: Plan, qkv_ref, out_ref, lse_ref, vt_ref, out_t_ref, max_ref, sum_ref, k_ref=None
):
  """One batch row and head group: softmax(q kᵀ / sqrt(head_dim)) v.

  Args:
    plan: shapes and schedule.
    qkv_ref: [3, 1, length, width].
    out_ref: [1, length, width].
    lse_ref: [1, 1, spans, heads, span], log2 of the sum of 2^(score × log2 e).
    vt_ref: scratch [spans, width, span], values transposed.
    out_t_ref: scratch float32 [width, span], the outputs of a span of queries transposed.
    max_ref, sum_ref: scratch float32 [heads, span], the running softmax of a span of queries.
    k_ref: scratch [copied heads, length, head_dim], if the plan copies any.
  """
  heads = Heads(plan, {1: k_ref} if plan.copied else {})
  dtype = qkv_ref.dtype

  def fill_values(span, b0, b1):
    vt_ref[span, :, b0:b1] = qkv_ref[2, 0, heads.at(span, b0, b1), :].T

  def queries(span, head, q0, q1):
    at = heads.at(span, q0, q1)
    x = heads.own(lambda lanes: qkv_ref[0, 0, at, lanes], head)
    return (x.astype(jnp.float32) * plan.query_factor).astype(dtype)

  def store(span, b0, b1):
    out_ref[0, heads.at(span, b0, b1), :] = out_t_ref[:, b0:b1].T.astype(dtype)

  def visit(q_span: Index, k_span: Index, on_diagonal: bool):
    """Adds a span of keys to a span of queries' outputs."""

    def start(unit):
      head, q0, q1 = unit
      query = queries(q_span, head, q0, q1)
      scores = []
      for k0, k1 in plan.keys_of(q1, on_diagonal):
        heads.once("k", k0, k1, lambda b0, b1: heads.copy(qkv_ref, k_span, b0, b1))
        key = heads.operand(qkv_ref, 1, head, heads.at(k_span, k0, k1))
        s_KxQ = matmul(key, query, ROWS_BY_ROWS)
        if on_diagonal and k1 > q0:
          s_KxQ = mask(s_KxQ, k0, q0)
        scores.append(s_KxQ)
      top = scores[0].max(axis=0, keepdims=True)
      for s_KxQ in scores[1:]:
        top = jnp.maximum(top, s_KxQ.max(axis=0, keepdims=True))
      return scores, top

    def finish(unit, started):
      head, q0, q1 = unit
      scores, top = started
      rows, row = plan.rows(head), slice(head, head + 1)
      if plan.spans > 1:
        top = jnp.maximum(top, max_ref[row, q0:q1])
      total: Any = None
      out: Any = None
      for (k0, k1), s_KxQ in zip(plan.keys_of(q1, on_diagonal), scores, strict=True):
        heads.once("v", k0, k1, lambda b0, b1: fill_values(k_span, b0, b1))
        p_KxQ = jnp.exp2(s_KxQ - top)
        part = p_KxQ.sum(axis=0, keepdims=True)
        total = part if total is None else total + part
        part = matmul(vt_ref[k_span, rows, k0:k1], p_KxQ.astype(dtype), ROWS_BY_COLUMNS)
        out = part if out is None else out + part
      if plan.spans > 1:
        shrink = jnp.exp2(max_ref[row, q0:q1] - top)
        max_ref[row, q0:q1] = top
        sum_ref[row, q0:q1] = sum_ref[row, q0:q1] * shrink + total
        out_t_ref[rows, q0:q1] = out_t_ref[rows, q0:q1] * shrink + out
      else:
        out_t_ref[rows, q0:q1] = out * (1 / total)
        lse_ref[0, 0, 0, row, q0:q1] = top + jnp.log2(total)
        if head == plan.heads - 1:
          store(0, q0, q1)

    units = [(head, q0, q1) for q0, q1 in plan.blocks() for head in range(plan.heads)]
    pipelined(units, start, finish, plan.lag)

  if plan.spans == 1:
    visit(0, 0, plan.causal)
    return

  @pl.loop(0, plan.spans)
  def _(span):
    heads.copy(qkv_ref, span, 0, plan.span)
    fill_values(span, 0, plan.span)

  @pl.loop(0, plan.spans)
  def _(span):
    max_ref[...] = jnp.full_like(max_ref, MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    out_t_ref[...] = jnp.zeros_like(out_t_ref)

    @pl.loop(0, span if plan.causal else plan.spans)
    def _(k_span):
      visit(span, k_span, False)

    if plan.causal:
      visit(span, span, True)
    for head in range(plan.heads):
      out_t_ref[plan.rows(head), :] *= 1 / sum_ref[head : head + 1, :]
    lse_ref[0, 0, span] = max_ref[...] + jnp.log2(sum_ref[...])
    store(span, 0, plan.span)


def backward_body(
  plan: Plan,
  qkv_ref,
  out_ref,
  lse_ref,
  dout_ref,
  dqkv_ref,
  qt_ref,
  kt_ref,
  dot_ref,
  delta_ref,
  dqt_ref,
  dkt_ref,
  dvt_ref,
  k_ref=None,
  v_ref=None,
):
  """One batch row and head group: gradients of queries, keys and values, scores recomputed once.

  With P the softmax and dP = v doutᵀ, dS = P (dP - delta), delta = Σ out·dout of a row
  (Dao et al. 2022, appendix B.2); dv = P dout, dk = dS q, dq = dSᵀ k.

  Args:
    plan: shapes and schedule.
    qkv_ref: [3, 1, length, width]; dqkv_ref like it.
    out_ref, dout_ref: [1, length, width].
    lse_ref: [1, 1, spans, heads, span], as the forward kernel wrote it.
    qt_ref, kt_ref, dot_ref: scratch [spans, width, span], transposed.
    delta_ref: scratch float32 [spans, heads, span].
    dqt_ref: scratch float32 [spans, width, span]; dkt_ref, dvt_ref: [width, span].
    k_ref, v_ref: scratch [copied heads, length, head_dim], if the plan copies any.
  """
  heads = Heads(plan, {1: k_ref, 2: v_ref} if plan.copied else {})
  dtype = qkv_ref.dtype
  scale = 1 / math.sqrt(plan.head_dim)

  def fill_queries(span, b0, b1):
    at = heads.at(span, b0, b1)
    qt_ref[span, :, b0:b1] = qkv_ref[0, 0, at, :].T
    dot_ref[span, :, b0:b1] = dout_ref[0, at, :].T
    product = dout_ref[0, at, :].astype(jnp.float32) * out_ref[0, at, :].astype(jnp.float32)
    product_t = product.T
    for head in range(plan.heads):
      delta = product_t[plan.rows(head)].sum(axis=0, keepdims=True)
      delta_ref[span, head : head + 1, b0:b1] = delta

  def fill_keys(span, b0, b1):
    kt_ref[span, :, b0:b1] = qkv_ref[1, 0, heads.at(span, b0, b1), :].T

  def store_queries(span, b0, b1):
    dqkv_ref[0, 0, heads.at(span, b0, b1), :] = (dqt_ref[span, :, b0:b1] * scale).T.astype(dtype)

  def store_keys(span, b0, b1):
    at = heads.at(span, b0, b1)
    dqkv_ref[1, 0, at, :] = (dkt_ref[:, b0:b1] * scale).T.astype(dtype)
    dqkv_ref[2, 0, at, :] = dvt_ref[:, b0:b1].T.astype(dtype)

  def start(q_span, k_span, tile):
    head, q0, q1, k0, k1 = tile
    if plan.transposed_queries:
      heads.once("q", q0, q1, lambda b0, b1: fill_queries(q_span, b0, b1))
      q_t = qt_ref[q_span, plan.rows(head), q0:q1].astype(jnp.float32) * plan.query_factor
      query = heads.padded(head, q_t.astype(dtype))
      dout = heads.padded(head, dot_ref[q_span, plan.rows(head), q0:q1])
      form = ROWS_BY_COLUMNS
    else:
      at = heads.at(q_span, q0, q1)
      query = heads.own(lambda lanes: qkv_ref[0, 0, at, lanes], head)
      query = (query.astype(jnp.float32) * plan.query_factor).astype(dtype)
      dout = heads.own(lambda lanes: dout_ref[0, at, lanes], head)
      form = ROWS_BY_ROWS
    heads.once("copy", k0, k1, lambda b0, b1: heads.copy(qkv_ref, k_span, b0, b1))
    at = heads.at(k_span, k0, k1)
    s_KxQ = matmul(heads.operand(qkv_ref, 1, head, at), query, form)
    dp_KxQ = matmul(heads.operand(qkv_ref, 2, head, at), dout, form)
    return s_KxQ, dp_KxQ

  def add(ref, index, fresh, value):
    ref[index] = value if fresh else ref[index] + value

  def finish(q_span, k_span, on_diagonal, tile, started, fresh_query, fresh_key):
    head, q0, q1, k0, k1 = tile
    s_KxQ, dp_KxQ = started
    rows, row = plan.rows(head), slice(head, head + 1)
    heads.once("q", q0, q1, lambda b0, b1: fill_queries(q_span, b0, b1))
    heads.once("k", k0, k1, lambda b0, b1: fill_keys(k_span, b0, b1))
    if on_diagonal and k1 > q0:
      s_KxQ = mask(s_KxQ, k0, q0)
    p_KxQ = jnp.exp2(s_KxQ - lse_ref[0, 0, q_span, row, q0:q1])
    ds_KxQ = (p_KxQ * (dp_KxQ - delta_ref[q_span, row, q0:q1])).astype(dtype)
    p_KxQ = p_KxQ.astype(dtype)
    dv_t = matmul(dot_ref[q_span, rows, q0:q1], p_KxQ, ROWS_BY_ROWS)
    dk_t = matmul(qt_ref[q_span, rows, q0:q1], ds_KxQ, ROWS_BY_ROWS)
    dq_t = matmul(kt_ref[k_span, rows, k0:k1], ds_KxQ, ROWS_BY_COLUMNS)
    add(dvt_ref, (rows, slice(k0, k1)), fresh_key, dv_t)
    add(dkt_ref, (rows, slice(k0, k1)), fresh_key, dk_t)
    add(dqt_ref, (q_span, rows, slice(q0, q1)), fresh_query, dq_t)

  def visit(q_span: Index, k_span: Index, on_diagonal: bool):
    """Adds the gradients between a span of queries and a span of keys."""
    tiles = list(plan.tiles(on_diagonal))
    alone = plan.spans == 1
    last_q = {(t.q1 - 1) // plan.tile: t for t in tiles}  # a later tile replaces an earlier one
    last_k = {(t.k1 - 1) // plan.tile: t for t in tiles}
    written = set()

    def fresh(name, head, start, stop):
      """True if the accumulator of these positions holds nothing yet."""
      cells = {(name, head, at) for at in range(start, stop, plan.diagonal)}
      seen = cells & written
      assert not seen or seen == cells, "a tile meets an accumulator that is half written"
      written.update(cells)
      return alone and not seen

    def finish_and_store(tile, started):
      fresh_key = fresh("k", tile.head, tile.k0, tile.k1)
      fresh_query = fresh("q", tile.head, tile.q0, tile.q1)
      finish(q_span, k_span, on_diagonal, tile, started, fresh_query, fresh_key)
      if alone:
        for b0, b1 in plan.blocks():
          if last_q[b0 // plan.tile] is tile:
            store_queries(0, b0, b1)
          if last_k[b0 // plan.tile] is tile:
            store_keys(0, b0, b1)

    pipelined(tiles, lambda tile: start(q_span, k_span, tile), finish_and_store, plan.lag)

  if plan.spans == 1:
    visit(0, 0, plan.causal)
    return

  @pl.loop(0, plan.spans)
  def _(span):
    heads.copy(qkv_ref, span, 0, plan.span)
    fill_queries(span, 0, plan.span)
    fill_keys(span, 0, plan.span)
    dqt_ref[span] = jnp.zeros_like(dqt_ref.at[span])

  @pl.loop(0, plan.spans)
  def _(span):
    dkt_ref[...] = jnp.zeros_like(dkt_ref)
    dvt_ref[...] = jnp.zeros_like(dvt_ref)
    if plan.causal:
      visit(span, span, True)
      store_queries(span, 0, plan.span)

    @pl.loop(span + 1 if plan.causal else 0, plan.spans)
    def _(q_span):
      visit(q_span, span, False)

    store_keys(span, 0, plan.span)

  if not plan.causal:

    @pl.loop(0, plan.spans)
    def _(span):
      store_queries(span, 0, plan.span)
