"""Prepares a TFDS data set once, so that training reads it in any order and without TensorFlow.

launch/prepare_data.sh runs this in an environment of its own with the `prepare` extra. What was
downloaded is kept and ready splits are left alone, so an interrupted preparation can be repeated.
"""

from igpt_jax.config.fields import Settings
from igpt_jax.data import tfds_prepare as prepare_lib
from igpt_jax.data.sources import SPLITS, has_validation, open_split
from igpt_jax.parallel.hosts import say


def run(settings: Settings, workdir: str) -> None:
  """Prepares `data.name` in `data.data_dir`; archives fetched by hand lie in `data.manual_dir`."""
  del workdir  # prepared data outlives any run
  data = settings.data
  folder = prepare_lib.prepare(data.name, data.data_dir, data.manual_dir)
  say(f"{data.name}: ready in {folder}")
  for split in SPLITS:
    if split != "validation" or has_validation(data):
      say(f"  {open_split(data, split).fingerprint}")
