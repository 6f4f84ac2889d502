"""What settings must be, and their translation into what the rooms take (`config_fields` has them all).

A config file builds on `base()` and changes what it is about. The ConfigDict ends here: below the
jobs there are frozen dataclasses.
"""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from igpt_jax import files
from igpt_jax.config_fields import base
from igpt_jax.data.order import MAX_SEED
from igpt_jax.data.sources import DataConfig
from igpt_jax.errors import UserError
from igpt_jax.model.attention.dispatch import IMPLEMENTATIONS
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.model.decoding.cache import CACHE_DTYPES
from igpt_jax.model.image_gpt import PRESETS, ImageGPTConfig, Preset
from igpt_jax.prediction.topology import check_name
from igpt_jax.training.bad_numbers import GuardConfig
from igpt_jax.training.objectives import OBJECTIVES
from igpt_jax.training.optimizer import OptimizerConfig
from igpt_jax.training.profiling import Window

PATHS = (
  "init_from", "checkpoint", "source", "target", "images", "data.path", "data.manual_dir", "palette.path", "features.cache",
  "quality.network", "download.directory",
)  # fmt: skip
MODEL_SHAPE = ("n_layer", "n_head", "n_embd")


def _field(config: ConfigDict, name: str) -> Any:
  return functools.reduce(getattr, name.split("."), config)


def _positive(config: ConfigDict, *names: str, least: int = 1) -> None:
  for name in names:
    value = _field(config, name)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
      raise UserError(f"config.{name}: {value}; expected {least} or more")


def _at_most(config: ConfigDict, most: int, *names: str) -> None:
  for name in names:
    value = _field(config, name)
    if value > most:
      raise UserError(f"config.{name}: {value}; expected at most {most:,}")


def _choice(name: str, value: str, choices) -> None:
  if value not in choices:
    raise UserError(f"config.{name}: {value!r}; expected one of {', '.join(choices)}")


_MAX_INT = 2**31 - 1  # steps, tokens and records are counted in 32 bits


def _check_numbers(config: ConfigDict, prefix: str = "config.") -> None:
  """Whole numbers that 32 bits hold, others that are finite; those in a sequence, too."""
  for name, field in config.items():
    if isinstance(field, ConfigDict):
      _check_numbers(field, f"{prefix}{name}.")
      continue
    least, most = (0, MAX_SEED) if name == "seed" else (-_MAX_INT, _MAX_INT)
    for value in field if isinstance(field, tuple | list) else (field,):
      if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{prefix}{name}: {value}; expected a finite number")
      if isinstance(value, int) and not least <= value <= most:
        # Python writes no number of several thousand digits.
        shown = value if abs(value) < 2**128 else f"a number of {value.bit_length():,} bits"
        raise UserError(f"{prefix}{name}: {shown}; expected {least:,} to {most:,}")


