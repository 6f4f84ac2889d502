"""iGPT-XL on ImageNet at 64×64 with four times the paper's batch: less time on the same chips.

  python -m igpt_jax.main --config configs/imagenet64_xl_fast.py --workdir runs/imagenet64_xl_fast

Departs from the paper: batches of 256, not 64, and a learning rate of 0.0003 × √4 (the square root rule for Adam,
Malladi et al. 2022, arXiv 2205.10287, but for its betas, which stay). Images seen, warm-up in images and all else are
imagenet64_xl.py's.
Hardware: 64 chips of v5p, or 256 of v5e or v6e, over which the paper's batch doesn't divide (docs/scale.md).
Expect: unknown: nobody has trained this batch here; about imagenet64_xl.py's features if the rule holds.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  config = imagenet("xl", 64, batch_size=256)
  config.train.learning_rate = 3e-4 * (256 / 64) ** 0.5
  return config
