"""iGPT-S on ImageNet at 64×64: beyond the paper's rows, same recipe.

  python -m igpt_jax.main --config configs/imagenet64_s.py --workdir runs/imagenet64_s

Reproduces: its recipe at another size and resolution; 78,144,512 parameters.
Hardware: 4.0e+20 FLOPs in all; 3.6 days of 16 v5e chips at 40% of their peak (arithmetic, not a run).
Expect: nothing published: the paper has no such row.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("s", 64)
