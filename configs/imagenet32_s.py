"""iGPT-S on ImageNet at 32×32: the paper's row.

  python -m igpt_jax.main --config configs/imagenet32_s.py --workdir runs/imagenet32_s

Reproduces: Chen et al. 2020, iGPT-S at 32×32; 76,571,648 parameters.
Hardware: 6.9e+19 FLOPs in all; 0.6 days of 16 v5e chips at 40% of their peak (arithmetic, not a run).
Expect: test 2.0895 nats/token (openai/image-gpt README); ImageNet linear probe 41.9%.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("s", 32)
