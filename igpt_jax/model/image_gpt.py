"""Image GPT, by default as the released code has it (openai/image-gpt, src/model.py).

Pre-norm blocks with scale-only RMS norms, x·sigmoid(1.702x), no biases, learned absolute positions
in raster order, an untied output table. A causal model shifts its input by a learned start vector
and predicts every pixel; a BERT model sees the pixels that a mask leaves visible. What later work
changed is optional (`ImageGPTConfig`).

The layers are stacked on axis 0 and scanned, so that compilation doesn't grow with depth.
Parameters carry logical axis names (`axes`); `parallel.sharding` maps those to the mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from igpt_jax.model import fused_stack, layers
from igpt_jax.model.attention.dispatch import SAVED_NAMES, choose
from igpt_jax.model.block import Block, RMSNorm, normal
from igpt_jax.model.codes import Heads
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.model.options import Embedded
from igpt_jax.model.parametrisation import initialised
from igpt_jax.model.projection import Einsum, sharded_einsum
from igpt_jax.parallel.sharding import constrain, gather_weight

_KEPT_NAMES = ("qkv", "mlp_in", *SAVED_NAMES)
_REMAT_POLICIES = {
  "names": jax.checkpoint_policies.save_only_these_names(*_KEPT_NAMES),
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(_KEPT_NAMES),
    offload_src="device",
    offload_dst="pinned_host",
  ),
  "full": None,
}

Params = dict[str, Any]

_TO_LOGITS = Einsum(
  "btd,vd->btv", layers.STREAM, ("vocab", "embed"), ("batch", "length", "vocab"), "float32"
)

Collect = Callable[[Block, jax.Array, jax.Array], Any]  # (block, its input, its qkv) -> pytree


class ImageGPT(nnx.Module):
  """Model of tokens [B, T] -> logits [B, T, n_vocab]: a distribution over the palette at each position.

  Where a position has several codes (`config.tokens`), tokens are [B, T, codes] and logits [B, T, codes,
  n_vocab], of each code given those before it. Its embedding is the sum of theirs.

  Initial values are the released code's: wte N(0, .02), wpe N(0, .01), sos N(0, .02), q, k, v
  N(0, 1/sqrt(D)), attention's output N(0, 1/sqrt(D·layers)), both MLP matrices N(0, .02), output
  table 0, gains 1. (The paper's text says "as in the Sparse Transformer"; the code is what made
  the published numbers.)
  """

  def __init__(self, config: ImageGPTConfig, *, rngs: nnx.Rngs):
    self.config = config
    width = config.n_embd
    rows, codes = config.tokens.rows, config.tokens.codes
    self.wte = normal(rngs, (rows, width), 0.02 / math.sqrt(codes), ("vocab", "embed"))
    tables = position_tables(config)
    for name, length in tables.items():
      # Their sum varies as the learned table does.
      table = normal(rngs, (length, width), 0.01 / math.sqrt(len(tables)), ("position", "embed"))
      setattr(self, name, table)
    if config.causal:
      self.sos = normal(rngs, (width,), 0.02, ("norm",))
    self.blocks = jax.vmap(lambda r: Block(config, r))(rngs.split(config.n_layer))
    self.ln_f = RMSNorm(width)
    self.wtet = nnx.Param(jnp.zeros((rows, width), jnp.float32), axes=("vocab", "embed"))
    if codes > 1:
      self.heads = Heads(config, rngs)

  def __call__(self, tokens_BxT: jax.Array, keep_BxT: jax.Array | None = None) -> jax.Array:
    """Returns float32 logits; position t's distribution is over tokens[:, t].

    Args:
      tokens_BxT: palette indices in raster order, T ≤ n_positions. Causal: logits at t depend on
        tokens before t alone, and a code's on those before it at t.
      keep_BxT: BERT only: True where the pixel is visible; elsewhere its embedding is zeroed and
        its position remains.
    """
    final, _ = self.hidden(self.embed(tokens_BxT, keep_BxT))
    return self.logits(final, tokens_BxT)

  def embed(self, tokens_BxT: jax.Array, keep_BxT: jax.Array | None = None) -> Embedded:
    """Returns the embeddings of tokens [B, T]; `keep_BxT` as in `__call__`."""
    dtype = jnp.dtype(self.config.dtype)
    batch, length = tokens_BxT.shape[:2]
    # Rows are looked up in float32, then cast: the other way round their gradients, sums over all
    # pixels of a batch, would be summed in bfloat16 and stall after a few hundred summands.
    # The tables are small, so gather them whole: otherwise the partitioner moves the activations.
    table = gather_weight(self.wte[...], "vocab", "embed")
    x = layers.lookup_codes(self.config.tokens, table, tokens_BxT, layers.STREAM).astype(dtype)
    x = constrain(x, *layers.STREAM)
    visible = jnp.ones((batch, length), bool)
    if self.config.causal:
      if keep_BxT is not None:
        raise ValueError("a causal model takes no mask: every pixel is predicted from those before")
      start = jnp.broadcast_to(self.sos[...], (batch, 1, x.shape[-1])).astype(dtype)
      x = jnp.concatenate([start, x[:, :-1]], axis=1)
      of_codes = ((0, 0),) * (tokens_BxT.ndim - 2)
      tokens_BxT = jnp.pad(tokens_BxT, ((0, 0), (1, 0), *of_codes))[:, :-1]
      visible = visible.at[:, :1].set(False)
    elif keep_BxT is not None:
      x = x * keep_BxT[..., None].astype(dtype)
      visible = keep_BxT.astype(bool)
    table = self.position_table()
    if table is not None:
      positions = jnp.broadcast_to(table[:length], x.shape).astype(dtype)
      x = x + positions
    return Embedded(constrain(x, *layers.STREAM), tokens_BxT, visible)

  def position_table(self) -> jax.Array | None:
    """Returns what is added at each position, float32 [n_positions, D], whole; None: nothing is."""

    def whole(table: nnx.Param) -> jax.Array:
      return gather_weight(table[...], "position", "embed")

    tables = {name: whole(getattr(self, name)) for name in position_tables(self.config)}
    if not tables:
      return None
    n_positions = self.config.n_positions
    if "wpe" in tables:
      return tables["wpe"]
    if "wpe_row" not in tables:
      return jnp.tile(tables["wpe_channel"], (n_positions // len(tables["wpe_channel"]), 1))
    by_place = tables["wpe_row"][:, None] + tables["wpe_column"]
    if "wpe_channel" in tables:
      by_place = by_place[:, :, None] + tables["wpe_channel"]
    return by_place.reshape(n_positions, -1)

  def hidden(self, embedded: Embedded, collect: Collect | None = None) -> tuple[jax.Array, Any]:
    """Runs all blocks and the final norm.

    Args:
      embedded: embeddings.
      collect: called in each block; its results are stacked over layers.

    Returns:
      The final norm's output [B, T, D], and the collected results ([L, ...] leaves, or None).
    """
    config = self.config
    x_BxTxD: Any = embedded.stream
    if collect is None and (kernel := fused_kernel(config, x_BxTxD)):
      blocks = nnx.to_pure_dict(nnx.state(self.blocks, nnx.Param))
      x_BxTxD = fused_stack.run(config, blocks, embedded, kernel == "tpu_interpret")
      return self.ln_f(x_BxTxD), None

    if config.x0_skip:  # its gradient is summed over layers, which bfloat16 would round
      embedded = embedded._replace(stream=embedded.stream.astype(jnp.float32))

    def body(x, block):
      x = block.enter(x, embedded)
      y, qkv = block(x, embedded)
      y = constrain(y, *layers.STREAM)
      return y, None if collect is None else collect(block, x, qkv)

    if config.remat != "none":
      body = jax.checkpoint(body, prevent_cse=False, policy=_REMAT_POLICIES[config.remat])
    x_BxTxD, collected = jax.lax.scan(body, x_BxTxD, self.blocks)
    return self.ln_f(x_BxTxD), collected

  def logits(self, final: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Maps the final norm's output [B, T, D] to float32 logits, [B, T, n_vocab] or [B, T, codes, n_vocab].

    A code's logits depend on the codes before it at its position alone, of those in `tokens_BxT`.
    """
    if self.config.tokens.codes > 1:
      return self.heads(final, tokens_BxT, self.wtet[...])
    return sharded_einsum(_TO_LOGITS, final, self.wtet[...])

  def features(
    self, tokens_BxT: jax.Array, keep_BxT: jax.Array | None = None, grid: int = 1
  ) -> jax.Array:
    """Returns the probe's features f^l = mean over positions of n^l, float32 [n_layer + 1, B, grid² D].

    n^l is the norm applied to block l's input, and the final norm's output for l = n_layer
    (paper, section 2.3 and 3.4).

    Args:
      tokens_BxT: whole square images.
      keep_BxT: as in `__call__`.
      grid: the means are taken over grid × grid blocks of pixels and concatenated.
    """
    batch, length = tokens_BxT.shape[:2]
    spec = self.config.tokens
    side = spec.side(length) // grid  # of a block of pixels
    blocks = (batch, grid, side, grid, side * spec.per_pixel, -1)

    def pool(n):
      return n.astype(jnp.float32).reshape(blocks).mean((2, 4)).reshape(batch, -1)

    final, pooled = self.hidden(
      self.embed(tokens_BxT, keep_BxT), collect=lambda block, x, _: pool(block.ln_1(x))
    )
    return jnp.concatenate([pooled, pool(final)[None]])


