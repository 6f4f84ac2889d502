"""The packaged model itself: its size, what it says of itself, and that it was trained."""

import numpy as np
import pytest
from PIL import Image

import igpt_jax
from igpt_jax.config.fields import FIELDS
from igpt_jax.data.palette import Palette
from igpt_jax.pretrained import packaged, weight_files
from support.paths import ROOT

pytestmark = pytest.mark.skipif(
  not packaged.FILE.exists(),
  reason=f"THE PACKAGED MODEL IS NOT TESTED: there is no {packaged.FILE}",
)

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket")


@pytest.fixture(scope="module")
def model():
  return igpt_jax.load()


def test_it_has_at_most_3_megabytes():
  assert packaged.FILE.stat().st_size <= 3_000_000


def test_it_is_what_its_readme_says(model):
  info = model.info
  assert (model.resolution, info.run["objective"], info.config.causal) == (
    16,
    "autoregressive",
    True,
  )
  np.testing.assert_array_equal(info.palette, Palette.default().centers)
  assert info.step > 0 and "45000 of 50000" in info.run["data"]["fingerprint"]
  specs = weight_files.open_safetensors(str(packaged.FILE.parent), [packaged.FILE.name]).specs
  assert {dtype.name for name, (_, dtype) in specs.items() if name.startswith("params/")} == {
    "bfloat16"
  }


def test_it_tells_no_places_of_the_machine_that_it_was_made_on(model):
  config = model.info.run["config"]
  for name in (name for name, declaration in FIELDS.items() if declaration.path):
    group, _, field = name.rpartition(".")
    assert "/" not in (config[group] if group else config)[field], name


def test_it_was_trained_on_photographs(model):
  """Far better than chance, log 512, and than the colours' frequencies, about 6: by what is where, and upright."""
  folder = ROOT / "igpt_jax" / "demo" / "examples"
  photographs = [np.asarray(Image.open(folder / f"{name}.jpg")) for name in PHOTOGRAPHS]
  nats = model.nats_per_token(photographs)
  assert nats.mean() < 4.5 and nats.max() < 5.5
  assert nats.mean() < model.nats_per_token([image[::-1] for image in photographs]).mean()
