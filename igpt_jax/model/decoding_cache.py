"""One position at a time: weights laid out for it, caches of keys and values, attention over them.

A layer's cache has two parts: that of the given pixels, once per picture however many samples
continue it, and that of the drawn ones, once per sample. A loop over positions writes into a short
block of the latter alone and reads the positions before it as they are: nothing is sliced or masked
in the loop but that block.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.model import layers
from igpt_jax.model.image_gpt import ImageGPT
from igpt_jax.parallel import hardware
from igpt_jax.parallel.sharding import constrain, gather_weight, parts_around

CACHE_DTYPES = ("float32", "bfloat16", "int8")


class KeysValues(NamedTuple):
  """Of some positions of one layer.

  XLA on a CPU reads them fastest with what a sum goes over outside: positions innermost of keys,
  channels innermost of values. An accelerator takes whole rows, one per position.

  Attributes:
    k: [N, n_head, head_dim, T], or rows [N, T, n_head * head_dim].
    v: [N, n_head, T, head_dim], or rows [N, T, n_head * head_dim].
    k_scale, v_scale: what int8 keys and values are multiplied by, float32 [N, n_head, T], or rows
      [N, T, n_head]; else None.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None

  @property
  def in_rows(self) -> bool:
    return self.k.ndim == 3

  @property
  def length(self) -> int:
    return self.k.shape[1] if self.in_rows else self.k.shape[3]


class Cache(NamedTuple):
  """One layer's: of B pictures' given positions, and of N samples' others, filled from the left."""

  given: KeysValues
  drawn: KeysValues


def _keeps_rows() -> bool:
  return hardware.platform() != "cpu"


def _each(function: Callable, *parts: KeysValues) -> KeysValues:
  """`function` of the axis of positions and of each field that there is."""
  axes = (1, 1, 1, 1) if parts[0].in_rows else (3, 2, 2, 2)
  fields = zip(axes, *parts, strict=True)
  return KeysValues(*(None if of[0] is None else function(axis, *of) for axis, *of in fields))


def _pin(kv: KeysValues) -> KeysValues:
  axes = ("batch", "length", "heads") if kv.in_rows else ("batch", "heads", None, None)
  return _each(lambda _, x: constrain(x, *axes[: x.ndim]), kv)


def take(kv: KeysValues, start: int, end: int) -> KeysValues:
  """Positions start..end-1."""
  return _each(lambda axis, x: jax.lax.slice_in_dim(x, start, end, axis=axis), kv)


def put(kv: KeysValues, part: KeysValues, at: jax.Array | int) -> KeysValues:
  """`kv` with `part` written from position `at` on."""
  return _each(
    lambda axis, x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=axis), kv, part
  )


def store(k_NxTxHxK: jax.Array, v_NxTxHxK: jax.Array, dtype: str) -> KeysValues:
  """Keys and values as they are kept; int8: scaled by the largest of each position and head."""
  k, v, scales = k_NxTxHxK, v_NxTxHxK, []
  if dtype == "int8":
    (k, k_scale), (v, v_scale) = _to_int8(k), _to_int8(v)
    scales = [k_scale, v_scale]
  k, v = k.astype(dtype), v.astype(dtype)
  if _keeps_rows():
    shape = (*k.shape[:2], k.shape[2] * k.shape[3])
    return _pin(KeysValues(k.reshape(shape), v.reshape(shape), *scales))
  scales = [scale.swapaxes(1, 2) for scale in scales]
  return _pin(KeysValues(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), *scales))


def _to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127
  return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, -1)


class Weights(NamedTuple):
  """Of one layer, in the compute dtype, whole over the batch's devices.

  On a CPU matrices are [out, in]: with a column per sample, a matrix is the product's left side, and
  read once, as it lies. Accelerators take them as they are kept, [in, out], and a row per sample.
  """

  gain_1: jax.Array
  qkv: jax.Array  # [3, E, D], or [D, 3, E]
  attn_proj: jax.Array
  gain_2: jax.Array
  fc: jax.Array
  mlp_proj: jax.Array


class Tables(NamedTuple):
  """What comes before and after the layers, likewise."""

  wte: jax.Array
  wpe: jax.Array
  sos: jax.Array
  gain: jax.Array
  wtet: jax.Array


