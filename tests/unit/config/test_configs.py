"""Every config resolves, builds its abstract state and says what it is for."""

import dataclasses
import importlib.util
import re

import jax
import pytest

from igpt_jax.config import base, choices
from igpt_jax.config.fields import FIELDS, value_of
from igpt_jax.config.read import settings_of
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import PRESETS
from igpt_jax.parallel import hardware
from igpt_jax.training import optimizer, state
from igpt_jax.training.compilation import flops_per_image
from support.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
# These read a checkpoint: what they are to be is in it.
READERS = ("convert", "openai_s_eval", "openai_m_eval", "openai_l_eval")
PUBLISHED = {"s": 76_571_648, "m": 455_157_760, "l": 1_362_250_752, "xl": 6_801_438_720}


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_configs_are_there():
  names = {path.stem for path in CONFIGS}
  wanted = {f"imagenet{side}_{size}" for side in (32, 48, 64) for size in PRESETS}
  assert names >= wanted | {"quickstart", "cifar10_small", "cifar10_s", "imagenet32_s_bert"}
  assert names >= {"cifar10_16_modern", "imagenet32_s_modern", "imagenet32_l_modern"}
  assert names >= {f"imagenet{name}_fast" for name in ("32_s", "32_m", "32_l", "64_xl")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_its_abstract_state(path):
  module = load(path)
  config = module.get_config()
  config = choices.settle(settings_of(config))
  model = choices.model_config(config)
  tx = optimizer.make_optimizer(choices.optimizer_config(config))
  abstract = state.abstract_state(model, tx)
  assert sum(leaf.size for leaf in jax.tree.leaves(abstract.params)) == count_params(model)
  assert model.n_positions == model.tokens.n_positions(config.data.resolution)
  if model.positions == "learned":
    assert abstract.params["wpe"].shape == (model.n_positions, model.n_embd)
  assert ("sos" in abstract.params) == (config.objective == "autoregressive")
  size = path.stem.split("_")[1] if path.stem.startswith("imagenet32") else None
  if size in PUBLISHED and model.causal and not path.stem.endswith("_modern"):
    assert count_params(model) == PUBLISHED[size]
  if path.stem.endswith("_rgb"):
    assert model.token_kind == "channels" and config.data.augment == "none"
    of_subpixels = dataclasses.replace(config.data, token_kind="subpixels")
    other = choices.model_config(dataclasses.replace(config, data=of_subpixels))
    assert other.n_positions == 3 * model.n_positions
    assert count_params(other) < count_params(model)  # tables of one code, and no heads
  elif path.stem.startswith("imagenet"):
    epochs = 2_000_000 * 64 if size == "xl" else 1_000_000 * 128
    if path.stem.startswith("imagenet32"):
      assert config.train.steps * config.train.batch_size == epochs
    seen = config.train.warmup_steps * config.train.batch_size
    assert seen == pytest.approx(0.96 * 1_281_167, rel=1e-3)  # one epoch
    assert config.data.augment == "paper"


@pytest.mark.parametrize(
  "path", [path for path in CONFIGS if path.stem.endswith("_fast")], ids=lambda path: path.stem
)
def test_a_fast_config_is_the_papers_but_for_batch_and_rate(path):
  """The square root rule for Adam; as many images in all, and in the warm-up, to within a batch."""
  paper, fast = (
    settings_of(load(path.with_name(f"{name}.py")).get_config())
    for name in (path.stem.removesuffix("_fast"), path.stem)
  )
  changed = {name for name in FIELDS if value_of(paper, name) != value_of(fast, name)}
  own = ("batch_size", "steps", "learning_rate", "warmup_steps")
  assert changed == {f"train.{name}" for name in own}
  more = fast.train.batch_size / paper.train.batch_size
  rates = [choices.optimizer_config(own).learning_rate for own in (paper, fast)]
  assert more >= 2 and rates[1] == pytest.approx(rates[0] * more**0.5)
  images = [own.train.steps * own.train.batch_size for own in (paper, fast)]
  assert images[0] == images[1]
  warmed = [own.train.warmup_steps * own.train.batch_size for own in (paper, fast)]
  assert abs(warmed[0] - warmed[1]) <= fast.train.batch_size
  assert "Departs from the paper" in load(path).__doc__


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_it_is(path):
  doc = load(path).__doc__
  assert f"configs/{path.name}" in doc or path.stem == "quickstart"
  if path.stem in READERS:
    return
  assert "Hardware" in doc
  assert "Expect" in doc or path.stem == "quickstart"


PAPERS = [path for path in CONFIGS if " FLOPs in all; " in load(path).__doc__]


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_days_that_a_config_tells_are_those_of_its_flops(path):
  """On chips over which its batch divides."""
  module = load(path)
  told = re.search(r"(\S+) FLOPs in all; (\S+) days of (\d+) (\S+) chips at 40%", module.__doc__)
  flops, days, chips, name = told.groups()
  config = module.get_config()
  images = config.train.batch_size * config.train.steps
  total = flops_per_image(choices.model_config(settings_of(config))) * images
  per_day = 0.4 * 86_400 * int(chips) * hardware.CHIPS[hardware.kind_of(name)].peak_flops
  assert (flops, days) == (f"{total:.1e}", f"{total / per_day:.1f}")
  assert config.train.batch_size % int(chips) == 0


def test_each_of_the_papers_configs_tells_days():
  assert {path.stem for path in PAPERS} == {
    f"imagenet{side}_{size}" for side in (32, 48, 64) for size in PRESETS
  }


@pytest.mark.parametrize(
  ("field", "value", "expected"),
  [
    ("train.steps", 0, "train.steps"),
    ("train.warmup_steps", 10**9, "warmup_steps"),
    ("train.batch_size", 0, "batch_size"),
    ("train.b2", 1.0, "b2"),
    ("train.learning_rate", float("nan"), "learning_rate"),
    ("train.schedule", "linear", "cosine"),
    ("mask_probability", 1.0, "mask_probability"),
    ("data.validation", 1.5, "validation"),
    ("palette.size", 1, "palette.size"),
    ("model.size", "xxl", "s, m, l, xl"),
    ("model.n_head", 7, "divisible"),
    ("model.dtype", "float16", "bfloat16"),
    ("model.attention", "flash", "auto"),
    ("evaluate.split", "valid", "validation"),
    ("sample.temperature", -1.0, "temperature"),
    (
      "sample.temperature",
      1e-38,
      r"temperature: 1e-38; expected 0 \(greedy\), or .* 1e-06 or more",
    ),
    (
      "sample.temperature",
      float("nan"),
      "config.sample.temperature: nan; expected a finite number",
    ),
    (
      "sample.temperature",
      float("inf"),
      "config.sample.temperature: inf; expected a finite number",
    ),
    ("sample.top_k", -1, "top_k"),
    ("sample.top_p", 1e-30, "top_p: 1e-30; expected a number from 1e-06 to 1"),
    ("seed", -1, "config.seed: -1; expected 0 to 4,294,967,295"),
    ("seed", 2**32, "config.seed: 4294967296; expected 0 to 4,294,967,295"),
    ("seed", 2**200, "config.seed: a number of 201 bits; expected 0 to 4,294,967,295"),
    ("train.steps", 2**200, "config.train.steps: a number of 201 bits"),
    ("features.layers", (1, 2**200), "config.features.layers: a number of 201 bits"),
    ("probe.learning_rates", (1.0, float("inf")), "config.probe.learning_rates: inf"),
    ("data.validation", 1.0, "data.validation"),
    ("data.validation", -0.1, "data.validation"),
    ("data.validation_split", "train", "data.validation_split"),
  ],
)
def test_a_value_out_of_range_is_named(field, value, expected):
  config = base()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=expected):
    settings_of(config)


def test_masks_that_hide_nothing_of_a_batch_are_refused():
  config = base()
  config.objective, config.train.batch_size = "masked", 8
  config.mask_probability = 1 / 512  # one pixel of 8 images of 8 × 8
  settings_of(config)
  config.mask_probability = 1e-9
  with pytest.raises(UserError, match=r"masks less than one of the 512 pixels.*expected 0\.002 or"):
    settings_of(config)
