"""Completes your own images, of any format, with any trained checkpoint.

  python -m igpt_jax.main --config configs/complete.py --config.complete.images=my.jpg --workdir runs/my
  python -m igpt_jax.main --config configs/complete.py --config.checkpoint=runs/cifar10_16 \
    --config.complete.images='my/*.jpg' --config.complete.keep=0.5 --config.complete.n=8 --workdir runs/mine

Without a checkpoint, named or in the workdir, the model that comes with igpt_jax is used.
`images` is a file, a glob in quotes, or a folder (CLASS/*.jpg: a grid for each class); without it, n
images are drawn from nothing. The upper `keep` of the rows is given; a BERT checkpoint fills any region:
--config.complete.hide=upper, left, right, centre, or an image that is white where to fill (cropped to its centre square,
as the others are). Leaves grid.png and, for each image, its samples as PNGs, an animation of their pixels appearing, and JSON with seeds and nats per
token. Interrupted, the same command goes on with the rest. How to draw: --config.sample.temperature,
top_k, top_p; how many at a time: --config.sample.batch_size.
Expect: eight completions each of six images in 14 s of two CPU cores, start and compiling included,
with 16×16 pixels and a model of cifar10_16's size.
Hardware: any.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.job = "complete"
  return config
