"""Choices that settings leave open (0 or ""), and the configs of model, optimizer and sampling.

`settle` makes the choices, once a start, when it is known what training starts from. The other functions
treat an open choice as it is without a checkpoint.
"""

import dataclasses
from typing import Any

import jax

from igpt_jax.config.fields import FIELDS, Settings
from igpt_jax.data.palette import Palette
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.model.model_config import OPTIONS, PRESETS, ImageGPTConfig, Preset
from igpt_jax.model.parametrisation import scale_of
from igpt_jax.tokens import TokenSpec, spec_of
from igpt_jax.training.optimizer import OptimizerConfig

MODEL_SHAPE = ("n_layer", "n_head", "n_embd")
# What else a checkpoint that training starts from decides.
_KEPT = (*OPTIONS, "parametrisation", "base_embd", "base_layer")
_SIZE, _OBJECTIVE, _COLOURS = "s", "autoregressive", 512


def settle(
  settings: Settings, start: ImageGPTConfig | None = None, batch_size: int = 0
) -> Settings:
  """Returns settings with open choices made: as in `start`, the model that training starts from, or s.

  Learning rates depend on the size: `model.size` becomes the published one of that shape, if any.
  `train.b2` depends on `batch_size`, images in an update; 0: `train.batch_size`.
  """
  model, palette, objective = settings.model, settings.palette, settings.objective
  size = model.size
  if start is not None:
    shape = {name: getattr(start, name) for name in MODEL_SHAPE}
    options = {name: getattr(start, name) for name in _KEPT}
    model = dataclasses.replace(model, **shape, **options)
    if start.tokens.needs_palette:
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
    train=dataclasses.replace(
      settings.train, b2=_b2(settings.train.b2, batch_size or settings.train.batch_size)
    ),
    palette=palette,
    objective=objective or _OBJECTIVE,
  )


def _b2(given: float, batch_size: int) -> float:
  """Returns Adam's β₂: as given or, if that is 0, with the paper's half-life in tokens at any batch size.

  Its 0.95 is for batches of 128. (Marek et al. 2025, "Small Batch Size Training for Language Models".)
  """
  return given or 0.95 ** (batch_size / 128)


def token_spec(settings: Settings, palette: Palette | None = None) -> TokenSpec:
  """Returns what the model's tokens are; `palette` None: of `palette.size` colours that aren't known yet."""
  return spec_of(settings.data.token_kind, settings.palette.size or _COLOURS, palette)


def preset(settings: Settings) -> Preset:
  return PRESETS[settings.model.size or _SIZE]


def compute_dtype(settings: Settings) -> str:
  """Returns the dtype of activations; initialises devices if `model.dtype` is open."""
  if settings.model.dtype:
    return settings.model.dtype
  # Job `compile` targets chips that aren't attached.
  on_cpu = not settings.compile.topology and jax.default_backend() == "cpu"
  return "float32" if on_cpu else "bfloat16"


def model_options(settings: Settings) -> dict[str, Any]:
  """Returns the settings that make the model another than the paper's."""
  values = {name: getattr(settings.model, name) for name in _KEPT}
  return {name: v for name, v in values.items() if v != FIELDS[f"model.{name}"].default}


def model_config(settings: Settings, *, n_vocab: int = 0) -> ImageGPTConfig:
  """Returns the model's config, of a palette with `n_vocab` colours; 0: of `token_spec`'s.

  Initialises devices if `model.dtype` is open.
  """
  size, model = preset(settings), settings.model
  spec = spec_of(settings.data.token_kind, n_vocab or token_spec(settings).n_vocab)
  return ImageGPTConfig(
    n_layer=model.n_layer or size.n_layer,
    n_head=model.n_head or size.n_head,
    n_embd=model.n_embd or size.n_embd,
    n_vocab=spec.n_vocab,
    n_positions=spec.n_positions(settings.data.resolution),
    token_kind=spec.kind,
    causal=settings.objective != "masked",
    dtype=compute_dtype(settings),
    remat=model.remat or size.remat,
    attention=model.attention,
    **{name: getattr(model, name) for name in _KEPT},
  )


def optimizer_config(settings: Settings) -> OptimizerConfig:
  size, model, train = preset(settings), settings.model, settings.train
  masked = settings.objective == "masked"
  rate = size.learning_rate_masked if masked else size.learning_rate
  return OptimizerConfig(
    learning_rate=train.learning_rate or rate,
    steps=train.steps,
    warmup_steps=train.warmup_steps,
    schedule=train.schedule,
    decay_steps=train.decay_steps,
    decay_shape=train.decay_shape,
    b1=train.b1,
    b2=_b2(train.b2, train.batch_size),
    weight_decay=train.weight_decay,
    clip_norm=train.clip_norm,
    optimizer=train.optimizer,
    scale=scale_of(
      model.parametrisation,
      n_embd=model.n_embd or size.n_embd,
      n_layer=model.n_layer or size.n_layer,
      base_embd=model.base_embd,
      base_layer=model.base_layer,
    ),
  )


def finetuning_optimizer_config(settings: Settings) -> OptimizerConfig:
  """Returns pretraining's betas, decay and clipping, with a lower rate, constant after the warm-up."""
  finetune = settings.finetune
  train = dataclasses.replace(
    settings.train,
    learning_rate=finetune.learning_rate,
    steps=finetune.steps,
    warmup_steps=finetune.warmup_steps,
    batch_size=finetune.batch_size,
    schedule="constant",
  )
  made = optimizer_config(dataclasses.replace(settings, train=train))
  if finetune.learning_rate:
    return made
  return dataclasses.replace(made, learning_rate=made.learning_rate / 10)


def sampling_config(settings: Settings) -> SamplingConfig:
  sample = settings.sample
  return SamplingConfig(temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p)