def position_tables(config: ImageGPTConfig) -> dict[str, int]:
  """Returns the tables whose rows are added up at each position, name -> number of rows."""
  spec = config.tokens
  if not config.tables_by_place:
    return {"wpe": config.n_positions}
  side, tables = spec.side(config.n_positions), {}
  if config.positions != "rope2d":
    tables = {"wpe_row": side, "wpe_column": side}
  if spec.per_pixel > 1:
    tables["wpe_channel"] = spec.per_pixel
  return tables


def fused_kernel(config: ImageGPTConfig, x_BxTxD: jax.Array | jax.ShapeDtypeStruct) -> str:
  """Returns the kernel with which `fused_stack` computes all blocks; "": they are scanned."""
  qkv = jax.ShapeDtypeStruct((3, *x_BxTxD.shape), x_BxTxD.dtype)
  kernel = config.attention if config.attention != "auto" else choose(qkv, config.n_head)
  return kernel if config.remat == "names" and kernel.startswith("tpu") else ""


def init_params(config: ImageGPTConfig, key: jax.Array) -> Params:
  """Returns random parameters: a nested dict of float32 arrays, layers stacked on axis 0 of "blocks"."""
  released = nnx.to_pure_dict(nnx.state(ImageGPT(config, rngs=nnx.Rngs(key)), nnx.Param))
  return initialised(released, config.scale)


