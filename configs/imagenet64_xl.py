"""iGPT-XL on ImageNet at 64×64: the paper's row.

  python -m igpt_jax.main --config configs/imagenet64_xl.py --workdir runs/imagenet64_xl

Reproduces: Chen et al. 2020, iGPT-XL at 64×64; 6,810,875,904 parameters.
Hardware: 2.4e+22 FLOPs in all; 23.4 days of 64 v5p chips at 40% of their peak (arithmetic, not a run).
Expect: ImageNet linear probe 68.7% from one layer, 72.0% from five; no likelihood was
  published. The paper adds 100M web images to ImageNet, which nobody else has.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("xl", 64)
