"""CIFAR-10 at 16×16 by the modern recipe: the model and images of cifar10_16.py, options that gained most.

  python -m igpt_jax.main --config configs/cifar10_16_modern.py --workdir runs/cifar10_16_modern
  … --config.job=probe         # accuracy against layer, beside raw pixels, PCA and random weights
  … --config.data.name=folder --config.data.path=DIR        # the same from DIR/{train,test}/CLASS/*.jpg

Reproduces: nothing of the paper's; each line's gain is that of 500 steps of 16 images, one seed, on this very
task (docs/results.md, "A modern recipe"), in nats per token of validation.
Hardware: one CPU core, an hour and a half. Expect: docs/results.md.
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
  config.model.positions = "rope2d"  # -0.260 alone, -0.151 after 1,500; -0.100 beside Muon
  config.model.value_embeddings = True  # -0.054 alone, -0.020 after 1,500; -0.011 beside both
  config.train.optimizer = "muon"  # -0.539 alone, -0.191 after 1,500 steps
  config.train.schedule = "wsd"  # -0.296 alone, -0.030 after 1,500; -0.043 beside the other three
  config.train.batch_size = 16
  config.train.steps = 5_000
  config.train.learning_rate = 4e-3  # Muon's: 2e-3 +0.094, 8e-3 -0.008
  config.train.warmup_steps = 200
  config.train.eval_every = 500
  config.train.eval_images = 500
  config.train.checkpoint_every = 500
  config.train.progress_images = 8
  config.train.keep_period = 500
  config.evaluate.images = 2_000
  return config
