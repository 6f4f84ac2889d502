"""iGPT-L on ImageNet at 64×64: beyond the paper's rows, same recipe.

  python -m igpt_jax.main --config configs/imagenet64_l.py --workdir runs/imagenet64_l

Reproduces: its recipe at another size and resolution; 1,366,969,344 parameters.
Hardware: 5.2e+21 FLOPs in all; 10.3 days of 32 v5p chips at 40% of their peak (arithmetic, not a run).
Expect: nothing published: the paper has no such row.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("l", 64)
