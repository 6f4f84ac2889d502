"""Plan, tiles and heads in VMEM of the fused TPU attention kernels, shared by forward and backward.

A group is the fewest heads whose width is whole 128-lane vectors. All of its queries, keys and
values lie in VMEM, as the qkv matmul wrote them, and `tpu_bodies` works through square
tiles of the score matrix.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
MASKED = -1e30  # finite, so that no row of the running maximum is ever inf - inf
ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))
ROWS_BY_ROWS = (((1,), (1,)), ((), ()))

Index = int | jax.Array  # of a span: a Python number where everything is one span


class Tile(NamedTuple):
  """Queries q0..q1 and keys k0..k1 of one head, counted from the start of their spans."""

  head: int
  q0: int
  q1: int
  k0: int
  k1: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static configuration of a kernel.

  Attributes:
    head_dim, heads: size and number of the heads of one group; width = head_dim * heads.
    length, span: positions, and those of one span; span divides length.
    causal: position t sees 0..t.
    tile: rows and columns of a tile of scores.
    diagonal: tiles on the causal diagonal are cut into strips of this many keys, and queries that
      see none of a strip are left out.
    lag: tiles (or, forward, rows of tiles) whose scores are computed ahead of their use.
    transposed_queries: the backward kernel's scores take queries as [head_dim, query].
    aligned: heads that straddle more 128-lane vectors than they fill (the middle two of four heads
      of 96) get a copy of their keys and values at lane 0, which halves their matmuls on a matrix
      unit of 128 × 128; one of 256 × 256 takes both vectors in one pass.
  """

  head_dim: int
  heads: int
  length: int
  span: int
  causal: bool
  tile: int
  diagonal: int
  lag: int
  transposed_queries: bool
  aligned: bool

  @property
  def width(self) -> int:
    return self.head_dim * self.heads

  @property
  def spans(self) -> int:
    return self.length // self.span

  @property
  def query_factor(self) -> float:
    return math.log2(math.e) / math.sqrt(self.head_dim)

  def rows(self, head: int) -> slice:
    """The head's rows of a [width, position] array."""
    return slice(head * self.head_dim, (head + 1) * self.head_dim)

  def window(self, head: int) -> slice:
    """The fewest whole vectors of lanes that hold the head."""
    start, stop = head * self.head_dim, (head + 1) * self.head_dim
    return slice(start // LANES * LANES, min(pl.cdiv(stop, LANES) * LANES, self.width))

  @property
  def copied(self) -> list[int]:
    """The heads whose keys and values are copied to lane 0."""
    least = pl.cdiv(self.head_dim, LANES)
    windows = [self.window(head) for head in range(self.heads)]
    vectors = [pl.cdiv(window.stop - window.start, LANES) for window in windows]
    return [head for head in range(self.heads) if self.aligned and vectors[head] > least]

  def blocks(self) -> list[tuple[int, int]]:
    """The span cut into tiles' edges."""
    return [(at, min(at + self.tile, self.span)) for at in range(0, self.span, self.tile)]

  def keys_of(self, q1: int, on_diagonal: bool) -> list[tuple[int, int]]:
    """The blocks of keys that queries up to q1 see."""
    return [(k0, k1) for k0, k1 in self.blocks() if not on_diagonal or k0 < q1]

  def tiles(self, on_diagonal: bool) -> Iterator[Tile]:
    """Tiles of a pair of spans, keys outermost: a column's key and value gradients end together."""
    for k0, k1 in self.blocks():
      for q0, q1 in self.blocks():
        strips = [(k0, k1)]
        if on_diagonal and q1 <= k0:
          continue
        if on_diagonal and q0 < k1:
          strips = [(at, min(at + self.diagonal, k1)) for at in range(k0, k1, self.diagonal)]
        for s0, s1 in strips:
          for head in range(self.heads):
            yield Tile(head, max(q0, s0) if on_diagonal else q0, q1, s0, s1)


def matmul(a: jax.Array, b: jax.Array, dimension_numbers) -> jax.Array:
  # float32 operands ask for exact products; the matrix unit's default is one bfloat16 pass.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a, b, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
  )


