"""A model of your own photos, sized to them and to this machine: what `bash launch/photos.sh DIR` trains.

  python -m igpt_jax.main --config configs/photos.py --config.data.path=DIR --workdir runs/photos
  … --config.sizing.minutes=50         # trains longer; before the first start: larger images or model, too
  … --config.data.resolution=32        # what is given is kept, the rest is chosen around it
  … --config.sizing.packaged=False     # from random values, however few the photos
  … --config.init_from=CHECKPOINT      # goes on from trained weights: their palette and model

It begins with the model that comes with igpt_jax, unless a setting asks for another one (layers, colours, …) or
many photos and a fast machine allow a larger one. Whatever has its default here is chosen at the first start, from the
time of a step and the number of photos: resolution, model, positions, colours, batch, steps (so that the default
positions, learned, come with sizing.minutes=0 only, which chooses nothing). progress/STEP.png shows
held-out photos as the model completes them, the first within a minute of the first step.
Hardware: any; on two CPU cores 12 minutes. Expect: from 200 photos, colours, light and edges that go on
in a likely way, few things: these need more photos, or larger weights.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "folder"
  config.data.path = "photos"
  config.data.augment = "photo"
  config.palette.images = 1_000
  config.sizing.minutes = 12.0
  config.sizing.packaged = True  # far ahead of random values (docs/results.md)
  config.train.progress_images = 8
  config.sample.top_p = 0.98  # without the unlikeliest colours; with fewer, samples become blank
  config.evaluate.images = 500
  config.evaluate.baseline_images = 5_000
  config.complete.n = 4
  return config
