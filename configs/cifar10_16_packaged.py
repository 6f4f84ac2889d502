"""The model that comes with igpt_jax: CIFAR-10 at 16×16, 6 layers of 128, the modern recipe but for one option.

  python -m igpt_jax.main --config configs/cifar10_16_packaged.py --workdir runs/packaged
  … --config.data.name=folder --config.data.path=DIR        # the same from DIR/{train,test}/CLASS/*.jpg
  python -m igpt_jax.main --config configs/convert.py --config.convert.source=runs/packaged \
    --config.convert.target=igpt_jax/pretrained/assets/cifar10_16.safetensors \
    --config.convert.format=safetensors --config.convert.dtype=bfloat16

With more train.steps a finished run trains longer in place, from before its decay.
Reproduces: nothing of the paper's; Muon and rotary positions gained most in docs/results.md. Without value_embeddings,
which gained least and whose tables would take the file from 2.6 to 3.4 MB.
Hardware: one CPU core, about four hours; beside other work it took 5.7. Expect: docs/results.md.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "cifar10"
  config.data.resolution = 16
  config.palette.path = "default"
  config.model.n_layer = 6
  config.model.n_head = 4
  config.model.n_embd = 128
  config.model.positions = "rope2d"
  config.train.optimizer = "muon"
  config.train.batch_size = 32
  config.train.steps = 8_000
  config.train.learning_rate = 4e-3
  config.train.warmup_steps = 200
  config.train.schedule = "wsd"
  config.train.eval_every = 500
  config.train.eval_images = 1_000
  config.train.checkpoint_every = 500
  config.train.progress_images = 8
  config.evaluate.images = 2_000
  return config
