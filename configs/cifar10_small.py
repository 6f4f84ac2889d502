"""CIFAR-10 at 16×16 with a model small enough for a CPU: colour completions in minutes.

  python -m igpt_jax.main --config configs/cifar10_small.py --workdir runs/cifar10_small
  … --config.job=sample        # completions.png
  … --config.data.name=folder --config.data.path=DIR        # the same from DIR/{train,test}/CLASS/*.jpg

Reproduces: nothing; it shows the whole path on real colour images.
Hardware: any CPU. Expect: docs/results.md.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "cifar10"
  config.data.resolution = 16
  config.palette.size = 128
  config.palette.images = 5_000
  config.model.n_layer = 4
  config.model.n_head = 4
  config.model.n_embd = 128
  config.train.batch_size = 16
  config.train.steps = 600
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = 50
  config.train.log_every = 20
  config.train.eval_every = 200
  config.train.eval_images = 512
  config.train.checkpoint_every = 200
  config.train.progress_images = 8
  config.evaluate.images = 1_000
  config.features.images = 2_000
  config.lowdata.labels_per_class = (1, 4, 25, 100)  # 2,000 images have about 200 of each class
  return config
