"""One start of a run on a TPU slice that isn't here, as far as its training step: compiled, and kept.

python -m support.tpu_start FOLDER BATCH DEPTH      # DEPTH frames deeper in the stack than at 0
"""

import sys

from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import compilation_cache
from support.tpu_programs import step_text

# Heads of 64 and 256 tokens: the fused attention kernel is in the program, and what it says of itself.
MODEL = ImageGPTConfig(n_layer=2, n_head=2, n_embd=128, n_positions=256, dtype="bfloat16")


def deeper(batch: int, depth: int) -> None:
  """Starts from further down the stack, as a run that goes on may."""
  if depth:
    deeper(batch, depth - 1)
  else:
    assert "tpu_custom_call" in step_text(MODEL, "v5e:4x4", (-1, 1, 1), batch=batch)


if __name__ == "__main__":
  compilation_cache.use(sys.argv[1], workdir="")
  deeper(*map(int, sys.argv[2:]))
