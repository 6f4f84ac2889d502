"""The settings of a start, read once from its config, and what the rooms take of them.

The ConfigDict ends here. What a config leaves open (0 or "") is chosen by `settle`, once, when it is
known what training starts from; the others here take what is open as it will be without a checkpoint.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from igpt_jax import files
from igpt_jax.config.fields import FIELDS, Settings, no_such
from igpt_jax.data import transforms
from igpt_jax.errors import UserError
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.model.image_gpt import PRESETS, ImageGPTConfig, Preset
from igpt_jax.prediction.topology import check_name
from igpt_jax.training.optimizer import OptimizerConfig

if TYPE_CHECKING:
  from ml_collections import ConfigDict

MODEL_SHAPE = ("n_layer", "n_head", "n_embd")
_SIZE, _OBJECTIVE, _COLOURS = "s", "autoregressive", 512


def settings_of(config: "ConfigDict") -> Settings:
  """All settings, checked as far as that needs no data, checkpoint or device.

  Raises:
    UserError: naming the setting, its value and what was expected.
  """
  parts: dict[str, dict[str, Any]] = {"": {}}
  for name, value in files.flatten(config.to_dict()).items():
    if name not in FIELDS:
      raise UserError(no_such(name))
    group, _, field = name.rpartition(".")
    parts.setdefault(group, {})[field] = tuple(value) if isinstance(value, list) else value
  groups: dict[str, Any] = {
    field.name: field.default_factory(**parts.get(field.name, {}))
    for field in dataclasses.fields(Settings)
    if field.default_factory is not dataclasses.MISSING
  }
  settings = Settings(**parts[""], **groups)
  _check(settings)
  return settings


def _check(settings: Settings) -> None:
  """Checks what is declared of no single setting."""
  for name, declaration in FIELDS.items():
    if declaration.path:
      group, _, field = name.rpartition(".")
      files.local(f"config.{name}", getattr(getattr(settings, group) if group else settings, field))
  data, job = settings.data, settings.job
  transforms.check_recipe(data.augment, data.resolution, data.resample)
  trained = {"finetune": settings.finetune, "probe": settings.probe}.get(job, settings.train)
  if settings.profile.steps and settings.profile.start >= trained.steps:
    raise UserError(
      f"config.profile.start: {settings.profile.start}; expected less than the run's {trained.steps} steps"
    )
  if job != "compile" and not settings.sample.samples:
    raise UserError("config.sample.samples: 0; expected 1 or more")
  pixels = settings.train.batch_size * data.resolution**2
  if job == "pretrain" and settings.objective == "masked":
    if settings.mask_probability * pixels < 1:
      raise UserError(
        f"config.mask_probability: {settings.mask_probability:g} masks less than one of the {pixels:,} "
        f"pixels of a batch, which leaves nothing to predict; expected {1 / pixels:.2g} or more"
      )
  if settings.compile.topology:
    if job != "compile":
      raise UserError(
        f"config.compile.topology: {settings.compile.topology!r} is for job compile; config.job is {job!r}"
      )
    check_name(settings.compile.topology)
  sampling_config(settings)
  optimizer_config(settings)
  if job == "finetune":
    _check_finetuning(settings)
  if not settings.init_from:  # else the model is known when that is
    dtype = settings.model.dtype or "float32"  # which one would ask for devices
    model = dataclasses.replace(settings.model, dtype=dtype)
    model_config(dataclasses.replace(settings, model=model), n_vocab=palette_size(settings))


def _check_finetuning(settings: Settings) -> None:
  finetune = settings.finetune
  if not finetune.generative + finetune.classification:
    raise UserError(
      "config.finetune.generative and finetune.classification: both 0; expected a positive weight"
    )
  if finetune.warmup_steps > finetune.steps:
    raise UserError(
      f"config.finetune.warmup_steps: {finetune.warmup_steps}; expected at most finetune.steps "
      f"{finetune.steps}"
    )


def settle(settings: Settings, start: ImageGPTConfig | None = None) -> Settings:
  """What was left open is chosen: as in the model that training starts from, or s, autoregressive.

  Learning rates are the size's: `model.size` is then the published one of that shape, if it is one.
  """
  model, size, objective = settings.model, settings.model.size, settings.objective
  palette = settings.palette
  if start is not None:
    shape = {name: getattr(start, name) for name in MODEL_SHAPE}
    model = dataclasses.replace(model, **shape)
    palette = dataclasses.replace(palette, size=start.n_vocab)
    objective = "autoregressive" if start.causal else "masked"
    published = (
      name
      for name, preset in PRESETS.items()
      if shape == {field: getattr(preset, field) for field in MODEL_SHAPE}
    )
    size = size or next(published, "")
  return dataclasses.replace(
    settings,
    model=dataclasses.replace(model, size=size or _SIZE),
    palette=palette,
    objective=objective or _OBJECTIVE,
  )


def palette_size(settings: Settings) -> int:
  """How many colours to ask for, where no palette is given."""
  return settings.palette.size or _COLOURS


def preset(settings: Settings) -> Preset:
  return PRESETS[settings.model.size or _SIZE]


def compute_dtype(settings: Settings) -> str:
  """The dtype of activations; touches devices where it is left to them."""
  if settings.model.dtype:
    return settings.model.dtype
  # Job `compile` is for chips that aren't here.
  on_cpu = not settings.compile.topology and jax.default_backend() == "cpu"
  return "float32" if on_cpu else "bfloat16"


def model_config(settings: Settings, *, n_vocab: int) -> ImageGPTConfig:
  """The model; touches no device unless the dtype is left to it."""
  size, model = preset(settings), settings.model
  return ImageGPTConfig(
    n_layer=model.n_layer or size.n_layer,
    n_head=model.n_head or size.n_head,
    n_embd=model.n_embd or size.n_embd,
    n_vocab=n_vocab,
    n_positions=settings.data.resolution**2,
    causal=settings.objective != "masked",
    dtype=compute_dtype(settings),
    remat=model.remat or size.remat,
    attention=model.attention,
  )


def optimizer_config(settings: Settings) -> OptimizerConfig:
  size, train = preset(settings), settings.train
  of_size = size.learning_rate_masked if settings.objective == "masked" else size.learning_rate
  return OptimizerConfig(
    learning_rate=train.learning_rate or of_size,
    steps=train.steps,
    warmup_steps=train.warmup_steps,
    schedule=train.schedule,
    b1=train.b1,
    b2=train.b2,
    weight_decay=train.weight_decay,
    clip_norm=train.clip_norm,
  )


def finetuning_optimizer_config(settings: Settings) -> OptimizerConfig:
  """Pretraining's betas, decay and clipping; a lower rate, constant after the warm-up."""
  finetune = settings.finetune
  train = dataclasses.replace(
    settings.train,
    learning_rate=finetune.learning_rate,
    steps=finetune.steps,
    warmup_steps=finetune.warmup_steps,
    schedule="constant",
  )
  made = optimizer_config(dataclasses.replace(settings, train=train))
  if finetune.learning_rate:
    return made
  return dataclasses.replace(made, learning_rate=made.learning_rate / 10)


def sampling_config(settings: Settings) -> SamplingConfig:
  sample = settings.sample
  return SamplingConfig(temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p)