def lay_out(model: ImageGPT) -> tuple[Tables, list[Weights]]:
  """Casts, gathers, turns and takes apart the weights: once, before a loop over positions."""
  dtype = jnp.dtype(model.config.dtype)

  def whole(parameter, axes, layer=...):
    return gather_weight(parameter[...][layer].astype(dtype), *axes)

  def turned(parameter, product, layer):
    weight = whole(parameter, product.weight_axes, layer)
    return weight if _keeps_rows() else weight.swapaxes(-1, -2)

  def qkv(layer):
    weight = turned(blocks.attn.qkv, layers.TO_QKV, layer)
    return weight.swapaxes(0, 1) if _keeps_rows() else weight

  blocks = model.blocks
  per_layer = [
    Weights(
      gain_1=blocks.ln_1.g[...][layer],
      qkv=qkv(layer),
      attn_proj=turned(blocks.attn.proj, layers.FROM_HEADS, layer),
      gain_2=blocks.ln_2.g[...][layer],
      fc=turned(blocks.mlp.fc, layers.TO_INNER, layer),
      mlp_proj=turned(blocks.mlp.proj, layers.FROM_INNER, layer),
    )
    for layer in range(model.config.n_layer)
  ]
  tables = Tables(
    wte=whole(model.wte, ("vocab", "embed")),
    wpe=whole(model.wpe, ("position", "embed")),
    sos=model.sos[...].astype(dtype),
    gain=model.ln_f.g[...],
    wtet=whole(model.wtet, ("vocab", "embed")),
  )
  if _keeps_rows():
    return tables, per_layer
  # Else XLA on a CPU leaves out the cast, and reads float32 at every position.
  return jax.lax.optimization_barrier((tables, per_layer))


def prefill(model: ImageGPT, given_BxP: jax.Array, dtype: str) -> list[KeysValues]:
  """Keys and values of positions 0..P-1, of every layer, in one pass over the given pixels.

  Position 0 is the start vector's, so that the last given pixel is still to be fed.
  """
  config = model.config
  shape = (*given_BxP.shape, config.n_head, config.head_dim)

  def keep(_, x, qkv_3xBxTxE):
    return store(qkv_3xBxTxE[1].reshape(shape), qkv_3xBxTxE[2].reshape(shape), dtype)

  _, stacked = model.hidden(model.embed(given_BxP), collect=keep)
  return [_pin(jax.tree.map(lambda x, at=layer: x[at], stacked)) for layer in range(config.n_layer)]


def room(model: ImageGPT, n: int, length: int, dtype: str) -> list[KeysValues]:
  """Of every layer, with nothing in it yet."""
  config = model.config
  nothing = jax.ShapeDtypeStruct((n, length, config.n_head, config.head_dim), config.dtype)
  abstract = jax.eval_shape(lambda k, v: store(k, v, dtype), nothing, nothing)
  empty = [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)]
  return [_pin(kv) for kv in empty * config.n_layer]


def attend(
  q_NxHxK: jax.Array, given: KeysValues, done: KeysValues, block: KeysValues, last: jax.Array
) -> jax.Array:
  """Attention of one query per sample, float32 [N, H, K].

  Args:
    q_NxHxK: queries.
    given: of B pictures, N / B samples of each.
    done: of the samples' positions before the block.
    block: of the positions from there on, up to and with `last`; what comes after isn't looked at.
    last: index into the block.
  """
  dtype = q_NxHxK.dtype
  q_NxHxK = q_NxHxK.astype(jnp.float32) * q_NxHxK.shape[-1] ** -0.5
  parts = [part for part in (given, done, block) if part.length]
  scores = [_scores(q_NxHxK, part, dtype) for part in parts]
  scores[-1] = jnp.where(jnp.arange(block.length) <= last, scores[-1], -jnp.inf)
  ends = list(itertools.accumulate(part.length for part in parts[:-1]))
  scores = jnp.concatenate(scores, axis=-1)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = jnp.split(weights, ends, axis=-1)
  return sum(_mix(*pair, dtype) for pair in zip(weights, parts, strict=True)) / total


