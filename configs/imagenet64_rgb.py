"""Downsampled ImageNet at 64×64 in raw RGB: bits per dimension beside the density literature's.

  python -m igpt_jax.main --config configs/imagenet64_rgb.py --workdir runs/imagenet64_rgb
  … --config.job=evaluate                        # bits/dim of all 49,999 images of its validation, the test here

Reproduces: nothing; stands beside the Sparse Transformer's 152M parameters at 3.44 bits/dim (Child et al. 2019),
Perceiver AR and MEGABYTE 3.40, Jet 3.66: 48 layers of 512 as the first has, `channels`: 4,096 positions of dense
attention, where it has 12,288 of sparse. `--config.data.token_kind=subpixels` has those 12,288 as well.
Hardware: by forecast 16 chips of v5e take 0.70 s a step, 4.1 days in all, and 2.9 GiB a chip
(`--config.job=compile --config.compile.topology=v5e:4x4`).
Expect: unknown. The likelihood is exact: 256 levels a channel, no palette, no dequantisation.
Data: TFDS downsampled_imagenet/64x64, the images of van den Oord et al. 2016; see imagenet32_rgb.py.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "downsampled_imagenet/64x64"
  config.data.resolution = 64
  config.data.token_kind = "channels"
  config.data.validation = 0.01
  config.model.size = "s"
  config.model.n_layer = 48
  config.model.positions = "rope2d"
  config.train.optimizer = "muon"
  config.train.schedule = "wsd"
  config.train.batch_size = 128
  config.train.steps = 500_000  # 50 epochs
  config.train.warmup_steps = 10_000
  config.train.log_every = 100
  config.train.eval_every = 10_000
  config.train.checkpoint_every = 5_000
  config.train.keep_period = 100_000
  return config
