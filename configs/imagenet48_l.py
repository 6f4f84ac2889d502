"""iGPT-L on ImageNet at 48×48: the paper's row.

  python -m igpt_jax.main --config configs/imagenet48_l.py --workdir runs/imagenet48_l

Reproduces: Chen et al. 2020, iGPT-L at 48×48; 1,364,216,832 parameters.
Hardware: 2.7e+21 FLOPs in all; 5.3 days of 32 v5p chips at 40% of their peak (arithmetic, not a run).
Expect: ImageNet linear probe 65.2%; no likelihood was published.
Learning rate: 0.001, as at 32×32. Third-party notes on the paper read 0.01, which looks like a slip.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("l", 48)
