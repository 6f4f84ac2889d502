"""Sizes of a run that `sizing` chooses from: from random values, or going on from a trained model."""

import dataclasses
from typing import Any

from igpt_jax.checkpoint import CheckpointInfo
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings, value_of
from igpt_jax.parallel.hosts import say
from igpt_jax.pretrained import packaged
from igpt_jax.workspace import checkpoint_tokens, weights
from igpt_jax.workspace import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One size of a run.

  Attributes:
    choices: settings that it decides -> value.
    first_images: images, seen again counted again, of a first result; four times as many of a good one.
    least_images: images of train below which it learns them by heart too soon.
    start: the trained model that it goes on from; None: from random values.
  """

  choices: dict[str, Any]
  first_images: int
  least_images: int = 0
  start: CheckpointInfo | None = None


def _candidate(
  resolution: int,
  layers: int,
  heads: int,
  width: int,
  colours: int,
  rate: float,
  first: int,
  least: int = 0,
) -> Candidate:
  made = {
    "data.resolution": resolution,
    "model.n_layer": layers,
    "model.n_head": heads,
    "model.n_embd": width,
    "model.positions": "rope2d",  # sees the pixel above as soon as the one to the left (docs/results.md)
    "palette.size": colours,
    "train.learning_rate": rate,
  }
  return Candidate(made, first, least)


# From small to large: those that cost the most in FLOPs per image come last.
_SMALL = (
  _candidate(16, 4, 4, 64, 128, 3e-3, 6_000),
  _candidate(16, 4, 4, 128, 256, 3e-3, 5_000),
  _candidate(24, 4, 4, 128, 256, 3e-3, 7_000, 100),
  _candidate(32, 4, 4, 128, 256, 3e-3, 8_000, 100),
  _candidate(32, 8, 4, 128, 512, 2e-3, 16_000, 150),
)
# Larger than the packaged model, and therefore from random values even where that one is at hand.
_LARGER = (
  _candidate(32, 8, 8, 256, 512, 1e-3, 64_000, 2_000),
  _candidate(32, 24, 8, 512, 512, 1e-3, 1_000_000, 100_000),
)
CHOSEN = (*_SMALL[0].choices, "init_from")  # settings that candidates decide
# Sides of images at which a trained model of smaller ones goes on, too, if it has no table of positions.
_LARGER_SIDES = (24, 32)
# Going on from a trained model: images of a first result, and the rate at a width of 128 (docs/results.md, "Photos,
# by position"). Beyond that width it falls with it, as the paper's rates do; that wasn't measured.
_TRAINED_IMAGES, _TRAINED_RATE = 1_000, 1e-3
# Over the images of train: more passes only learn them by heart. A trained model knows the rest already.
_PASSES, _TRAINED_PASSES = 120, 50


def passes(settings: Settings) -> int:
  """Returns the passes over the images of train beyond which a run of these settings gains little."""
  return _TRAINED_PASSES if settings.init_from else _PASSES


def of_run(settings: Settings, images: int, workdir: str) -> list[Candidate]:
  """Returns the sizes to choose from for so many images of train, from small to large.

  Raises:
    UserError: the trained model, or a palette that is given, can't be read or doesn't suit the settings.
  """
  palette = settings.palette.path or workdir_lib.own_palette(workdir)  # which the run has to take
  sizes = [size for size in _of_start(settings, palette, workdir) if size.least_images <= images]
  if palette or not choices.token_spec(settings).needs_palette:
    return [_but_colours(size) for size in sizes]
  return sizes


def _but_colours(size: Candidate) -> Candidate:
  made = {name: value for name, value in size.choices.items() if name != "palette.size"}
  return dataclasses.replace(size, choices=made)


def _of_start(settings: Settings, palette: str, workdir: str) -> list[Candidate]:
  if settings.init_from:
    start = weights.describe(settings.init_from, settings)
    checkpoint_tokens.check_kind(settings, start)
    weights.check_colours(settings, start, workdir)
    return _trained(start, {})
  if settings.sizing.packaged:
    start = weights.describe(packaged.NAME, settings)
    if not (reason := _unsuited(settings, start, palette)):
      # A shape that is given is that model's: no larger one is asked for.
      given = any(value_of(settings, f"model.{name}") for name in choices.MODEL_SHAPE)
      return _trained(start, {"init_from": packaged.NAME}) + ([] if given else list(_LARGER))
    say(f"sizing: from random values instead of the packaged model; {reason}")
  return [*_SMALL, *_LARGER]


def _trained(start: CheckpointInfo, begun: dict[str, Any]) -> list[Candidate]:
  """Returns the sizes of training that goes on from `start`: where its positions allow, larger images, too."""
  own = start.run["resolution"]
  rate = {"train.learning_rate": _TRAINED_RATE * min(1, 128 / start.config.n_embd)}
  larger = [side for side in _LARGER_SIDES if side > own and start.config.positions == "rope2d"]
  made = [{**begun, **rate, "data.resolution": side} for side in (own, *larger)]
  return [Candidate(values, _TRAINED_IMAGES, start=start) for values in made]


def _unsuited(settings: Settings, start: CheckpointInfo, palette: str) -> str:
  """Returns what is given that a training from `start` couldn't keep; "": nothing."""
  if settings.data.name == "tokens":
    return "data.name: tokens, whose colours aren't known"
  if palette and not checkpoint_tokens.has_colours(start, palette):
    return f"palette: {palette} has other colours than the checkpoint"
  if settings.model.size:
    return f"model.size: {settings.model.size} in the config"
  return next(iter(weights.differences(settings, start)), "")
