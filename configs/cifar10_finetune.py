"""The paper's fine-tuning on CIFAR-10: both losses, one to one, from a checkpoint of 32×32 images.

  python -m igpt_jax.main --config configs/cifar10_finetune.py --config.checkpoint=RUN --workdir runs/finetune
  … --config.finetune.scratch=True         # the same network from random parameters, to compare with
  … --config.finetune.generative=0.0       # classification alone
  … --config.finetune.layer=12             # head at a middle layer

RUN is a workdir of this program, OpenAI's model.ckpt-N or a Hugging Face directory, autoregressive or
BERT. Everything goes to finetune/ in the workdir (from random parameters: finetune_scratch/).
Reproduces: the paper's section 3.4: batch 128, pretraining's betas, a constant learning rate (here a
tenth of the size's), pad, crop and flip, early stop on a tenth of the training images.
Expect: from OpenAI's iGPT-L, pretrained on ImageNet: 99.0% of test (BERT: 98.6%), as published; not
repeated here.
Hardware: what pretraining of that model takes.
Data: TFDS cifar10; or a folder: --config.data.name=folder --config.data.path=DIR.
"""

from igpt_jax.config import base

_EPOCH = 45_000 // 128


def get_config():
  config = base()
  config.job = "finetune"
  config.data.name = "cifar10"
  config.data.resolution = 32
  config.data.validation = 0.1
  config.finetune.augment = "cifar"
  config.finetune.batch_size = 128
  config.finetune.steps = 50 * _EPOCH
  config.finetune.eval_every = _EPOCH
  config.finetune.patience = 5
  return config
