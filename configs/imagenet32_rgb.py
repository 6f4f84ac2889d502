"""Downsampled ImageNet at 32×32 in raw RGB: bits per dimension beside the density literature's.

  python -m igpt_jax.main --config configs/imagenet32_rgb.py --workdir runs/imagenet32_rgb
  … --config.job=evaluate                        # bits/dim of all 49,999 images of its validation, the test here
  … --config.data.token_kind=subpixels

Reproduces: nothing; stands beside PixelSNAIL 3.80 (Chen et al. 2017) and Image Transformer 3.77 (Parmar et al.
2018) with iGPT-S' shape: 24 layers of 512, `channels`: 1,024 positions.
Hardware: by forecast 16 chips of v5e take 54 ms a step, 7.5 hours in all, and 2.1 GiB a chip
(`--config.job=compile --config.compile.topology=v5e:4x4`).
Expect: unknown. The likelihood is exact: 256 levels a channel, no palette, no dequantisation.
Data: TFDS downsampled_imagenet/32x32, the images of van den Oord et al. 2016 ("Pixel Recurrent Neural Networks"), which
those figures are of. Another downsampling, such as imagenet_resized/32x32 or this program's of imagenet2012, is
smoother or rougher and its bits aren't comparable. image-net.org no longer has the archives (tensorflow/datasets#4662
tells where else): job prepare takes them from data.manual_dir and verifies their checksums. There are no labels:
probes need another data set.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "downsampled_imagenet/32x32"
  config.data.resolution = 32
  config.data.token_kind = "channels"
  config.data.validation = 0.01
  config.model.size = "s"
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