def validate(config: ConfigDict) -> None:
  """Checks what can be checked without data, checkpoint or device.

  Raises:
    UserError: naming the field, its value and what was expected.
  """
  _check_numbers(config)
  settled = settle(config)
  _choice("objective", settled.objective, OBJECTIVES)
  _choice("model.size", settled.model.size, PRESETS)
  _choice("model.attention", config.model.attention, IMPLEMENTATIONS)
  _choice("sample.cache", config.sample.cache, ("", *CACHE_DTYPES))
  _choice("evaluate.split", config.evaluate.split, ("test", "validation", "train"))
  _positive(
    config, "data.resolution", "palette.images", "train.batch_size", "train.log_every",
    "train.accumulate", "train.checkpoint_every", "train.keep", "evaluate.batch_size", "evaluate.masks",
    "evaluate.baseline_images", "features.grid", "features.batch_size", "probe.max_iterations", "probe.steps",
    "probe.batch_size", "probe.eval_every", "lowdata.trials", "finetune.batch_size", "finetune.steps",
    "finetune.eval_every", "finetune.masks",
    "sample.completions", "sample.per_picture", "sample.batch_size", "quality.images", "n", "passes", "host_seconds", "benchmark.repeats",
    "benchmark.samples", "benchmark.pictures",
  )  # fmt: skip
  _positive(
    config, "train.eval_every", "train.eval_images", "train.keep_every",
    "evaluate.images", "features.masks", "features.images", "features.eval_images", "probe.around_best", "finetune.images",
    "finetune.warmup_steps", "finetune.patience", "train.save_retry_seconds", "watch_seconds", "watch_patience", "hang_seconds", "sample.scale", "model.n_layer", "model.n_head",
    "model.n_embd", least=0,
  )  # fmt: skip
  _at_most(
    config, 65_536, "train.batch_size", "evaluate.batch_size", "features.batch_size", "probe.batch_size",
    "finetune.batch_size", "sample.batch_size", "sample.samples", "sample.completions",
    "sample.per_picture", "n", "benchmark.samples",
  )  # fmt: skip
  trained = {"finetune": config.finetune, "probe": config.probe}.get(config.job, config.train)
  guard(config)
  Window(**config.profile).check_within(trained.steps)
  # Job compile may leave sampling out.
  _positive(config, "sample.samples", least=0 if config.job == "compile" else 1)
  if config.palette.size:
    _positive(config, "palette.size", least=2)
  if not 0 < config.mask_probability < 1:
    raise UserError(f"config.mask_probability: {config.mask_probability}; expected within (0, 1)")
  pixels = config.train.batch_size * config.data.resolution**2
  if config.job == "pretrain" and settled.objective == "masked":
    if config.mask_probability * pixels < 1:
      raise UserError(
        f"config.mask_probability: {config.mask_probability:g} masks less than one of the {pixels:,} pixels "
        f"of a batch, which leaves nothing to predict; expected {1 / pixels:.2g} or more"
      )
  if not 0 < config.sample.keep < 1:
    raise UserError(f"config.sample.keep: {config.sample.keep}; expected a share within (0, 1)")
  if not 0 < config.keep < 1:
    raise UserError(
      f"config.keep: {config.keep}; expected a share of the upper rows within (0, 1) (to draw whole "
      "pictures leave config.images out)"
    )
  if config.topology:
    if config.job != "compile":
      raise UserError(
        f"config.topology: {config.topology!r} is for job compile; config.job is {config.job!r}"
      )
    check_name(config.topology)
  for name in PATHS:
    files.local(f"config.{name}", _field(config, name))
  data(config)
  sampling(config)
  optimizer(config)
  if not config.init_from:  # else the model is known when that is
    settled.model.dtype = config.model.dtype or "float32"  # which one would ask for devices
    model(settled, n_vocab=palette_size(config))


def settle(config: ConfigDict, start: ImageGPTConfig | None = None) -> ConfigDict:
  """A copy in which what was left open is chosen: as in the model that training starts from, or s.

  Learning rates are the size's: `model.size` is then the published one of that shape, if it is one.
  """
  config = config.copy_and_resolve_references()
  if start is not None:
    config.model.update({name: getattr(start, name) for name in MODEL_SHAPE})
    config.palette.size = start.n_vocab
    config.objective = "autoregressive" if start.causal else "masked"
    shapes = {tuple(getattr(size, n) for n in MODEL_SHAPE): name for name, size in PRESETS.items()}
    shape = tuple(getattr(start, name) for name in MODEL_SHAPE)
    config.model.size = config.model.size or shapes.get(shape, "")
  config.model.size = config.model.size or "s"
  config.objective = config.objective or "autoregressive"
  return config


def palette_size(config: ConfigDict) -> int:
  """How many colours to ask for, where no palette is given."""
  return config.palette.size or 512


def preset(config: ConfigDict) -> Preset:
  return PRESETS[settle(config).model.size]


