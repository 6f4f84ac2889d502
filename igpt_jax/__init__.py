"""Image GPT in JAX: pretraining transformers on raw pixels (Chen et al. 2020)."""

__version__ = "0.1.0"
