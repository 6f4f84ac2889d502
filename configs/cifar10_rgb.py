"""CIFAR-10 at 32×32 in raw RGB: bits per dimension beside the density literature's.

  python -m igpt_jax.main --config configs/cifar10_rgb.py --workdir runs/cifar10_rgb
  … --config.job=evaluate                        # bits/dim of all 10,000 test images
  … --config.data.token_kind=subpixels           # three positions a pixel, as the Sparse Transformer has them

Reproduces: nothing; stands beside the Sparse Transformer's 59M parameters at 2.80 bits/dim (Child et al. 2019;
PixelCNN++ 2.92, Image Transformer 2.90, PixelSNAIL 2.85): 58M here, 32 layers instead of 128, dense attention over
a third of the positions. It has dropout of 0.25, and there is none here: expect to overfit, and keep the
checkpoint with the best validation. Modern recipe as in imagenet32_s_modern.py, without value_embeddings, whose
tables would be 9M more parameters; its learning rate wasn't tuned at this size.
Hardware: one accelerator; by forecast one v5e chip takes 1.08 s a step, 14 hours in all, and 9.3 GiB
(`--config.job=compile --config.compile.topology=v5e:1x1`).
Expect: unknown. The likelihood is exact: 256 levels a channel, no palette, no dequantisation.
Data: TFDS cifar10; images re-encoded as JPEG have another likelihood. No augmentation: a flip or a crop would be
another distribution than the test images'.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "cifar10"
  config.data.resolution = 32
  config.data.token_kind = "channels"
  config.data.validation = 0.02  # 1,000 images
  config.model.n_layer = 32
  config.model.n_head = 6
  config.model.n_embd = 384
  config.model.positions = "rope2d"
  config.train.optimizer = "muon"
  config.train.schedule = "wsd"
  config.train.batch_size = 128
  config.train.steps = 46_000  # 120 epochs, the Sparse Transformer's
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = 383  # one epoch
  config.train.eval_every = 1_000
  config.train.eval_images = 1_000
  config.train.checkpoint_every = 1_000
  config.train.keep_period = 5_000
  return config
