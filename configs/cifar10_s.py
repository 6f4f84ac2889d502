"""iGPT-S on CIFAR-10 alone at 32×32.

  python -m igpt_jax.main --config configs/cifar10_s.py --workdir runs/cifar10_s

Reproduces: the paper's recipe without its ImageNet; augmented by padding, cropping and flipping, as
the paper fine-tunes on CIFAR (the paper pretrains on ImageNet only).
Hardware: one accelerator; 7.0e13 FLOPs a step of 128.
Expect: a linear probe of about 67% on CIFAR-10 has been reported for an iGPT-S of CIFAR-10 alone;
96.3% is iGPT-L's, pretrained on ImageNet.
Data: TFDS cifar10; or a folder: --config.data.name=folder --config.data.path=DIR.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "cifar10"
  config.data.resolution = 32
  config.data.augment = "cifar"
  config.model.size = "s"
  config.train.batch_size = 128
  config.train.steps = 35_000  # about 100 epochs
  config.train.warmup_steps = 351  # one
  config.train.checkpoint_every = 1_000
  return config
