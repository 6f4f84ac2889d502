"""CIFAR-10 at 16×16: how compute is best spent between parameters and images, at toy sizes, with intervals.

  python -m igpt_jax.main --config configs/isoflop_cifar10_16.py --workdir runs/isoflop_cifar10_16
  … --config.data.name=folder --config.data.path=DIR        # the same from DIR/{train,test}/CLASS/*.jpg
  … --config.isoflop.budget=1e15          # also writes isoflop_1e15.py, a config for that many FLOPs

Reproduces: the method of Yan et al. 2025 (arXiv 2511.08704), who released no code, at budgets of a laptop and with
a modern recipe. Hardware: two CPU cores, an hour and a half with JAX_NUM_CPU_DEVICES=2. Expect: isoflop.md, runs.csv,
isoflop.json and four pictures; docs/results.md has what was found.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.job = "isoflop"
  config.data.name = "cifar10"
  config.data.resolution = 16
  config.palette.size = 64
  config.model.positions = "rope2d"
  config.model.value_embeddings = True
  config.train.optimizer = "muon"
  config.train.schedule = "wsd"
  config.train.batch_size = 16
  # One rate for every width, in the standard parametrisation: with Muon 8e-3 was within 0.005 nats of the best
  # rate at widths 64, 128 and 256, and at 8 layers of 128 better than the recipe's 4e-3 by 0.008 (docs/results.md).
  # CompleteP wants heads of one size, which widths of 12 to 56 can't all have.
  config.train.learning_rate = 8e-3
  config.train.warmup_steps = 50
  config.train.eval_every = 0
  config.train.eval_images = 2_000
  config.train.checkpoint_every = 500
  config.train.max_to_keep = 1
  config.train.keep_period = 0
  config.train.progress_images = 0
  config.train.log_every = 20
  config.isoflop.budgets = (3e11, 1e12, 3e12, 1e13)
  config.isoflop.held_out = 3e13
  return config
