"""BERT instead of autoregression: iGPT-S on ImageNet at 32×32, 15% of the pixels masked.

  python -m igpt_jax.main --config configs/imagenet32_s_bert.py --workdir runs/imagenet32_s_bert

Reproduces: Chen et al. 2020, section 4.6, at size S. Learning rate 0.01, as the appendix has it for
S (recalled, not verified).
Hardware: as imagenet32_s.py.
Expect: the paper reports L only (fine-tuned: CIFAR-10 98.6%, ImageNet 66.5%); a linear probe well
below the autoregressive one before fine-tuning.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  config = imagenet("s", 32)
  config.objective = "masked"
  return config
