"""CIFAR-10 at 16×16, 500 steps of 16 images: which recipe reaches the lowest loss with the same FLOPs.

  python -m igpt_jax.main --config configs/ablate_cifar10_16.py --workdir runs/ablate_cifar10_16
  … --config.data.name=folder --config.data.path=DIR        # the same from DIR/{train,test}/CLASS/*.jpg
  … --config.ablate.seeds="(0, 1, 2)"                       # goes on with two more seeds
  … --config.ablate.workdirs="('runs/a', 'runs/b')"         # compares two finished runs of job pretrain

Reproduces: nothing of the paper's: options of this program, each against the paper's recipe.
Hardware: one CPU core, 5 minutes for each run and seed: an hour and a half. Expect: ablate.md, ablate.csv and ablate.png.
"""

from igpt_jax.config import base

# Each option alone, beside the paper's recipe; each optimizer's learning rate is its own.
RUNS = (
  "original:",
  "adam_lr1e-3: train.learning_rate=1e-3",
  "adam_lr2.8e-3: train.learning_rate=2.8e-3",
  "adam_lr4e-3: train.learning_rate=4e-3",
  "adam_lr8e-3: train.learning_rate=8e-3",
  "adam_b2_0.99_lr2e-3: train.b2=0.99",
  "adam_b2_0.99_lr4e-3: train.b2=0.99 train.learning_rate=4e-3",
  "adam_b2_0.99_lr8e-3: train.b2=0.99 train.learning_rate=8e-3",
  "b2_rule: train.b2=0",
  "wsd: train.schedule=wsd",
  "axial: model.positions=axial",
  "rope2d: model.positions=rope2d",
  "qk_norm: model.qk_norm=True",
  "value_embeddings: model.value_embeddings=True",
  "x0_skip: model.x0_skip=True",
  "muon_lr2e-3: train.optimizer=muon",
  "muon_lr4e-3: train.optimizer=muon train.learning_rate=4e-3",
  "muon_lr8e-3: train.optimizer=muon train.learning_rate=8e-3",
)


def get_config():
  config = base()
  config.job = "ablate"
  config.data.name = "cifar10"
  config.data.resolution = 16
  config.palette.path = "default"
  config.model.n_layer = 8
  config.model.n_head = 4
  config.model.n_embd = 128
  config.train.batch_size = 16
  config.train.steps = 500
  config.train.learning_rate = 2e-3
  config.train.warmup_steps = 50
  config.train.eval_every = 250
  config.train.eval_images = 1_000
  config.train.checkpoint_every = 500
  config.train.max_to_keep = 1
  config.train.keep_period = 0
  config.train.progress_images = 0
  config.train.log_every = 10
  config.evaluate.images = 2_000
  config.ablate.runs = RUNS
  config.ablate.seeds = (0,)
  return config
