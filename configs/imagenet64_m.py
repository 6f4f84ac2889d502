"""iGPT-M on ImageNet at 64×64: beyond the paper's rows, same recipe.

  python -m igpt_jax.main --config configs/imagenet64_m.py --workdir runs/imagenet64_m

Reproduces: its recipe at another size and resolution; 458,303,488 parameters.
Hardware: 1.9e+21 FLOPs in all; 4.4 days of 64 v5e chips at 40% of their peak (arithmetic, not a run).
Expect: nothing published: the paper has no such row.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("m", 64)
