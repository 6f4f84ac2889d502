"""The workdir that an early version left in the middle of a run (see jobs/test_frozen.py)."""

from igpt_jax.config.read import settings_of
from support.paths import TESTS
from support.quickstart import load_config

FROZEN = TESTS / "frozen" / "quickstart"


SETTINGS = {
  "train.progress_images": 0,  # came later
  "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "train.steps": 80, "train.log_every": 10,
  "train.eval_every": 40, "train.checkpoint_every": 40,
}  # fmt: skip


def config_of():
  config = load_config("quickstart")
  config.update_from_flattened_dict(SETTINGS)
  return settings_of(config)
