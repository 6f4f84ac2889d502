"""iGPT-XL on ImageNet at 32×32: beyond the paper's rows, same recipe.

  python -m igpt_jax.main --config configs/imagenet32_xl.py --workdir runs/imagenet32_xl

Reproduces: its recipe at another size and resolution; 6,801,438,720 parameters.
Hardware: 5.5e+21 FLOPs in all; 5.4 days of 64 v5p chips at 40% of their peak (arithmetic, not a run).
Expect: nothing published: the paper has no such row.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("xl", 32)
