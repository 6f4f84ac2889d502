"""Attention of this project beside other libraries', by the clock of the accelerator that is here.

  pip install tokamax
  python tests/benchmarks/attention_others.py --dtype bfloat16 --batch 32 --length 1024

On a TPU: jax' splash and flash attention, and tokamax'; on a GPU: tokamax'. One device; forward, and
forward and backward, all of them taking turns. What isn't installed, or doesn't take the shape, is told.
(`attention_tpu.py` compares with them by the compiler's count, without a TPU.)
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from igpt_jax.model.attention.dispatch import attention
from igpt_jax.timing.device import take_turns


def heads(qkv: jax.Array, n_head: int) -> jax.Array:
  _, batch, length, width = qkv.shape
  return qkv.reshape(3, batch, length, n_head, width // n_head)


def splash(n_head: int, causal: bool) -> Callable:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  def attend(qkv):
    _, batch, length, width = qkv.shape
    q, k, v = heads(qkv, n_head).swapaxes(2, 3)
    one = (masks.CausalMask if causal else masks.FullMask)((length, length))
    kernel = kernels.make_splash_mha(
      masks.MultiHeadMask([one] * n_head), head_shards=1, q_seq_shards=1
    )
    out = jax.vmap(kernel)(q * (width // n_head) ** -0.5, k, v)
    return out.swapaxes(1, 2).reshape(batch, length, width).astype(qkv.dtype)

  return attend


def flash(n_head: int, causal: bool) -> Callable:
  from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

  def attend(qkv):
    _, batch, length, width = qkv.shape
    q, k, v = heads(qkv, n_head).swapaxes(2, 3)
    out = flash_attention(q, k, v, causal=causal, sm_scale=(width // n_head) ** -0.5)
    return out.swapaxes(1, 2).reshape(batch, length, width)

  return attend


def tokamax(n_head: int, causal: bool) -> Callable:
  import tokamax

  def attend(qkv):
    q, k, v = heads(qkv, n_head)
    return tokamax.dot_product_attention(q, k, v, is_causal=causal).reshape(qkv.shape[1:])

  return attend


def ours(n_head: int, causal: bool) -> Callable:
  return functools.partial(attention, n_head=n_head, causal=causal)


OTHERS = {
  "tpu": {"jax splash": splash, "jax flash": flash, "tokamax": tokamax},
  "gpu": {"tokamax": tokamax},
}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--length", type=int, default=1024)
  parser.add_argument("--heads", type=int, default=8)
  parser.add_argument("--head_dim", type=int, default=64)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--all_positions", action="store_true", help="not causal")
  parser.add_argument("--repeats", type=int, default=5)
  options = parser.parse_args()
  shape = (3, options.batch, options.length, options.heads * options.head_dim)
  qkv = jax.random.normal(jax.random.key(0), shape, jnp.dtype(options.dtype))
  dout = jax.random.normal(jax.random.key(1), shape[1:], qkv.dtype)

  def both(function, qkv, dout):
    out, pull = jax.vjp(function, qkv)
    return out, *pull(dout)

  sides = {}
  for name, make in {"ours": ours, **OTHERS.get(jax.default_backend(), {})}.items():
    try:
      function = make(options.heads, not options.all_positions)
      runs = {
        f"{name}, forward": functools.partial(jax.jit(function), qkv),
        f"{name}, both": functools.partial(jax.jit(functools.partial(both, function)), qkv, dout),
      }
      for run in runs.values():
        jax.block_until_ready(run())
    except Exception as error:  # whatever a library or a compiler says against this shape: told
      print(f"{name} didn't run: {str(error).strip().partition(chr(10))[0][:200]}")
      continue
    sides |= runs
  print(jax.devices()[0].device_kind, shape, options.dtype)
  for name, found in take_turns(sides, options.repeats, lambda done: None).items():
    print(
      f"{name}: {1e3 * found.seconds:.3f} ms ({1e3 * found.fastest:.3f} to {1e3 * found.slowest:.3f})"
    )


if __name__ == "__main__":
  main()
