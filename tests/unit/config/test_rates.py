"""The learning rate: as set, else the size's for its objective."""

import pytest

from igpt_jax.config import choices
from igpt_jax.model.model_config import PRESETS
from support.tiny import settings_of


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize("objective", ["autoregressive", "masked"])
def test_a_rate_of_ones_own_comes_before_the_sizes(size, objective):
  changes = {"model.size": size, "objective": objective}
  preset = PRESETS[size]
  of_size = preset.learning_rate_masked if objective == "masked" else preset.learning_rate
  assert choices.optimizer_config(settings_of(changes=changes)).learning_rate == of_size
  own = settings_of(changes={**changes, "train.learning_rate": 0.125})
  assert choices.optimizer_config(own).learning_rate == 0.125
