"""What every job begins with: a workdir, a mesh, a palette, a trained model."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from igpt_jax import __version__, checkpoint, files, report
from igpt_jax import config as config_lib
from igpt_jax.data import palette_fit, pipeline
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import DataConfig, Split
from igpt_jax.errors import UserError
from igpt_jax.files import printable
from igpt_jax.jobs import agreement, provenance, starting_point
from igpt_jax.model.image_gpt import ImageGPTConfig, count_params, to_compute_dtypes
from igpt_jax.parallel import hardware, sharding
from igpt_jax.parallel.sharding import make_mesh

PALETTE = "palette.npy"  # in a workdir


def is_main() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def say(message: str) -> None:
  if is_main():
    print(printable(message), flush=True)  # it may name a file


def versions() -> dict[str, str]:
  """Of what a figure depends on."""
  found = {"igpt_jax": __version__, "python": platform.python_version()}
  for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def open_workdir(workdir: str) -> None:
  """Makes the workdir.

  Raises:
    UserError: it can't be made or written to.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
    # A name of its own: in containers the processes of all hosts may have one number.
    with tempfile.NamedTemporaryFile(dir=workdir, prefix=".writable."):
      pass
  except OSError as error:
    raise UserError(f"workdir: {workdir} can't be written to ({error.strerror})") from None


def mesh_of(config: ConfigDict) -> Mesh:
  return make_mesh(**config.mesh)


# What copies of the weights may take, one for each device.
_COPIES_BYTES = 2**30


def _mesh_is_open(config: ConfigDict) -> bool:
  """Whether the config leaves to us how devices are used."""
  return dict(config.mesh) == dict(config_lib.base().mesh)


def use_cores(config: ConfigDict) -> None:
  """Makes each core of a CPU a device, for sampling; before anything asks for devices."""
  if _mesh_is_open(config) and not jax.distributed.is_initialized():
    hardware.split_cpu(min(hardware.usable_cores(), 8))


def sampling_mesh(config: ConfigDict, model: ImageGPTConfig, samples: int) -> Mesh:
  """`mesh_of` the config; of a CPU's devices as many as divide the samples.

  Samples are the same on any mesh. Each device has a copy of the weights, while these take little.

  Args:
    config: whose `mesh` it is.
    model: to sample from.
    samples: that are drawn at a time.
  """
  devices = jax.devices()
  if devices[0].platform != "cpu" or jax.process_count() > 1 or not _mesh_is_open(config):
    return mesh_of(config)
  most = min(len(devices), _COPIES_BYTES // (4 * count_params(model)))
  n = max((n for n in range(1, most + 1) if samples % n == 0), default=1)
  return make_mesh(devices=devices[:n])


def own_mesh(mesh: Mesh) -> Mesh | None:
  """The mesh, where this process has all of it; for work that the main process does by itself."""
  return mesh if jax.process_count() == 1 and mesh.size > 1 else None


def input_share(mesh: Mesh) -> tuple[int, int]:
  """Which share of every batch this process reads, and how many shares there are.

  As many as processes; fewer where one copy of the model spans several (`mesh.tensor` beyond a
  host): those hold the same rows, and read the same.

  Raises:
    UserError: processes hold rows that overlap in part.
  """
  shards = sharding.batch_shards(mesh)
  places = sharding.sharding(mesh, "batch").devices_indices_map((shards,))
  held: dict[int, set[int]] = {}
  for device, (rows,) in places.items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  shares = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, shares)) != shards or len({len(share) for share in shares}) > 1:
    raise UserError(
      f"config.mesh: {dict(mesh.shape)} over {jax.process_count()} processes splits a batch unevenly "
      "among them; expected devices of one picture that divide those of a host, or are a multiple"
    )
  return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def training_palette(
  config: ConfigDict,
  data_config: DataConfig,
  split: Split,
  workdir: str,
  begun_with: Palette | None = None,
) -> Palette | None:
  """The palette to train with: given, that of the parameters to begin with, kept in the workdir from
  before, or fitted to `split` now.

  Returns None for data that is tokens already, unless there is a palette to show them with.

  Raises:
    UserError: a given palette isn't one, or has another size than `palette.size`, or other colours
      than the run was begun with; tokens beyond it.
  """
  kept = os.path.join(workdir, PALETTE)
  wanted = config.palette.size
  if config.palette.path:
    palette = Palette.given(config.palette.path)
    if wanted and palette.size != wanted:
      raise UserError(
        f"palette.path: {config.palette.path} has {palette.size} colours, the model's palette.size is "
        f"{wanted}; fix: --config.palette.size={palette.size}, or another palette"
      )
    if begun_with is None and os.path.exists(kept):
      if Palette.load(kept) != palette:
        raise UserError(
          f"palette.path: {config.palette.path} has other colours than {kept}, which the run there was "
          "begun with; fix: the palette that it was begun with, another --workdir, or remove that file"
        )
  elif begun_with is not None:
    palette = begun_with
  elif os.path.exists(kept) and not _fitted_to_other_data(workdir, split):
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
    palette = fit_palette(config, data_config, split)
  if palette is not None and len(np.unique(palette.centers, axis=0)) < 2:
    raise UserError(
      f"palette: all {palette.size} colours of {config.palette.path or kept} are one; expected two or more "
      "to tell apart"
    )
  size = config_lib.palette_size(config) if palette is None else palette.size
  if split.is_tokens and split.records.max_token >= size:
    raise UserError(
      f"data.path: {data_config.path} has tokens up to {split.records.max_token}; expected less than "
      f"the palette's size {size}; fix: --config.palette.size={split.records.max_token + 1} or more, "
      "or the palette that these tokens were made with"
    )
  return palette


