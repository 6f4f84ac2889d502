"""CIFAR-10 at 16×16, 1.7M parameters, 80,000 images seen: what 75 minutes of two CPU cores allow.

  python -m igpt_jax.main --config configs/cifar10_16.py --workdir runs/cifar10_16
  … --config.job=probe         # accuracy against layer, beside raw pixels, PCA and random weights
  … --config.data.name=folder --config.data.path=DIR        # the same from DIR/{train,test}/CLASS/*.jpg

Reproduces: the shape of the paper's figures 2 and 3, in small: features get better with the loss, and
are best between the first and the last layer.
Hardware: two CPU cores, about an hour and a quarter. Expect: docs/results.md.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "cifar10"
  config.data.resolution = 16
  config.palette.path = "default"
  config.model.n_layer = 8
  config.model.n_head = 4
  config.model.n_embd = 128
  config.train.batch_size = 16
  config.train.steps = 5_000
  config.train.learning_rate = 2e-3
  config.train.warmup_steps = 200
  config.train.eval_every = 500
  config.train.eval_images = 500
  config.train.checkpoint_every = 500
  config.train.progress_images = 8
  config.train.keep_period = 500
  config.evaluate.images = 2_000
  return config
