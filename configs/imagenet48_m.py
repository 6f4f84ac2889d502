"""iGPT-M on ImageNet at 48×48: beyond the paper's rows, same recipe.

  python -m igpt_jax.main --config configs/imagenet48_m.py --workdir runs/imagenet48_m

Reproduces: its recipe at another size and resolution; 456,468,480 parameters.
Hardware: 9.5e+20 FLOPs in all; 2.2 days of 64 v5e chips at 40% of their peak (arithmetic, not a run).
Expect: nothing published: the paper has no such row.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("m", 48)
