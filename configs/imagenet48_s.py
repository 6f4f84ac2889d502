"""iGPT-S on ImageNet at 48×48: beyond the paper's rows, same recipe.

  python -m igpt_jax.main --config configs/imagenet48_s.py --workdir runs/imagenet48_s

Reproduces: its recipe at another size and resolution; 77,227,008 parameters.
Hardware: 1.8e+20 FLOPs in all; 1.7 days of 16 v5e chips at 40% of their peak (arithmetic, not a run).
Expect: nothing published: the paper has no such row.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("s", 48)
