"""A training run's tokens, and their palette: given, a checkpoint's, kept in its workdir, or fitted to its images."""

import os
from typing import Any

import numpy as np

from igpt_jax import files
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data import palette_fit, pipeline
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import DataConfig, Split
from igpt_jax.errors import UserError
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress, summary
from igpt_jax.tokens import TokenSpec
from igpt_jax.workspace import provenance

PALETTE = "palette.npy"  # in a workdir


def training_tokens(
  settings: Settings,
  data_config: DataConfig,
  split: Split,
  workdir: str,
  begun_with: Palette | None = None,
) -> TokenSpec:
  """Returns what a run's tokens are, with the palette of `training_palette` if they need one."""
  spec = choices.token_spec(settings)
  if not spec.needs_palette:
    return spec
  palette = training_palette(settings, data_config, split, workdir, begun_with)
  return choices.token_spec(settings, palette)


def training_palette(
  settings: Settings,
  data_config: DataConfig,
  split: Split,
  workdir: str,
  begun_with: Palette | None = None,
) -> Palette | None:
  """Returns the first of: `palette.path`'s, that of the initial parameters, the workdir's, a fitted one.

  Data that is tokens already may have no palette: then None.

  Raises:
    UserError: the given palette can't be read, has another size than `palette.size`, or other colours
      than the run was begun with; or there are tokens beyond its size.
  """
  kept = os.path.join(workdir, PALETTE)
  wanted = settings.palette.size
  if settings.palette.path:
    palette = Palette.from_setting(settings.palette.path)
    if wanted and palette.size != wanted:
      raise UserError(
        f"palette.path: {settings.palette.path} has {palette.size} colours, the model's palette.size is "
        f"{wanted}; fix: --config.palette.size={palette.size}, or another palette"
      )
    if begun_with is None and files.exists(kept) and Palette.load(kept) != palette:
      raise UserError(
        f"palette.path: {settings.palette.path} has other colours than {kept}, which the run there was "
        "begun with; fix: the palette that it was begun with, another --workdir, or remove that file"
      )
  elif begun_with is not None:
    palette = begun_with
  elif files.exists(kept) and not _fitted_to_other_data(workdir, split):
    palette = Palette.load(kept)
    say(f"palette: {palette.size} colours, kept in {kept}")
    if wanted and palette.size > wanted:
      raise UserError(
        f"palette.size: {wanted}; {kept} has {palette.size} colours; fix: "
        f"--config.palette.size={palette.size}, or remove that file"
      )
  elif split.is_tokens:
    palette = None
  else:
    palette = fit_palette(settings, data_config, split)
  if palette is not None and len(np.unique(palette.centers, axis=0)) < 2:
    raise UserError(
      f"palette: all {palette.size} colours of {settings.palette.path or kept} are one; expected two or more "
      "to tell apart"
    )
  size = choices.token_spec(settings, palette).n_vocab
  if split.max_token >= size:
    raise UserError(
      f"data.path: {data_config.path} has tokens up to {split.max_token}; expected less than "
      f"the palette's size {size}; fix: --config.palette.size={split.max_token + 1} or more, "
      "or the palette that these tokens were made with"
    )
  return palette


def fit_palette(settings: Settings, data_config: DataConfig, split: Split) -> Palette:
  """Fits a palette by k-means to at most `palette.images` training images, augmented."""
  size = choices.token_spec(settings).n_vocab
  wanted = min(len(split), settings.palette.images)
  say(f"palette: fitting {size} colours to {wanted:,} images of {split.fingerprint}")
  histogram = palette_fit.ColorHistogram()
  clock = progress.Countdown("palette: images read", wanted, say)
  left = wanted
  for images in pipeline.image_stream(split, data_config, augment=True, seed=settings.seed):
    histogram.add(images[:left])
    left -= len(images)
    clock.tick(wanted - left)
    if left <= 0:
      break
  with progress.doing(f"palette: clustering into {size} colours", say):
    palette = palette_fit.fit_palette(histogram, size, seed=settings.seed)
  if palette.size < 2:
    raise UserError(
      f"palette: {split.fingerprint} has a single colour (rgb {', '.join(map(str, palette.colors[0]))}), "
      "of which there is nothing to learn; expected two or more; fix: other images"
    )
  if palette.size < size:
    say(f"palette: these images have {palette.size} colours, all are in the palette")
  palette.fitted_to = split.fingerprint
  return palette


def keep_palette(palette: Palette, workdir: str, **measured: Any) -> None:
  """Writes palette.npy and, if it was fitted here, palette.json with the data and what was measured."""
  digest = provenance.of_palette(palette.centers)
  palette.save(os.path.join(workdir, PALETTE))
  if palette.fitted_to:
    values = {"colors": palette.size, "fitted_to": palette.fitted_to, **measured, "digest": digest}
    summary.write_json(os.path.join(workdir, "palette.json"), values)


def _fitted_to_other_data(workdir: str, split: Split) -> bool:
  """True if palette.npy was fitted to other images, by a run that stopped right after that."""
  try:
    fitted = files.read_json(os.path.join(workdir, "palette.json"))
  except (OSError, ValueError):
    return False
  palette = Palette.load(os.path.join(workdir, PALETTE))
  ours = fitted.get("digest") == provenance.of_palette(palette.centers)
  return ours and fitted.get("fitted_to") != split.fingerprint
