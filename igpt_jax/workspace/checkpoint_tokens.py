"""What a checkpoint's tokens stand for: their kind, and the colours of a palette, its own or given beside it."""

import dataclasses

import numpy as np

from igpt_jax.checkpoint import CheckpointInfo
from igpt_jax.config.fields import Settings
from igpt_jax.data.palette import Palette
from igpt_jax.errors import UserError
from igpt_jax.tokens import TokenSpec


def check_kind(settings: Settings, info: CheckpointInfo) -> None:
  """Raises UserError if the checkpoint's tokens are of another kind than `data.token_kind`."""
  ours, theirs = settings.data.token_kind, info.config.token_kind
  if ours != theirs:
    raise UserError(
      f"data.token_kind: {ours}; the checkpoint {info.path} was trained on {theirs}; fix: "
      f"--config.data.token_kind={theirs}, or another checkpoint"
    )


def with_palette(info: CheckpointInfo, settings: Settings) -> CheckpointInfo:
  """Returns the checkpoint with the palette of `palette.path`, if it has none of its own."""
  if info.palette is not None or not settings.palette.path:
    return info
  if not info.config.tokens.needs_palette:
    raise UserError(
      f"palette.path: {settings.palette.path}; the tokens of {info.path} are raw RGB (data.token_kind="
      f"{info.config.token_kind}), which takes no palette; fix: leave it out (--config.palette.path=)"
    )
  return dataclasses.replace(info, palette=_given_palette(info, settings).centers)


def _given_palette(info: CheckpointInfo, settings: Settings) -> Palette:
  palette = Palette.from_setting(settings.palette.path)
  if palette.size != info.config.n_vocab:
    raise UserError(
      f"palette.path: {settings.palette.path} has {palette.size} colours; the checkpoint {info.path} "
      f"has {info.config.n_vocab}; fix: the palette that it was trained with"
    )
  return palette


def has_colours(info: CheckpointInfo, path: str) -> bool:
  """Returns True if the palette of a checkpoint that has one is that of `path`, as `palette.path` names it."""
  return np.array_equal(Palette.from_setting(path).centers, np.asarray(info.palette))


def check_palette(settings: Settings, info: CheckpointInfo, fix: str) -> None:
  """Raises UserError if `palette.path` has other colours than the checkpoint's palette."""
  path = settings.palette.path
  if path and info.palette is not None:
    if not np.array_equal(_given_palette(info, settings).centers, info.palette):
      raise UserError(
        f"palette.path: {path} has other colours than those of the checkpoint {info.path}, which its "
        f"parameters stand for; fix: {fix}"
      )


def check_tokens_known(
  info: CheckpointInfo,
  setting: str = "checkpoint",
  fix: str = "--config.palette.path=FILE.npy",
) -> None:
  """Raises UserError if the tokens are a palette's that isn't known."""
  if info.palette is not None or not info.config.tokens.needs_palette:
    return
  why = {
    "orbax": "it was trained on bare tokens",
    "safetensors": "it was trained on bare tokens",
    "openai": "no kmeans_centers.npy lies beside it",
    "huggingface": "it has no preprocessor_config.json",
  }[info.format]
  raise UserError(
    f"{setting}: {info.path} carries no palette ({why}); expected the {info.config.n_vocab} colours "
    f"that its tokens stand for; fix: {fix}"
  )


def palette_of(info: CheckpointInfo) -> Palette:
  """Returns the colours that the model's tokens stand for.

  Raises:
    UserError: the checkpoint has none.
  """
  check_tokens_known(info)
  return Palette(np.asarray(info.palette), name=f"palette of {info.path}")


def tokens_of(info: CheckpointInfo) -> TokenSpec:
  """Returns what the model's tokens are, with the colours of a palette.

  Raises:
    UserError: it needs a palette and has none.
  """
  spec = info.config.tokens
  return dataclasses.replace(spec, palette=palette_of(info)) if spec.needs_palette else spec