def fit_palette(config: ConfigDict, data_config: DataConfig, split: Split) -> Palette:
  """k-means on the pictures that training sees, at most `palette.images` of them."""
  size = config_lib.palette_size(config)
  wanted = min(len(split), config.palette.images)
  say(f"palette: fitting {size} colours to {wanted:,} pictures of {split.fingerprint}")
  histogram = palette_fit.ColorHistogram()
  left = wanted
  for images in pipeline.image_stream(split, data_config, augment=True, seed=config.seed):
    histogram.add(images[:left])
    left -= len(images)
    if left <= 0:
      break
  palette = palette_fit.fit_palette(histogram, size, seed=config.seed)
  if palette.size < 2:
    raise UserError(
      f"palette: {split.fingerprint} has a single colour (rgb {', '.join(map(str, palette.colors[0]))}), "
      "of which there is nothing to learn; expected two or more; fix: other images"
    )
  if palette.size < size:
    say(f"palette: these pictures have {palette.size} colours, all are in the palette")
  palette.fitted_to = split.fingerprint
  return palette


def keep_palette(palette: Palette, workdir: str, **measured: Any) -> None:
  """Writes palette.npy and, if it was fitted here, palette.json: what it was fitted to, what was measured."""
  palette.save(os.path.join(workdir, PALETTE))
  if palette.fitted_to:
    values = {"colors": palette.size, "fitted_to": palette.fitted_to, **measured}
    values["digest"] = provenance.of_palette(palette.centers)
    report.write_json(os.path.join(workdir, "palette.json"), values)


def _fitted_to_other_data(workdir: str, split: Split) -> bool:
  """Whether palette.npy is that of palette.json, fitted to other images: of a run that got no further."""
  try:
    fitted = files.read_json(os.path.join(workdir, "palette.json"))
  except (OSError, ValueError):
    return False
  palette = Palette.load(os.path.join(workdir, PALETTE))
  if fitted.get("digest") != provenance.of_palette(palette.centers):
    return False
  return fitted.get("fitted_to") != split.fingerprint


