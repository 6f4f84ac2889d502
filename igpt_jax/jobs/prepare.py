"""Prepares a TFDS data set once, so that training reads it in any order and without TensorFlow.

launch/prepare_data.sh runs this in an environment of its own with the `prepare` extra. What was
downloaded is kept and ready splits are left alone, so an interrupted preparation can be repeated.
`config.prepare.short_side` makes a copy of it with smaller training images, shard by shard.
"""

import dataclasses

from igpt_jax.config.fields import Settings
from igpt_jax.data import smaller, tfds_prepare
from igpt_jax.data.sources import SPLITS, has_validation, open_split
from igpt_jax.parallel.hosts import say


def run(settings: Settings, workdir: str) -> None:
  """Prepares `data.name` in `data.data_dir`; archives fetched by hand lie in `data.manual_dir`."""
  del workdir  # prepared data outlives any run
  data, wanted = settings.data, settings.prepare
  folder = tfds_prepare.prepare(data.name, data.data_dir, data.manual_dir)
  say(f"{data.name}: ready in {folder}")
  if wanted.short_side:
    recipe = smaller.Recipe(wanted.short_side, wanted.quality)
    copies = wanted.target or smaller.copy_of(data.data_dir, recipe)
    folder = smaller.make(folder, data.data_dir, copies, recipe, say)
    data = dataclasses.replace(data, data_dir=copies)
    say(f"{data.name}: a smaller copy in {folder}; use it by --config.data.data_dir={copies}")
  for split in SPLITS:
    if split != "validation" or has_validation(data):
      say(f"  {open_split(data, split).fingerprint}")
