"""A model of your own photos, sized to them and to this machine: what `bash launch/photos.sh DIR` trains.

  python -m igpt_jax.main --config configs/photos.py --config.data.path=DIR --workdir runs/photos
  … --config.sizing.minutes=50         # trains longer; before the first start: a larger model, too
  … --config.init_from=CHECKPOINT      # goes on from trained weights: their resolution, palette and model
  … --config.init_from=packaged --config.data.resolution=32   # from the model that comes with igpt_jax: best for few
  … --config.data.resolution=32        # what is given is kept, the rest is chosen around it

Whatever has its default here is chosen at the first start, from the time of a step and the number of
photos: resolution, model, colours, batch, steps. progress/STEP.png shows held-out photos as the model completes
them, the first within a minute of the first step.
Hardware: any; on two CPU cores 12 minutes. Expect: from 200 photos, colours and light that go on
smoothly, no things: these need more photos, or trained weights.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.data.name = "folder"
  config.data.path = "photos"
  config.data.augment = "photo"
  config.model.positions = (
    "rope2d"  # sees the pixel above as soon as the one to the left (docs/results.md)
  )
  config.palette.images = 1_000
  config.sizing.minutes = 12.0
  config.train.progress_images = 8
  config.sample.top_p = 0.95  # without the unlikeliest colours, which a small model draws too often
  config.evaluate.images = 500
  config.evaluate.baseline_images = 5_000
  config.complete.n = 4
  return config
