"""iGPT-M on ImageNet at 32×32: the paper's row.

  python -m igpt_jax.main --config configs/imagenet32_m.py --workdir runs/imagenet32_m

Reproduces: Chen et al. 2020, iGPT-M at 32×32; 455,157,760 parameters.
Hardware: 3.9e+20 FLOPs in all; 0.9 days of 64 v5e chips at 40% of their peak (arithmetic, not a run).
Expect: test 2.0614 nats/token (openai/image-gpt README); ImageNet linear probe 54.5%.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("m", 32)
