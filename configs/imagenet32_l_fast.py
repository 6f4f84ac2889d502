"""iGPT-L on ImageNet at 32×32 with twice the paper's batch: less time on the same chips of v5p or v6e.

  python -m igpt_jax.main --config configs/imagenet32_l_fast.py --workdir runs/imagenet32_l_fast

Departs from the paper: batches of 256, not 128, and a learning rate of 0.001 × √2 (the square root rule for Adam,
Malladi et al. 2022, arXiv 2205.10287, but for its betas, which stay). Images seen, warm-up in images and all else are
imagenet32_l.py's.
Hardware: 16 chips of v5p or v6e (docs/scale.md has both batches' forecasts); on 16 of v5e it would recompute all, and
the paper's batch is the better one.
Expect: unknown: nobody has trained this batch here; about imagenet32_l.py's likelihood if the rule holds.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  config = imagenet("l", 32, batch_size=256)
  config.train.learning_rate = 1e-3 * (256 / 128) ** 0.5
  return config
