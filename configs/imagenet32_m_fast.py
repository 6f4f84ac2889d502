"""iGPT-M on ImageNet at 32×32 with twice the paper's batch: less time on the same chips.

  python -m igpt_jax.main --config configs/imagenet32_m_fast.py --workdir runs/imagenet32_m_fast

Departs from the paper: batches of 256, not 128, and a learning rate of 0.003 × √2 (the square root rule for Adam,
Malladi et al. 2022, arXiv 2205.10287, but for its betas, which stay). Images seen, warm-up in images and all else are
imagenet32_m.py's.
Hardware: as imagenet32_m.py; docs/scale.md has both batches' forecasts.
Expect: unknown: nobody has trained this batch here; about imagenet32_m.py's likelihood if the rule holds.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  config = imagenet("m", 32, batch_size=256)
  config.train.learning_rate = 3e-3 * (256 / 128) ** 0.5
  return config
