"""iGPT-XL on ImageNet at 48×48: beyond the paper's rows, same recipe.

  python -m igpt_jax.main --config configs/imagenet48_xl.py --workdir runs/imagenet48_xl

Reproduces: its recipe at another size and resolution; 6,805,370,880 parameters.
Hardware: 1.3e+22 FLOPs in all; 12.6 days of 64 v5p chips at 40% of their peak (arithmetic, not a run).
Expect: nothing published: the paper has no such row.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("xl", 48)