def _on_cpu(config: ConfigDict) -> bool:
  """Whether what is compiled is for a CPU; job `compile` is for chips that aren't here."""
  return not config.topology and jax.default_backend() == "cpu"


def compute_dtype(config: ConfigDict) -> str:
  return config.model.dtype or ("float32" if _on_cpu(config) else "bfloat16")


def model(config: ConfigDict, *, n_vocab: int) -> ImageGPTConfig:
  """The model; touches no device unless the dtype is left to it."""
  size, config = preset(config), settle(config)
  return ImageGPTConfig(
    n_layer=config.model.n_layer or size.n_layer,
    n_head=config.model.n_head or size.n_head,
    n_embd=config.model.n_embd or size.n_embd,
    n_vocab=n_vocab,
    n_positions=config.data.resolution**2,
    causal=config.objective == "autoregressive",
    dtype=compute_dtype(config),
    remat=config.model.remat or size.remat,
    attention=config.model.attention,
  )


def optimizer(config: ConfigDict) -> OptimizerConfig:
  size, config = preset(config), settle(config)
  default = (
    size.learning_rate if config.objective == "autoregressive" else size.learning_rate_masked
  )
  return OptimizerConfig(
    learning_rate=config.train.learning_rate or default,
    steps=config.train.steps,
    warmup_steps=config.train.warmup_steps,
    schedule=config.train.schedule,
    b1=config.train.b1,
    b2=config.train.b2,
    weight_decay=config.train.weight_decay,
    clip_norm=config.train.clip_norm,
  )


def sampling(config: ConfigDict) -> SamplingConfig:
  return SamplingConfig(
    temperature=config.sample.temperature,
    top_k=config.sample.top_k,
    top_p=config.sample.top_p,
  )


def guard(config: ConfigDict) -> GuardConfig:
  return GuardConfig(**config.guard)


def data(config: ConfigDict) -> DataConfig:
  """The data room's settings: the fields of `config.data` by their names."""
  names = {field.name for field in dataclasses.fields(DataConfig)}
  return DataConfig(**{name: value for name, value in config.data.items() if name in names})


def as_json(config: ConfigDict) -> dict[str, Any]:
  return json.loads(config.to_json())


# ILSVRC-2012's training pictures, and the share of them that the paper trains on while tuning.
_IMAGENET_TRAIN = 1_281_167
_IMAGENET_VALIDATION = 0.04


def imagenet(size: str, resolution: int) -> ConfigDict:
  """The paper's pretraining on ImageNet (section 3): its pictures, batch, steps and warm-up."""
  config = base()
  config.data.name = "imagenet2012"
  config.data.resolution = resolution
  config.data.augment = "paper"
  config.data.validation = _IMAGENET_VALIDATION
  config.model.size = size
  config.train.batch_size = 64 if size == "xl" else 128
  config.train.steps = 2_000_000 if size == "xl" else 1_000_000
  epoch = _IMAGENET_TRAIN * (1 - _IMAGENET_VALIDATION)
  config.train.warmup_steps = round(epoch / config.train.batch_size)
  config.train.log_every = 100
  config.train.eval_every = 10_000
  config.train.checkpoint_every = 5_000
  config.train.keep_every = 100_000
  if size in ("l", "xl"):
    # Their state doesn't fit one chip: parameters and moments are split over all of them.
    config.mesh.data, config.mesh.fsdp = 1, -1
  return config


def openai_eval(size: str) -> ConfigDict:
  """The released checkpoint of a size on the released tokens, where the download job puts them."""
  config = base()
  config.job = "evaluate"
  config.download.model = size
  config.checkpoint = f"downloads/igpt-{size}-1000000/model.ckpt-1000000"
  config.data.name = "tokens"
  config.data.path = "downloads/datasets/imagenet_teX.npy"
  config.data.resolution = 32
  config.model.dtype = "float32"  # as published, and the figures have four decimals
  return config