def mask(scores_KxQ: jax.Array, k0: int, q0: int) -> jax.Array:
  """Hides keys after their query; k0 and q0 count from the same place."""
  key = jax.lax.broadcasted_iota(jnp.int32, scores_KxQ.shape, 0)
  query = jax.lax.broadcasted_iota(jnp.int32, scores_KxQ.shape, 1)
  return jnp.where(key <= query + (q0 - k0), scores_KxQ, MASKED)


def pipelined(
  work: Iterable[Any], start: Callable[[Any], Any], finish: Callable[[Any, Any], None], lag: int
):
  """Calls start(item) on every item, and finish(item, its result) once `lag` more have been started."""
  pending = collections.deque()
  for item in work:
    pending.append((item, start(item)))
    if len(pending) > lag:
      finish(*pending.popleft())
  while pending:
    finish(*pending.popleft())


class Heads:
  """A group's arrays, in the forms that the matmuls take.

  Natural arrays are [..., position, width] references; transposed ones [span, width, position in
  span] scratch, filled block by block when first needed.
  """

  def __init__(self, plan: Plan, copies: dict[int, Any]):
    """copies: scratch [copied heads, length, head_dim] of array 1, keys, and array 2, values."""
    self.plan = plan
    self._copies = copies
    self._ready = set()

  def at(self, span: Index, start: int, stop: int) -> pl.Slice | slice:
    """Positions start..stop of a span, in a natural array."""
    if self.plan.spans == 1:
      return slice(start, stop)
    first = pl.multiple_of(span * self.plan.span, LANES)  # pyright: ignore[reportArgumentType]
    return pl.ds(first + start, stop - start)

  def once(self, name: str, start: int, stop: int, fill: Callable[[int, int], None]):
    """Calls `fill` on the blocks that cover start..stop and haven't been filled."""
    if self.plan.spans > 1:
      return  # filled for all spans before the loops over them
    for b0, b1 in self.plan.blocks():
      if b0 < stop and start < b1 and (name, b0) not in self._ready:
        self._ready.add((name, b0))
        fill(b0, b1)

  def copy(self, qkv_ref, span: Index, b0: int, b1: int):
    """Fills a block of the copies."""
    at = self.at(span, b0, b1)
    for which, ref in self._copies.items():
      for n, head in enumerate(self.plan.copied):
        ref[n, at, :] = qkv_ref[which, 0, at, self.plan.rows(head)]

  def operand(self, qkv_ref, which: int, head: int, at) -> jax.Array:
    """Keys (1) or values (2) of a head [position, lanes], with the lanes that `padded` and `only` give queries."""
    if head in self.plan.copied:
      return self._copies[which][self.plan.copied.index(head), at, :]
    return qkv_ref[which, 0, at, self.plan.window(head)]

  def own(self, ref_at: Callable[[slice], jax.Array], head: int) -> jax.Array:
    """A head's lanes of queries (or an array like them), other heads' lanes zeroed."""
    if head in self.plan.copied:
      return ref_at(self.plan.rows(head))
    return self.only(head, ref_at(self.plan.window(head)))

  def only(self, head: int, x: jax.Array) -> jax.Array:
    """x [position, window of the head] with other heads' lanes zeroed."""
    window = self.plan.window(head)
    if window.stop - window.start == self.plan.head_dim:
      return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + window.start
    rows = self.plan.rows(head)
    return jnp.where((lane >= rows.start) & (lane < rows.stop), x, jnp.zeros_like(x))

  def padded(self, head: int, x: jax.Array) -> jax.Array:
    """x [head_dim, position] with zero rows around it, to match the lanes of `window`."""
    if head in self.plan.copied:
      return x
    window, rows = self.plan.window(head), self.plan.rows(head)
    around = (rows.start - window.start, window.stop - rows.stop)
    before, after = ([jnp.zeros((n, x.shape[1]), x.dtype)] if n else [] for n in around)
    return jnp.concatenate([*before, x, *after], axis=0)
