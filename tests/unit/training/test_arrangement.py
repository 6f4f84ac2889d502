"""The rule for mesh and remat: what it chooses for the published models, and its arithmetic."""

import dataclasses

import pytest

from igpt_jax.model.model_config import PRESETS, ImageGPTConfig
from igpt_jax.parallel import hardware
from igpt_jax.parallel.hardware import kind_of
from igpt_jax.parallel.sharding import make_mesh
from igpt_jax.training import arrangement
from support.tiny import Chip

GIB = 2**30


def mesh_of(chip, data, fsdp, tensor=1):
  devices = [Chip(n, kind_of(chip)) for n in range(data * fsdp * tensor)]
  return make_mesh(data, fsdp, tensor, devices=devices)


def model_of(size, side=32, **changes):
  shape = {name: getattr(PRESETS[size], name) for name in ("n_layer", "n_head", "n_embd")}
  own = {"dtype": "bfloat16", "remat": "names"}
  return ImageGPTConfig(**shape, n_positions=side**2, **own | changes)


def fsdp_of(size, chip, devices, tensor=1, slices=1):
  return arrangement.fsdp(model_of(size), 0, devices, kind_of(chip), tensor, slices)


@pytest.mark.parametrize(
  ("size", "side", "chip", "data", "fsdp", "batch", "remat", "gib"),
  [
    ("s", 32, "v5e", 16, 1, 128, "names", 3.35), ("s", 32, "v5e", 2, 8, 128, "names", 1.89),
    ("s", 32, "v5e", 2, 2, 128, "names", 8.01), ("s", 32, "v5e", 2, 2, 128, "full", 2.53),
    ("m", 32, "v5e", 16, 1, 128, "names", 14.78), ("m", 32, "v5e", 1, 8, 128, "names", 11.78),
    ("l", 32, "v5e", 2, 8, 128, "names", 14.02), ("l", 32, "v5e", 1, 4, 128, "full", 14.60),
    ("l", 48, "v5e", 8, 8, 128, "names", 9.5), ("xl", 64, "v5e", 8, 32, 256, "full", 7.2),
    ("xl", 64, "v5p", 2, 32, 64, "names", 18.08), ("xl", 64, "v5p", 1, 64, 64, "full", 5.14),
    ("xl", 64, "v5p", 2, 32, 256, "names", 57.8), ("s", 32, "v6e", 2, 8, 128, "names", 1.3),
    ("m", 32, "v6e", 2, 8, 128, "names", 4.4), ("l", 32, "v6e", 2, 8, 128, "names", 10.1),
    ("xl", 64, "v6e", 8, 32, 256, "names", 14.0),
  ],
)  # fmt: skip
def test_memory_by_arithmetic_is_near_the_compilers(
  size, side, chip, data, fsdp, batch, remat, gib
):
  """Beside what job compile said that a chip must hold (docs/scale.md)."""
  model, images = model_of(size, side, remat=remat), batch // (data * fsdp)
  needed = arrangement.step_bytes(model, images, kind_of(chip), fsdp) / GIB
  assert needed == pytest.approx(gib, rel=0.25)
  if remat == "names" and fsdp > 1:  # the rule trusts it
    assert needed > arrangement._STEP_SHARE * gib


def test_tensor_divides_what_an_image_keeps():
  model, kind = model_of("s"), kind_of("v5e")
  held = [arrangement.step_bytes(model, 8, kind, tensor, tensor) for tensor in (1, 2)]
  logits = 8 * 1024 * 512 * 10  # whole on every device
  assert held[1] - logits == pytest.approx((held[0] - logits) / 2)


def test_float32_keeps_twice_as_much():
  halves = [model_of("s", dtype=dtype) for dtype in ("bfloat16", "float32")]
  held = [
    arrangement.step_bytes(model, 8, "TPU v5e", 8) - arrangement.state_bytes(model, 8)
    for model in halves
  ]
  logits = 8 * 1024 * 512 * 10
  assert held[1] - logits == pytest.approx(2 * (held[0] - logits))


