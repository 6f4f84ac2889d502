"""Reads the settings of a start from its ConfigDict, once, and checks them."""

import dataclasses
from typing import TYPE_CHECKING

from igpt_jax import files
from igpt_jax.config import choices, named, overrides
from igpt_jax.config.fields import FIELDS, Settings, from_config, value_of
from igpt_jax.data import transforms
from igpt_jax.errors import UserError
from igpt_jax.prediction.topology import check_name

if TYPE_CHECKING:
  from ml_collections import ConfigDict


def settings_of(config: "ConfigDict") -> Settings:
  """Returns all settings, checked as far as possible without data, checkpoint or device.

  Raises:
    UserError: naming the setting, its value and what was expected.
  """
  settings = from_config(config)
  check(settings)
  return settings


def check(settings: Settings) -> None:
  """Checks the rules that concern several settings.

  Raises:
    UserError: naming the setting, its value and what was expected.
  """
  for name, declaration in FIELDS.items():
    if declaration.path and declaration.bucket:
      # A launcher's machine reads no bucket; where one is read, `places` needs what reads it at once.
      files.place(f"config.{name}", value_of(settings, name), used=False)
    elif declaration.path:
      files.local(f"config.{name}", value_of(settings, name))
  data, job = settings.data, settings.job
  if job == "ablate":
    overrides.check(settings, check)
  if job == "isoflop":
    _check_isoflop(settings)
  if job == "first_contact":
    named.check(settings, check)
  _check_tokens(settings)
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
        f"config.compile.topology: {settings.compile.topology!r} is for job compile; config.job is "
        f"{job!r}; expected 'compile'"
      )
    check_name(settings.compile.topology)
  choices.sampling_config(settings)
  choices.optimizer_config(settings)
  finetune = settings.finetune
  if job == "finetune" and not finetune.generative + finetune.classification:
    raise UserError(
      "config.finetune.generative and finetune.classification: both 0; expected a positive weight"
    )
  if job == "finetune" and finetune.warmup_steps > finetune.steps:
    raise UserError(
      f"config.finetune.warmup_steps: {finetune.warmup_steps}; expected at most finetune.steps "
      f"{finetune.steps}"
    )
  if not settings.init_from:  # else the checkpoint decides the model
    # Choosing the dtype would initialise the devices.
    model = dataclasses.replace(settings.model, dtype=settings.model.dtype or "float32")
    settings = dataclasses.replace(settings, model=model)
    choices.model_config(settings)


def _check_tokens(settings: Settings) -> None:
  """Raises UserError if something asks for a palette, and the tokens are raw RGB."""
  data, palette = settings.data, settings.palette
  if choices.token_spec(settings).needs_palette:
    return
  kind, fix = data.token_kind, "fix: --config.data.token_kind=palette"
  if settings.job == "fit_palette":
    raise UserError(
      f"config.job: fit_palette; data.token_kind={kind} takes no palette; fix: another job"
    )
  if data.name == "tokens":
    raise UserError(
      f"config.data.token_kind: {kind}; data.name=tokens are colours of a palette, not raw RGB; expected "
      f"images; {fix}"
    )
  for name, value in (("path", palette.path), ("size", palette.size)):
    if value:
      raise UserError(
        f"config.palette.{name}: {value!r}; data.token_kind={kind} takes no palette; expected "
        f"{FIELDS[f'palette.{name}'].default!r}; {fix}, or --config.palette.{name}="
        f"{FIELDS[f'palette.{name}'].default}"
      )


def _check_isoflop(settings: Settings) -> None:
  """Raises UserError if job isoflop's runs couldn't share trunks, or if it doesn't choose their sizes."""
  train, model = settings.train, settings.model
  if train.schedule != "wsd":
    raise UserError(
      f"config.train.schedule: {train.schedule!r}; job isoflop has the budgets of a shape share a trunk; "
      "expected 'wsd'"
    )
  if train.steps != (unset := FIELDS["train.steps"].default):
    raise UserError(
      f"config.train.steps: {train.steps}; job isoflop trains each shape as long as its budgets allow; expected "
      f"{unset}, the default; fix: isoflop.budgets"
    )
  chosen = {
    "sizing.minutes": settings.sizing.minutes,
    "init_from": settings.init_from,
    **{f"model.{name}": getattr(model, name) for name in ("size", *choices.MODEL_SHAPE)},
  }
  for name, value in chosen.items():
    if value:
      raise UserError(
        f"config.{name}: {value!r}; job isoflop trains the shapes of its ladder from random parameters; "
        f"expected {FIELDS[name].default!r}; fix: isoflop.shapes chooses among them"
      )
  if settings.objective == "masked":
    raise UserError(
      "config.objective: 'masked'; job isoflop studies next-pixel prediction; expected 'autoregressive'"
    )
