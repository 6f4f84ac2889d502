"""Image GPT, as the released code has it (openai/image-gpt, src/model.py).

Pre-norm blocks with scale-only RMS norms, x·sigmoid(1.702x), no biases, learned absolute positions
in raster order, an untied output table. A causal model shifts its input by a learned start vector
and predicts every pixel; a BERT model sees the pixels that a mask leaves visible.

The layers are stacked on axis 0 and scanned, so that compilation doesn't grow with depth.
Parameters carry logical axis names (`axes`); `parallel.sharding` maps those to the mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.errors import UserError
from igpt_jax.model import fused_stack, layers
from igpt_jax.model.attention.dispatch import SAVED_NAMES, attention, choose
from igpt_jax.model.parametrisation import Scale, initialised, scale_of
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
REMAT_POLICIES = ("none", *_REMAT_POLICIES)

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ImageGPTConfig:
  """Configuration of a model. Parameters are float32 whatever `dtype` is.

  Attributes:
    n_layer, n_head, n_embd: depth, heads, width.
    n_vocab: palette size; also the number of output classes per pixel.
    n_positions: pixels of an image, height × width.
    causal: autoregressive, with a start vector; False: BERT, neither shift nor start vector.
    dtype: dtype of activations and matmuls, "float32" or "bfloat16".
    remat: policy of what the backward pass recomputes: "none" keeps all activations, "names" keeps the
      matmuls' and the attention's outputs, "offload" keeps those in the host's memory, "full" keeps
      one vector per block and position.
    attention: one of `attention.dispatch.IMPLEMENTATIONS`.
    parametrisation: one of `parametrisation.PARAMETRISATIONS`: what initial values and learning rates
      depend on, not what the model computes.
    base_embd, base_layer: complete_p: the shape at which it is the standard one.
  """

  n_layer: int
  n_head: int
  n_embd: int
  n_vocab: int = 512
  n_positions: int = 1024
  causal: bool = True
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  parametrisation: str = "standard"
  base_embd: int = 0
  base_layer: int = 0

  def __post_init__(self):
    for name in ("n_layer", "n_head", "n_embd", "n_vocab", "n_positions"):
      if getattr(self, name) < 1:
        raise UserError(f"model.{name}: {getattr(self, name)}; expected a positive number")
    if self.n_vocab < 2:
      raise UserError(
        f"model.n_vocab: {self.n_vocab}; expected 2 colours or more: one is no choice"
      )
    if self.n_embd % self.n_head:
      fits = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
      nearest = sorted(sorted(fits, key=lambda h: abs(h - self.n_head))[:3])
      raise UserError(
        f"model.n_embd: {self.n_embd} isn't divisible by model.n_head: {self.n_head}; "
        f"expected heads that divide it, such as {', '.join(map(str, nearest))}"
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(f"model.dtype: {self.dtype!r}; expected 'float32' or 'bfloat16'")
    if self.remat not in REMAT_POLICIES:
      raise UserError(f"model.remat: {self.remat!r}; expected one of {', '.join(REMAT_POLICIES)}")
    _ = self.scale  # raises if its settings have a mistake

  @property
  def scale(self) -> Scale:
    """Its shape's ratio to the base shape."""
    return scale_of(
      self.parametrisation,
      n_embd=self.n_embd,
      n_layer=self.n_layer,
      base_embd=self.base_embd,
      base_layer=self.base_layer,
    )

  @property
  def head_dim(self) -> int:
    return self.n_embd // self.n_head


@dataclasses.dataclass(frozen=True)
class Preset:
  """Shape of a published model and its learning rates (paper, section 3.3 and appendix).

  `remat` is the fastest policy with which the paper's batch fits on 16 chips of the smallest memory
  (XL: on 256), according to compiled programs; on a CPU it is the fastest of all.
  """

  n_layer: int
  n_embd: int
  n_head: int
  learning_rate: float
  learning_rate_masked: float
  remat: str


# XL's number of heads isn't published. 24 heads of 128 fill the 128 lanes of a TPU's matrix unit
# and of a GPU's fused attention, where S, M, L's own head sizes (64, 128, 96) don't all do.
# BERT learning rates for S, M, L are from the paper's appendix; XL was never trained as BERT and
# takes the autoregressive rate.
PRESETS = {
  "s": Preset(24, 512, 8, 3e-3, 1e-2, "names"),
  "m": Preset(36, 1024, 8, 3e-3, 3e-3, "names"),
  "l": Preset(48, 1536, 16, 1e-3, 1e-3, "names"),
  "xl": Preset(60, 3072, 24, 3e-4, 3e-4, "full"),
}


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, axes: tuple[str, ...]):
  return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