@functools.lru_cache(maxsize=32)
def _abstract(config: ImageGPTConfig):
  return nnx.split(nnx.eval_shape(lambda: ImageGPT(config, rngs=nnx.Rngs(0))), nnx.Param, ...)


def bind(config: ImageGPTConfig, params: Params) -> ImageGPT:
  """Returns the model with these parameters (arrays or tracers)."""
  graphdef, abstract, rest = _abstract(config)
  state = jax.tree.map(lambda leaf: leaf, abstract)
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state, rest)


def param_axes(config: ImageGPTConfig) -> Params:
  """Returns the logical axis names of every parameter, in the structure of `init_params`' dict."""
  _, abstract, _ = _abstract(config)

  def names(path, variable):
    stacked = ("layers",) if path[0] == "blocks" else ()
    return stacked + variable.get_metadata()["axes"]

  flat = {path: names(path, variable) for path, variable in nnx.to_flat_state(abstract)}
  return traverse_util.unflatten_dict(flat)


def abstract_params(config: ImageGPTConfig) -> Params:
  """Returns the shapes and dtypes of the parameters without allocating them."""
  return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def compute_dtypes(config: ImageGPTConfig) -> Params:
  """Returns the dtype in which each parameter is multiplied: the config's.

  float32 for gains, and for tables of which several rows are summed up first: of a position's codes, or of
  its row and column.
  """
  places = position_tables(config)
  whole = {"g", *(places if len(places) > 1 else ())}
  if config.tokens.codes > 1:
    whole |= {"wte", "value_embed", "seen"}

  def dtype_of(path, leaf):
    return leaf.dtype if path[-1].key in whole else jnp.dtype(config.dtype)

  return jax.tree_util.tree_map_with_path(dtype_of, abstract_params(config))


def to_compute_dtypes(config: ImageGPTConfig, params: Params) -> Params:
  """Casts parameters for inference: with bfloat16 half the memory, and the same results.

  Args:
    config: the model's.
    params: float32 arrays. Each one that is cast is deleted.
  """

  def convert(leaf, dtype):
    if leaf.dtype == dtype:
      return leaf
    converted = jax.block_until_ready(leaf.astype(dtype))
    leaf.delete()
    return converted

  return jax.tree.map(convert, params, compute_dtypes(config))


def count_params(config: ImageGPTConfig) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
