"""The packaged model itself: what it says of itself, and that it was trained."""

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
  """Far better than chance, log 512 = 6.2, and it expects pixels to lie as they do, not anyhow."""
  folder = ROOT / "igpt_jax" / "demo" / "examples"
  photographs = [Image.open(folder / f"{name}.jpg").resize((16, 16)) for name in PHOTOGRAPHS]
  pixels = np.stack([np.asarray(image) for image in photographs]).reshape(-1, 256, 3)
  order = np.random.default_rng(0).permutation(256)
  whole, shuffled = (p.reshape(-1, 16, 16, 3) for p in (pixels, pixels[:, order]))
  nats = model.nats_per_token(whole)
  assert nats.mean() < 4.5 and nats.max() < 5.5
  assert (nats < model.nats_per_token(shuffled) - 0.5).all()