_TO_LOGITS = Einsum(
  "btd,vd->btv", layers.STREAM, ("vocab", "embed"), ("batch", "length", "vocab"), "float32"
)


class RMSNorm(nnx.Module):
  """x · rsqrt(mean(x²) + 1e-5) · g, in float32. The paper calls it layer norm."""

  def __init__(self, width: int):
    self.g = nnx.Param(jnp.ones((width,), jnp.float32), axes=("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:
    return layers.rms_norm(x, self.g[...])


class Attention(nnx.Module):
  """Multi-head self-attention without biases; q, k and v come from one matmul."""

  def __init__(self, config: ImageGPTConfig, rngs: nnx.Rngs):
    self.config = config
    width = config.n_embd
    self.qkv = _normal(rngs, (3, width, width), 1 / math.sqrt(width), layers.TO_QKV.weight_axes)
    self.proj = _normal(
      rngs, (width, width), 1 / math.sqrt(width * config.n_layer), layers.FROM_HEADS.weight_axes
    )

  def project_qkv(self, x_BxTxD: jax.Array) -> jax.Array:
    """[B, T, D] -> queries, keys and values, [3, B, T, n_head * head_dim]."""
    return checkpoint_name(sharded_einsum(layers.TO_QKV, x_BxTxD, self.qkv[...]), "qkv")

  def project_out(self, heads_BxTxE: jax.Array) -> jax.Array:
    return sharded_einsum(layers.FROM_HEADS, heads_BxTxE, self.proj[...])


class MLP(nnx.Module):
  """D -> 4D -> D with x·sigmoid(1.702x) between."""

  def __init__(self, config: ImageGPTConfig, rngs: nnx.Rngs):
    width = config.n_embd
    self.fc = _normal(rngs, (width, 4 * width), 0.02, layers.TO_INNER.weight_axes)
    self.proj = _normal(rngs, (4 * width, width), 0.02, layers.FROM_INNER.weight_axes)

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = checkpoint_name(sharded_einsum(layers.TO_INNER, x, self.fc[...]), "mlp_in")
    return sharded_einsum(layers.FROM_INNER, layers.activation(hidden), self.proj[...])


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ImageGPTConfig, rngs: nnx.Rngs):
    self.config = config
    self.ln_1 = RMSNorm(config.n_embd)
    self.attn = Attention(config, rngs)
    self.ln_2 = RMSNorm(config.n_embd)
    self.mlp = MLP(config, rngs)

  def __call__(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the block's output [B, T, D] and the queries, keys and values it used [3, B, T, E]."""
    config = self.config
    qkv = self.attn.project_qkv(self.ln_1(x_BxTxD))
    heads = attention(
      qkv, n_head=config.n_head, causal=config.causal, implementation=config.attention
    )
    return self.finish(x_BxTxD, heads), qkv

  def finish(self, x: jax.Array, heads: jax.Array) -> jax.Array:
    """Applies the rest of the block to its input x and the heads' outputs, both [B, T, D]."""
    x = x + self.attn.project_out(heads)
    return x + self.mlp(self.ln_2(x))


Collect = Callable[[Block, jax.Array, jax.Array], Any]  # (block, its input, its qkv) -> pytree


class ImageGPT(nnx.Module):
  """Model of tokens [B, T] -> logits [B, T, n_vocab]: a distribution over the palette at each position.

  Initial values are the released code's: wte N(0, .02), wpe N(0, .01), sos N(0, .02), q, k, v
  N(0, 1/sqrt(D)), attention's output N(0, 1/sqrt(D·layers)), both MLP matrices N(0, .02), output
  table 0, gains 1. (The paper's text says "as in the Sparse Transformer"; the code is what made
  the published numbers.)
  """

  def __init__(self, config: ImageGPTConfig, *, rngs: nnx.Rngs):
    self.config = config
    width = config.n_embd
    self.wte = _normal(rngs, (config.n_vocab, width), 0.02, ("vocab", "embed"))
    self.wpe = _normal(rngs, (config.n_positions, width), 0.01, ("position", "embed"))
    if config.causal:
      self.sos = _normal(rngs, (width,), 0.02, ("norm",))
    self.blocks = jax.vmap(lambda r: Block(config, r))(rngs.split(config.n_layer))
    self.ln_f = RMSNorm(width)
    self.wtet = nnx.Param(jnp.zeros((config.n_vocab, width), jnp.float32), axes=("vocab", "embed"))

  def __call__(self, tokens_BxT: jax.Array, keep_BxT: jax.Array | None = None) -> jax.Array:
    """Returns float32 logits; position t's distribution is over tokens[:, t].

    Args:
      tokens_BxT: palette indices in raster order, T ≤ n_positions. Causal: logits at t depend on
        tokens before t alone.
      keep_BxT: BERT only: True where the pixel is visible; elsewhere its embedding is zeroed and
        its position remains.
    """
    final, _ = self.hidden(self.embed(tokens_BxT, keep_BxT))
    return self.logits(final)

  def embed(self, tokens_BxT: jax.Array, keep_BxT: jax.Array | None = None) -> jax.Array:
    """Returns token plus position embeddings [B, T, D], shifted right by the start vector if causal."""
    dtype = jnp.dtype(self.config.dtype)
    batch, length = tokens_BxT.shape
    # Rows are looked up in float32, then cast: the other way round their gradients, sums over all
    # pixels of a batch, would be summed in bfloat16 and stall after a few hundred summands.
    # The tables are small, so gather them whole: otherwise the partitioner moves the activations.
    x = gather_weight(self.wte[...], "vocab", "embed")[tokens_BxT].astype(dtype)
    x = constrain(x, *layers.STREAM)
    if self.config.causal:
      if keep_BxT is not None:
        raise ValueError("a causal model takes no mask: every pixel is predicted from those before")
      start = jnp.broadcast_to(self.sos[...], (batch, 1, x.shape[-1])).astype(dtype)
      x = jnp.concatenate([start, x[:, :-1]], axis=1)
    elif keep_BxT is not None:
      x = x * keep_BxT[..., None].astype(dtype)
    positions = gather_weight(self.wpe[...], "position", "embed")[:length]
    positions = jnp.broadcast_to(positions, x.shape).astype(dtype)
    return constrain(x + positions, *layers.STREAM)

  def hidden(self, x_BxTxD: jax.Array, collect: Collect | None = None) -> tuple[jax.Array, Any]:
    """Runs all blocks and the final norm.

    Args:
      x_BxTxD: embeddings.
      collect: called in each block; its results are stacked over layers.

    Returns:
      The final norm's output [B, T, D], and the collected results ([L, ...] leaves, or None).
    """
    config = self.config
    qkv = jax.ShapeDtypeStruct((3, *x_BxTxD.shape), x_BxTxD.dtype)
    kernel = config.attention if config.attention != "auto" else choose(qkv, config.n_head)
    if collect is None and config.remat == "names" and kernel.startswith("tpu"):
      blocks = nnx.to_pure_dict(nnx.state(self.blocks, nnx.Param))
      interpret = kernel == "tpu_interpret"
      x_BxTxD = fused_stack.run(blocks, x_BxTxD, config.n_head, config.causal, interpret)
      return self.ln_f(x_BxTxD), None

    def body(x, block):
      y, qkv = block(x)
      y = constrain(y, *layers.STREAM)
      return y, None if collect is None else collect(block, x, qkv)

    if config.remat != "none":
      body = jax.checkpoint(body, prevent_cse=False, policy=_REMAT_POLICIES[config.remat])
    x_BxTxD, collected = jax.lax.scan(body, x_BxTxD, self.blocks)
    return self.ln_f(x_BxTxD), collected

  def logits(self, final: jax.Array) -> jax.Array:
    """Maps the final norm's output [B, T, D] to float32 logits [B, T, n_vocab]."""
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
    batch, length = tokens_BxT.shape
    side = math.isqrt(length) // grid  # of a block of pixels
    blocks = (batch, grid, side, grid, side, -1)

    def pool(n):
      return n.astype(jnp.float32).reshape(blocks).mean((2, 4)).reshape(batch, -1)

    final, pooled = self.hidden(
      self.embed(tokens_BxT, keep_BxT), collect=lambda block, x, _: pool(block.ln_1(x))
    )
    return jnp.concatenate([pooled, pool(final)[None]])


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
  """Returns the dtype in which each parameter is multiplied: the config's; float32 for norms' gains."""

  def dtype_of(path, leaf):
    return leaf.dtype if path[-1].key == "g" else jnp.dtype(config.dtype)

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