def _scores(q_NxHxK: jax.Array, kv: KeysValues, dtype) -> jax.Array:
  """q k, float32 [N, H, T], of B pictures' keys; int8 ones of rows are multiplied as `dtype`."""
  if kv.in_rows:
    k = _grouped(_floats(kv.k, dtype))
    q = _by_group(_in_places(q_NxHxK), len(k)).astype(k.dtype)
    scores = jnp.einsum("bgme,btge->bgmt", q, k, preferred_element_type="float32")
    scores = _by_head(scores, q_NxHxK.shape[1])
    return scores if kv.k_scale is None else _scaled(scores, kv.k_scale.swapaxes(1, 2))
  k, n_pictures = kv.k.astype(jnp.float32), len(kv.k)
  if n_pictures < len(q_NxHxK):
    scores = _by_sample(jnp.einsum("bhsk,bhkt->bhst", _by_picture(q_NxHxK, n_pictures), k))
  else:
    # A product of one row reads keys faster as a plain sum, and int8 ones in place.
    scores = jnp.sum(q_NxHxK[..., None] * k, axis=2)
  return scores if kv.k_scale is None else _scaled(scores, kv.k_scale)


def _mix(weights_NxHxT: jax.Array, kv: KeysValues, dtype) -> jax.Array:
  """Weighted values, float32 [N, H, K]; as `_scores`."""
  if kv.v_scale is not None:
    scale = kv.v_scale.swapaxes(1, 2) if kv.in_rows else kv.v_scale
    weights_NxHxT = _scaled(weights_NxHxT, scale)
  if kv.in_rows:
    v = _grouped(_floats(kv.v, dtype))
    weights = _by_group(weights_NxHxT, len(v)).astype(v.dtype)
    mixed = jnp.einsum("bgmt,btge->bgme", weights, v, preferred_element_type="float32")
    return _from_places(_by_head(mixed, weights_NxHxT.shape[1]))
  v, n_pictures = kv.v.astype(jnp.float32), len(kv.v)
  if n_pictures < len(weights_NxHxT):
    weights = _by_picture(weights_NxHxT, n_pictures)
    return _by_sample(jnp.einsum("bhst,bhtk->bhsk", weights, v))
  return jnp.sum(weights_NxHxT[..., None] * v, axis=2)


def _scaled(x_NxHxT: jax.Array, scale_BxHxT: jax.Array) -> jax.Array:
  by_picture = x_NxHxT.reshape(len(scale_BxHxT), -1, *x_NxHxT.shape[1:])
  return (by_picture * scale_BxHxT[:, None]).reshape(x_NxHxT.shape)


def _by_picture(x_NxHxA: jax.Array, n_pictures: int) -> jax.Array:
  """[B, H, samples of a picture, A]: what they share is read once for all of them."""
  return x_NxHxA.reshape(n_pictures, -1, *x_NxHxA.shape[1:]).swapaxes(1, 2)


def _by_sample(x_BxHxSxA: jax.Array) -> jax.Array:
  x_BxSxHxA = x_BxHxSxA.swapaxes(1, 2)
  return x_BxSxHxA.reshape(-1, *x_BxSxHxA.shape[2:])


# Rows hold all heads side by side. Taken apart, each head and sample would be a product of one row,
# which accelerators have no units for: they'd turn all keys to float32 first. So each head is a row
# as wide as all of them, zero outside its own channels, and a picture's samples and heads are the
# rows of one product that reads keys as they lie; the zeros cost less than the reading. Heads split
# over devices are as many groups, [B, G, M = S H / G, E / G], which don't meet.


def _floats(x: jax.Array, dtype) -> jax.Array:
  return x.astype(dtype) if x.dtype == jnp.int8 else x  # exact in bfloat16, too


def _grouped(rows_BxTxE: jax.Array) -> jax.Array:
  """[B, T, G, E / G]."""
  return rows_BxTxE.reshape(*rows_BxTxE.shape[:2], parts_around("heads"), -1)


