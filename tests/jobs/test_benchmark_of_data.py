"""The measurements run, and cover what they say they cover."""

import dataclasses

import pytest

from igpt_jax.data import palette, sources, tfds_source
from igpt_jax.timing import input
from igpt_jax.tokens import TokenSpec

TOKENS = TokenSpec(palette=palette.Palette.default())


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
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(tfds_source.OWN, "photo_patches", "support.photo_patches")
    return sources.open_split(config, "train"), config


def test_every_stage_is_measured(patches):
  split, config = patches
  costs = input.stages(split, config, TOKENS, n_images=20, repeats=1)
  names = [c.stage for c in costs]
  assert names[:2] == ["read", "decode"] and names[-1] == "encode"
  assert "augment (paper, fused)" in names
  for cost in costs:
    assert cost.cpu_ms > 0


def test_throughput_of_both_forms(patches):
  split, config = patches
  for form in ("fused", "literal"):
    settings = dataclasses.replace(config, resample=form)
    found = input.throughput(split, settings, TOKENS, batch_size=16, n_batches=2)
    assert found.pipeline == f"paper, {form}"
    assert found.cpu_ms > 0 and found.images_per_second > 0 and found.workers == 0
