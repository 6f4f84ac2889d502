"""Photos, and machines of any speed, for tests of sizes."""

import pytest

from igpt_jax.training import compilation
from igpt_jax.workspace import sizing
from support.sizing import folder_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  return folder_of(tmp_path_factory.mktemp("data"), 200)


@pytest.fixture
def machine(monkeypatch):
  """Makes the machine one of so many FLOP/s; returns the sizes that are timed on it."""
  timed = []

  def of_speed(speed):
    def seconds(settings, model, mesh):
      timed.append((settings.data.resolution, model.n_embd, settings.train.batch_size))
      return compilation.flops_per_image(model) * settings.train.batch_size / speed

    monkeypatch.setattr(sizing, "step_seconds", seconds)
    return timed

  return of_speed