def _by_group(x_NxHxA: jax.Array, n_pictures: int) -> jax.Array:
  """[B, G, M, A]."""
  n, n_head, last = x_NxHxA.shape
  n_groups = parts_around("heads")
  x = x_NxHxA.reshape(n_pictures, n // n_pictures, n_groups, n_head // n_groups, last)
  return x.swapaxes(1, 2).reshape(n_pictures, n_groups, -1, last)


def _by_head(x_BxGxMxA: jax.Array, n_head: int) -> jax.Array:
  """[N, H, A]: `_by_group`'s way back."""
  n_pictures, n_groups, _, last = x_BxGxMxA.shape
  x = x_BxGxMxA.reshape(n_pictures, n_groups, -1, n_head // n_groups, last)
  return x.swapaxes(1, 2).reshape(-1, n_head, last)


def _places(n_head: int, head_dim: int) -> jax.Array:
  """1 at a head's own channels, else 0, [h, E / G] of the h heads of a group."""
  return jnp.repeat(jnp.eye(n_head // parts_around("heads")), head_dim, axis=1)


def _in_places(x_NxHxK: jax.Array) -> jax.Array:
  """Each head's channels where its group's rows have them, [N, H, E / G]."""
  n, n_head, head_dim = x_NxHxK.shape
  places = _places(n_head, head_dim)
  wide = x_NxHxK.reshape(n, -1, 1, places.shape[1]) * places
  return wide.reshape(n, n_head, -1)


def _from_places(x_NxHxE: jax.Array) -> jax.Array:
  """Each head's own channels, [N, H, K]: what others say of them is left out."""
  n, n_head, _ = x_NxHxE.shape
  width = x_NxHxE.shape[2] * parts_around("heads")
  places = _places(n_head, width // n_head)
  own = jnp.sum(x_NxHxE.reshape(n, -1, *places.shape) * places, axis=2)
  return own.reshape(n, n_head, -1)


def decode_step(
  tables: Tables,
  weights: list[Weights],
  before: list[tuple[KeysValues, KeysValues]],
  blocks: list[KeysValues],
  token_N: jax.Array,
  position: jax.Array,
  n_head: int,
) -> tuple[list[KeysValues], jax.Array]:
  """Feeds the pixel before `position`, and returns the logits of the pixel there, [N, n_vocab].

  Args:
    tables, weights: as laid out.
    before: of every layer: what is given, and what was drawn before the block.
    blocks: of every layer: the positions after that, filled before `position`, which is in it.
    token_N: the pixels before `position`; at position 0 the start vector stands for them.
    position: of the pixel to predict; not a given one.
    n_head: of the model.
  """
  embedded = jnp.where(position == 0, tables.sos, tables.wte[token_N])
  stream = _stream(_from_rows(embedded + tables.wpe[position]))
  n = len(token_N)
  updated = []
  for layer, (given, done), block in zip(weights, before, blocks, strict=True):
    qkv = _qkv(_norm(stream, layer.gain_1), layer.qkv)
    q, k, v = qkv.reshape(n, 3, n_head, -1).swapaxes(0, 1)
    at = position - given.length - done.length
    block = put(block, store(k[:, None], v[:, None], block.k.dtype.name), at)
    heads_NxHxK = attend(q, given, done, block, at).astype(stream.dtype)
    stream = _dot(_from_rows(heads_NxHxK.reshape(n, -1)), layer.attn_proj) + stream
    hidden = layers.activation(_dot(_norm(stream, layer.gain_2), layer.fc))
    stream = _stream(_dot(hidden, layer.mlp_proj) + stream)
    updated.append(block)
  wtet = tables.wtet.T if _keeps_rows() else tables.wtet
  return updated, _to_rows(_dot(_norm(stream, tables.gain), wtet, jnp.float32))


# The residual stream of one position is [D, N] on a CPU, and [N, D] elsewhere (see `Weights`).


def _stream(x: jax.Array) -> jax.Array:
  axes = ("batch", "channels")
  return constrain(x, *(axes if _keeps_rows() else axes[::-1]))


def _qkv(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Queries, keys and values, [N, 3, E] or [N, 3 E]."""
  if _keeps_rows():
    return jnp.einsum("nd,dse->nse", x, weight)
  return _to_rows(_dot(x, weight.reshape(-1, weight.shape[-1])))


def _dot(x: jax.Array, weight: jax.Array, dtype=None) -> jax.Array:
  if _keeps_rows():
    return jnp.matmul(x, weight, preferred_element_type=dtype)
  # XLA on a CPU has products of bfloat16 with float32 sums, and makes float32's of all others; also
  # where x was turned round, as a sum is whose first term was: the stream is added last.
  return jnp.matmul(weight, x, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def _from_rows(rows: jax.Array) -> jax.Array:
  return rows if _keeps_rows() else rows.T


def _to_rows(x: jax.Array) -> jax.Array:
  """Columns turned; by themselves, where XLA would turn the product before them, to a slower one."""
  return x if _keeps_rows() else jax.lax.optimization_barrier(x).T


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
  """As the model's norms."""
  return layers.rms_norm(x, gain) if _keeps_rows() else layers.rms_norm(x, gain[:, None], axis=0)
