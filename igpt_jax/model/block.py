"""A block of the transformer: attention and MLP, each after a norm and added to the residual stream."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.model import layers, options
from igpt_jax.model.attention.dispatch import attention
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.model.options import Embedded
from igpt_jax.model.projection import sharded_einsum


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, axes: tuple[str, ...]):
  """Returns a parameter with random values."""
  return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def _arrays(module: nnx.Module) -> dict:
  """Returns a module's parameters by name, as `init_params` names them."""
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))


class RMSNorm(nnx.Module):
  """x · rsqrt(mean(x²) + 1e-5) · g, in float32. The paper calls it layer norm."""

  def __init__(self, width: int):
    self.g = nnx.Param(jnp.ones((width,), jnp.float32), axes=("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:
    return layers.rms_norm(x, self.g[...])


class Gain(nnx.Module):
  """Factor of every channel, 0 at first."""

  def __init__(self, width: int):
    self.g = nnx.Param(jnp.zeros((width,), jnp.float32), axes=("norm",))


class Attention(nnx.Module):
  """Multi-head self-attention without biases; q, k and v come from one matmul."""

  def __init__(self, config: ImageGPTConfig, rngs: nnx.Rngs):
    self.config = config
    width = config.n_embd
    self.qkv = normal(rngs, (3, width, width), 1 / math.sqrt(width), layers.TO_QKV.weight_axes)
    self.proj = normal(
      rngs, (width, width), 1 / math.sqrt(width * config.n_layer), layers.FROM_HEADS.weight_axes
    )
    if config.qk_norm:
      self.q_norm, self.k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)
    if config.value_embeddings:
      zeros = jnp.zeros((config.tokens.rows, width), jnp.float32)
      self.value_embed = nnx.Param(zeros, axes=("vocab", "heads_rows"))

  def project_qkv(self, x_BxTxD: jax.Array, embedded: Embedded) -> jax.Array:
    """[B, T, D] -> queries, keys and values as attention takes them, [3, B, T, n_head * head_dim]."""
    qkv = checkpoint_name(sharded_einsum(layers.TO_QKV, x_BxTxD, self.qkv[...]), "qkv")
    return options.change_qkv(self.config, _arrays(self), qkv, embedded)

  def project_out(self, heads_BxTxE: jax.Array) -> jax.Array:
    return sharded_einsum(layers.FROM_HEADS, heads_BxTxE, self.proj[...])


class MLP(nnx.Module):
  """D -> 4D -> D with x·sigmoid(1.702x) between."""

  def __init__(self, config: ImageGPTConfig, rngs: nnx.Rngs):
    width = config.n_embd
    self.fc = normal(rngs, (width, 4 * width), 0.02, layers.TO_INNER.weight_axes)
    self.proj = normal(rngs, (4 * width, width), 0.02, layers.FROM_INNER.weight_axes)

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = checkpoint_name(sharded_einsum(layers.TO_INNER, x, self.fc[...]), "mlp_in")
    return sharded_einsum(layers.FROM_INNER, layers.activation(hidden), self.proj[...])


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ImageGPTConfig, rngs: nnx.Rngs):
    self.config = config
    if config.x0_skip:
      self.x0 = Gain(config.n_embd)
    self.ln_1 = RMSNorm(config.n_embd)
    self.attn = Attention(config, rngs)
    self.ln_2 = RMSNorm(config.n_embd)
    self.mlp = MLP(config, rngs)

  def enter(self, x: jax.Array, embedded: Embedded) -> jax.Array:
    """Returns what the block computes on, [B, T, D], from the output of the one before."""
    return options.enter(self.config, _arrays(self), x, embedded)

  def __call__(self, x_BxTxD: jax.Array, embedded: Embedded) -> tuple[jax.Array, jax.Array]:
    """Returns the block's output [B, T, D] and the queries, keys and values it used [3, B, T, E].

    Args:
      x_BxTxD: from `enter`.
      embedded: the model's embeddings.
    """
    config = self.config
    qkv = self.attn.project_qkv(self.ln_1(x_BxTxD), embedded)
    heads = attention(
      qkv, n_head=config.n_head, causal=config.causal, implementation=config.attention
    )
    return self.finish(x_BxTxD, heads), qkv

  def finish(self, x: jax.Array, heads: jax.Array) -> jax.Array:
    """Applies the rest of the block to its input x and the heads' outputs, both [B, T, D]."""
    x = x + self.attn.project_out(heads)
    return x + self.mlp(self.ln_2(x))