@pytest.mark.parametrize(
  ("chip", "devices", "size", "side", "batch", "chosen"),
  [
    # The paper's batches: the fastest of those in docs/scale.md, or within 1.1% of it.
    ("v5e", 4, "s", 32, 128, (4, "names")), ("v5e", 8, "s", 32, 128, (8, "names")),
    ("v5e", 16, "s", 32, 128, (8, "names")), ("v5e", 64, "s", 32, 128, (16, "names")),
    ("v5e", 8, "m", 32, 128, (8, "names")), ("v5e", 16, "m", 32, 128, (8, "names")),
    ("v5e", 64, "m", 32, 128, (32, "names")), ("v5e", 8, "l", 32, 128, (8, "full")),
    ("v5e", 16, "l", 32, 128, (8, "names")), ("v5p", 64, "xl", 64, 64, (32, "names")),
    # Others: larger batches, slices that hold little, and nearly too little.
    ("v5p", 64, "xl", 64, 256, (32, "names")), ("v5e", 256, "xl", 64, 256, (32, "full")),
    ("v6e", 256, "xl", 64, 512, (32, "names")), ("v5e", 4, "l", 32, 128, (4, "full")),
    ("v6e", 8, "l", 32, 128, (8, "names")), ("v5e", 2, "m", 32, 128, (2, "full")),
    ("v5e", 16, "xl", 32, 64, (16, "full")), ("v5e", 64, "l", 48, 128, (16, "names")),
    ("tpu7x", 32, "l", 32, 128, (16, "names")),
    ("v5e", 1, "s", 32, 128, (1, "full")), ("v5e", 1, "s", 32, 32, (1, "names")),
    # GPUs split no more than they must, for a step without recomputing: links between nodes are slow.
    ("h100", 8, "s", 32, 128, (1, "names")), ("h100", 16, "xl", 32, 64, (8, "names")),
    ("h100", 4, "l", 32, 128, (4, "names")), ("h100", 8, "l", 48, 128, (8, "names")),
    ("h100", 1, "m", 32, 128, (1, "full")), ("h100", 8, "xl", 64, 64, (8, "full")),
  ],
)  # fmt: skip
def test_what_is_chosen(chip, devices, size, side, batch, chosen):
  model, kind = model_of(size, side), kind_of(chip)
  fsdp = arrangement.fsdp(model, batch, devices, kind)
  mesh = mesh_of(chip, devices // fsdp, fsdp)
  assert (fsdp, arrangement.remat(model, batch // devices, mesh)) == chosen


def test_several_slices_split_over_all_of_each():
  assert [[fsdp_of(size, "v5e", 16, slices=n) for n in (1, 2)] for size in "sl"] == [[8, 16]] * 2
  assert fsdp_of("xl", "v5p", 64, slices=2) == 32


def test_what_does_not_divide_is_not_chosen():
  assert fsdp_of("s", "v5e", 12) == 4
  assert fsdp_of("s", "v5e", 16, tensor=2) == 8 and fsdp_of("s", "v5e", 32, tensor=4) == 4
  wide, odd = (dataclasses.replace(model_of("s"), n_head=4, n_embd=n) for n in (768, 780))
  assert arrangement.fsdp(wide, 0, 64, kind_of("v5e")) == 8  # 24 parts of 32 rows
  assert arrangement.fsdp(odd, 0, 16, kind_of("v5e")) == 1


def test_cpus_and_small_models_have_whole_copies():
  assert arrangement.fsdp(model_of("xl"), 0, 16, "cpu") == 1
  small = dataclasses.replace(model_of("s"), n_layer=8)
  assert arrangement.fsdp(small, 0, 16, kind_of("v5e")) == 1


def test_an_accelerator_without_published_figures_counts_as_the_smallest():
  v5e = hardware.CHIPS[kind_of("v5e")].hbm_bytes
  assert arrangement.usable_bytes("TPU v9") == v5e
  assert arrangement.usable_bytes("A new GPU") == 0.75 * v5e
  assert arrangement.fsdp(model_of("s"), 0, 16, "A new GPU") == 1
  assert arrangement.fsdp(model_of("l"), 0, 16, "A new GPU") == 8


def test_sampling_splits_weights_no_more_than_memory_asks_for():
  xl, v6e = model_of("xl"), arrangement.usable_bytes(kind_of("v6e"))
  for chip, parts in {"v5e": 4, "v6e": 2, "v5p": 1}.items():
    usable = arrangement.usable_bytes(kind_of(chip))
    assert arrangement.tensor_for_sampling(xl, 16, usable) == parts
    assert arrangement.tensor_for_sampling(model_of("l"), 16, usable) == 1
  assert arrangement.tensor_for_sampling(xl, 16, v6e, cache_bytes=0.7 * v6e) == 8  # a fifth is left
  assert arrangement.tensor_for_sampling(xl, 1, v6e) == 1  # nothing helps
