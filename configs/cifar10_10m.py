"""10M parameters on CIFAR-10 at 32×32: the run that minGPT published a training curve for.

  python -m igpt_jax.main --config configs/cifar10_10m.py --workdir runs/cifar10_10m

Reproduces: karpathy/minGPT, play_image notebook: 12 layers, 8 heads, width 256, palette of 512
colours, batch 128, learning rate 3e-3, betas (0.9, 0.95), no decay, 10 epochs of the training
images (here 90% of them: a tenth is validation).
Hardware: one GPU or TPU chip. 1.0e13 FLOPs a step; on a v5e chip 8.6 of 15.75 GiB and 12 minutes in all,
as job compile predicts (a batch of 512 on v5e:2x2, 0.20 s a step).
Expect: its last-batch training loss after each epoch, nats/token: 2.511, 2.304, 2.179, 2.110, 2.064,
2.032, 2.009, 1.987, 1.978, 1.973 (its own palette: comparable, not equal).
Data: TFDS cifar10; or a folder: --config.data.name=folder --config.data.path=DIR.
"""

from igpt_jax.config import base

_EPOCH = 45_000 // 128


def get_config():
  config = base()
  config.data.name = "cifar10"
  config.data.resolution = 32
  config.model.n_layer = 12
  config.model.n_head = 8
  config.model.n_embd = 256
  config.train.batch_size = 128
  config.train.steps = 10 * _EPOCH
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = _EPOCH
  config.train.eval_every = _EPOCH
  config.train.eval_images = 5_000
  config.train.checkpoint_every = _EPOCH
  return config
