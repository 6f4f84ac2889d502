"""iGPT-L on ImageNet at 32×32: the paper's row.

  python -m igpt_jax.main --config configs/imagenet32_l.py --workdir runs/imagenet32_l

Reproduces: Chen et al. 2020, iGPT-L at 32×32; 1,362,250,752 parameters.
Hardware: 1.1e+21 FLOPs in all; 2.2 days of 32 v5p chips at 40% of their peak (arithmetic, not a run).
Expect: test 2.0466 nats/token (openai/image-gpt README); linear probes: ImageNet 60.3%,
  CIFAR-10 96.3%, CIFAR-100 82.8%, STL-10 95.5%.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  return imagenet("l", 32)
