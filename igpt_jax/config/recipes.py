"""The paper's settings, for config files to begin with."""

from typing import Any

from igpt_jax.config.fields import base

# ILSVRC-2012's training images, and the share of them that the paper trains on while tuning.
_IMAGENET_TRAIN = 1_281_167
_IMAGENET_VALIDATION = 0.04
_IMAGES = 128_000_000  # seen in a run, of any size


def imagenet(size: str, resolution: int, batch_size: int = 0) -> Any:
  """The paper's pretraining on ImageNet (section 3): its images, batch, steps and warm-up.

  With another batch than the paper's (0) as many images are seen, in all and in the warm-up, in other steps.
  """
  config = base()
  config.data.name = "imagenet2012"
  config.data.resolution = resolution
  config.data.augment = "paper"
  config.data.validation = _IMAGENET_VALIDATION
  config.model.size = size
  config.train.batch_size = batch_size or (64 if size == "xl" else 128)
  config.train.steps = _IMAGES // config.train.batch_size
  epoch = _IMAGENET_TRAIN * (1 - _IMAGENET_VALIDATION)
  config.train.warmup_steps = round(epoch / config.train.batch_size)
  config.train.log_every = 100
  config.train.eval_every = 10_000
  config.train.checkpoint_every = 5_000
  config.train.keep_period = 100_000
  return config


def openai_eval(size: str) -> Any:
  """The released checkpoint of a size on the released tokens, where the download job puts them."""
  config = base()
  config.job = "evaluate"
  config.download.model = size
  config.checkpoint = f"downloads/igpt-{size}-1000000/model.ckpt-1000000"
  config.data.name = "tokens"
  config.data.path = "downloads/datasets/imagenet_teX.npy"
  config.data.resolution = 32
  config.model.dtype = "float32"  # as published, and the figures have four decimals
  return config
