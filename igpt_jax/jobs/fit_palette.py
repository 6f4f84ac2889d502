"""Fits a palette to the training images by k-means and writes it in OpenAI's format, .npy.

Writes palette.npy (float32 [k, 3] in [-1, 1]), palette.png (its colours) and palette.json (its
error on validation; on train, where nothing is held out).
"""

import os

import numpy as np

from igpt_jax import checkpoint
from igpt_jax.config.fields import Settings
from igpt_jax.data import palette_fit, pipeline
from igpt_jax.data.sources import has_validation, open_split
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import figures
from igpt_jax.workspace import training_palette
from igpt_jax.workspace import workdir as workdir_lib


def run(settings: Settings, workdir: str) -> None:
  """Fits `palette.size` colours to at most `palette.images` images of the training split."""
  if checkpoint.latest_step(workdir) is not None:
    raise UserError(
      f"workdir: {workdir} holds checkpoints, whose tokens stand for the colours of its palette.npy; fix: "
      "another --workdir"
    )
  workdir_lib.open_workdir(workdir)
  data_config = settings.data
  split = open_split(data_config, "train")
  measured = open_split(data_config, "validation") if has_validation(data_config) else split
  if split.is_tokens:
    say("palette: this data is tokens already, there are no colours to fit")
    return
  palette = training_palette.fit_palette(settings, data_config, split)
  images = pipeline.image_stream(measured, data_config, augment=False)
  error = palette_fit.palette_error(palette, images)
  if not hosts.is_main():
    return
  path = os.path.join(workdir, training_palette.PALETTE)
  figures.save_png(os.path.join(workdir, "palette.png"), swatches(palette.colors))
  training_palette.keep_palette(
    palette,
    workdir,
    measured_on=measured.fingerprint,
    mse_per_channel=error.mse,
    psnr_db=error.psnr if np.isfinite(error.psnr) else None,
  )
  say(
    f"palette: {palette.size} colours in {path}; {measured.name} images: MSE {error.mse:.2f} per channel, "
    f"PSNR {error.psnr:.2f} dB; use it with --config.palette.path={path}"
  )


def swatches(colors: np.ndarray, columns: int = 32, side: int = 16) -> np.ndarray:
  """Returns an image of colours, uint8 [k, 3], as squares in rows; what is left of the last is checked."""
  columns = min(columns, len(colors))
  rows = -(-len(colors) // columns)
  fine = np.indices((rows * side, columns * side)) // (side // 4)
  checker = np.array([230, 170], np.uint8)[fine.sum(0) % 2]
  image = np.repeat(checker[..., None], 3, axis=2)
  for i, color in enumerate(colors):
    top, left = i // columns * side, i % columns * side
    image[top : top + side, left : left + side] = color
  return image