def load_model(
  config: ConfigDict,
  workdir: str,
  mesh: Mesh,
  *,
  needs_palette: bool,
  check: Callable[[checkpoint.Described], object] = lambda found: None,
) -> checkpoint.Pretrained:
  """The model of `config.checkpoint`, whoever wrote it, or the workdir's newest, on the mesh.

  `check` may refuse it before its weights are read.

  Raises:
    UserError, before the weights are read: there is none, it is of another resolution than the
      data, or its palette is needed and not known.
  """
  found = find_model(config, workdir, needs_palette=needs_palette, check=check)
  return read_model(config, found, mesh)


def find_model(
  config: ConfigDict,
  workdir: str,
  *,
  needs_palette: bool,
  check: Callable[[checkpoint.Described], object] = lambda found: None,
) -> checkpoint.Described:
  """What `load_model` reads the weights of; raises what it raises."""
  found = starting_point.of_job(config, workdir)
  check_resolution(config, found)
  if needs_palette:
    palette_of(found)
  check(found)
  say(f"checkpoint: {found.path}")
  return found


def read_model(
  config: ConfigDict, found: checkpoint.Described, mesh: Mesh
) -> checkpoint.Pretrained:
  """What was found, with its weights on the mesh, to compute as the config says."""
  return checkpoint.with_params(
    found,
    starting_point.read(found, mesh, say),
    dtype=config_lib.compute_dtype(config),
    attention=config.model.attention,
  )


def read_to_draw(
  config: ConfigDict, found: checkpoint.Described, mesh: Mesh
) -> checkpoint.Pretrained:
  """`read_model`, its weights in the dtype they are multiplied in: all of them are read for every
  pixel, and what they don't take is left for the caches."""
  trained = read_model(config, found, mesh)
  return dataclasses.replace(trained, params=to_compute_dtypes(trained.config, trained.params))


def check_resolution(config: ConfigDict, trained: checkpoint.Described) -> None:
  """Raises UserError when the data's resolution isn't the checkpoint's."""
  if config.data.resolution != trained.run["resolution"]:
    raise UserError(
      f"data.resolution: {config.data.resolution}; the checkpoint {trained.path} was trained at "
      f"{trained.run['resolution']}; fix: --config.data.resolution={trained.run['resolution']}"
    )


def palette_of(trained: checkpoint.Described) -> Palette:
  """The colours that the model's tokens stand for.

  Raises:
    UserError: they aren't known.
  """
  if trained.palette is None:
    raise UserError(starting_point.no_palette(trained))
  return Palette(np.asarray(trained.palette), name=f"palette of {trained.path}")


@contextlib.contextmanager
def eval_stream(
  split: Split,
  data_config: DataConfig,
  palette: Palette | None,
  mesh: Mesh,
  batch_size: int,
  limit: int = 0,
  images: bool = False,
  start: int = 0,
):
  """This host's batches of the first `limit` pictures (0: all), the rest of the last one masked.

  The first `start` batches are left out.

  Raises:
    UserError: another host has other data.
  """
  agreement.check_data(split.fingerprint)
  share, shares = input_share(mesh)
  with pipeline.eval_batches(
    split,
    data_config,
    palette,
    batch_size=batch_size,
    process_index=share,
    process_count=shares,
    images=images,
    start=start,
  ) as stream:
    yield _first(stream, -(-(limit or len(split)) // batch_size) - start, limit or len(split))


def _first(stream, n_batches: int, limit: int):
  for _, batch in zip(range(n_batches), stream, strict=False):
    yield {**batch, "mask": batch["mask"] & (batch["index"] < limit)}


def tokens_of(split: Split, data_config: DataConfig, palette: Palette | None) -> np.ndarray:
  """All readable pictures of a small split as tokens, uint16 [N, T], on every process."""
  with pipeline.eval_batches(split, data_config, palette, batch_size=len(split)) as stream:
    batch = next(stream)
  return batch["tokens"][batch["mask"]]
