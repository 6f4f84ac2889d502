"""Rewrites a checkpoint in another format: this program's own, OpenAI's or Hugging Face's.

  python -m igpt_jax.main --config configs/convert.py \
    --config.convert.source=downloads/igpt-s-1000000/model.ckpt-1000000 \
    --config.convert.target=runs/openai_s --config.convert.format=orbax

Formats: orbax (a workdir that every job takes as --config.checkpoint), safetensors (the same as one file,
without paths of this machine, to be handed on; --config.convert.dtype=bfloat16 halves it), huggingface (a
directory that transformers loads), openai (a TensorFlow checkpoint's prefix, such as out/model.ckpt-1000000).
The palette travels along, or comes from --config.palette.path. Nothing is overwritten.
Hardware: no accelerator; memory for the weights and a half more (L: 8 GB), twice them to orbax.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.job = "convert"
  return config
