"""Handwritten digits, 8×8, 17 grey levels: the whole of igpt_jax in minutes on a laptop.

  bash launch/local.sh

Data: scikit-learn's 1,797 digits (nothing to download). Hardware: any CPU.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "digits"
  config.data.resolution = 8
  config.data.augment = "shift"  # 1,347 training images are few
  config.palette.size = 17  # all the grey levels there are
  config.model.n_layer = 4
  config.model.n_head = 4
  config.model.n_embd = 64
  config.train.batch_size = 32
  config.train.steps = 1_000
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = 42  # one epoch
  config.train.log_every = 50
  config.train.eval_every = 250
  config.train.checkpoint_every = 250
  config.train.progress_images = 8
  config.lowdata.labels_per_class = (1, 4, 10, 25, 100)
  return config
