"""Image GPT in JAX: pretraining transformers on raw pixels (Chen et al. 2020)."""

from igpt_jax import cpu_compiler

__version__ = "0.1.0"

cpu_compiler.avoid_wrong_fusions()
