"""The measurements run, and cover what they say they cover."""

import dataclasses

import numpy as np
import pytest

from igpt_jax.data import palette, sources
from igpt_jax.timing import input


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
  pytest.importorskip("skimage")
  config = sources.DataConfig(
    name="photo_patches",
    data_dir=str(tmp_path_factory.mktemp("tfds")),
    resolution=32,
    augment="paper",
    validation=0.04,
    threads=1,
  )
  return sources.open_split(config, "train"), config


def test_every_stage_is_measured(patches):
  split, config = patches
  costs = input.stages(split, config, palette.Palette.default(), n_pictures=20, repeats=1)
  names = [c.stage for c in costs]
  assert names[:2] == ["read", "decode"] and names[-1] == "encode"
  assert "augment (paper, fused)" in names
  for cost in costs:
    assert cost.cpu_ms > 0
    assert cost.pictures_per_core_second == pytest.approx(1000 / cost.cpu_ms)


def test_throughput_of_both_forms(patches):
  split, config = patches
  colors = palette.Palette.default()
  sizes = {"batch_size": 16, "n_batches": 2}
  fused = input.throughput(split, config, colors, **sizes)
  literal = input.throughput(
    split, dataclasses.replace(config, resample="literal"), colors, literal_pillow=True, **sizes
  )
  assert fused.pipeline == "paper, fused" and literal.pipeline == "literal, Pillow"
  for result in (fused, literal):
    assert result.cpu_ms > 0 and result.pictures_per_second > 0 and result.workers == 0


def test_the_pillow_form_makes_the_same_kind_of_picture(patches):
  split, config = patches
  pillow = input.PillowSplit(split, config.resolution)
  image = pillow[0]["image"]
  assert image.shape == (32, 32, 3) and image.dtype == np.uint8
  assert pillow[0]["label"] == split[0]["label"]
