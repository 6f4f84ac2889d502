"""Weights that a job starts from: located, compared with the settings, read.

A checkpoint is this program's own, OpenAI's or Hugging Face's, is fetched from Hugging Face's hub, or came
with this package (`packaged`); its reader sees no difference.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from igpt_jax import __version__, checkpoint, files, scratch
from igpt_jax.checkpoint import CheckpointInfo, checksum, one_file
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.palette import Palette
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import Params, count_params, to_compute_dtypes
from igpt_jax.model.model_config import PRESETS
from igpt_jax.parallel.hosts import say
from igpt_jax.pretrained import formats, hub, packaged
from igpt_jax.pretrained.leaves import Report, placer
from igpt_jax.training.state import param_shardings
from igpt_jax.workspace import checkpoint_tokens, devices
from igpt_jax.workspace import workdir as workdir_lib


def describe(path: str, settings: Settings) -> CheckpointInfo:
  """Opens a checkpoint of any format and checks everything but the weights' values.

  A palette is the checkpoint's own (in it, or beside the weights), or else `palette.path`'s. A foreign
  checkpoint doesn't store the probability of a mask: it is the settings'. Collective if the path names a
  model of the Hugging Face hub.

  Raises:
    UserError: nothing readable is there, or `palette.path` doesn't fit it.
  """
  path, origin = packaged.path() if path == packaged.NAME else os.path.expanduser(path), {}
  if hub.is_name(path):
    snapshot = hub.fetch(path, say)
    origin = {"hub": f"{path.partition('@')[0]}@{snapshot.commit}"}
    path = snapshot.folder
  path, kind = _in_bucket(path) if files.is_remote(path) else (path, formats.detect(path))
  if kind == "orbax":
    info = checkpoint.describe(path)
  elif kind == one_file.FORMAT:
    info = one_file.describe(path)
  else:
    with formats.open_foreign(path) as foreign:
      config, clusters = foreign.config, foreign.clusters
      where = os.path.abspath(foreign.path)
    resolution = math.isqrt(config.n_positions)
    if resolution**2 != config.n_positions:
      raise UserError(
        f"checkpoint: {where} has {config.n_positions} positions; expected those of a square image"
      )
    named = re.search(r"ckpt-(\d{1,12})$", where) if kind == "openai" else None
    run = {
      "version": __version__,
      "model": dataclasses.asdict(config),
      "objective": "autoregressive" if config.causal else "masked",
      "mask_probability": settings.mask_probability,
      "resolution": resolution,
      "imported_from": kind,
      **origin,
    }
    step = int(named[1]) if named else 0
    info = CheckpointInfo(where, step, config, clusters, run, kind)
  return checkpoint_tokens.with_palette(info, settings)


def _in_bucket(path: str) -> tuple[str, str]:
  """Returns where to read a checkpoint of a bucket, there or in a local copy, and its format.

  Raises:
    UserError: its format isn't known.
  """
  path = files.place("checkpoint", path)
  if files.is_file(path):
    path = scratch.local_copy(path)
  elif files.is_file(f"{path}.index"):  # of OpenAI's: the first part of its files' names
    path = os.path.join(scratch.local_copy(os.path.dirname(path)), os.path.basename(path))
  elif _holds_foreign(path):
    path = scratch.local_copy(path)
  else:
    return path, "orbax"
  return path, formats.detect(path)


def _holds_foreign(folder: str) -> bool:
  """Returns True for a folder with weights beside their description, False for a workdir or a checkpoint."""
  weights = (".index", ".safetensors", ".bin")
  return any(name.endswith(weights) for name in files.names(folder))


def read(info: CheckpointInfo, mesh: Mesh, report: Report) -> Params:
  """Reads the parameters, float32, onto the mesh; from another format than Orbax' leaf by leaf."""
  if info.format == "orbax":
    return checkpoint.load_params(info, mesh)
  place = placer(param_shardings(info.config, mesh))
  if info.format == one_file.FORMAT:
    return one_file.load(info, place=place, dtype=np.float32, report=report)
  return formats.load(info.path, place=place, dtype=np.float32, report=report).params


def read_on_host(info: CheckpointInfo, report: Report) -> Params:
  """Reads the parameters as numpy arrays of the stored dtype, without devices."""
  if info.format == "orbax":
    report(f"reading {info.path}")
    return checkpoint.load_host_params(info)
  if info.format == one_file.FORMAT:
    return one_file.load(info, report=report)
  return formats.load(info.path, report=report).params


def checksum_of(info: CheckpointInfo) -> str:
  """Returns the checksum of the parameters, which depends on neither format, place nor mesh.

  This program's checkpoints store it; others' parameters are read for it, one at a time. No device is
  used.
  """
  if "params" in info.sums:
    return info.sums["params"]
  if info.format == "orbax":  # written before checkpoints had checksums
    return checksum.checksum_on_host(checkpoint.load_host_params(info))
  sums = formats.load(info.path, place=lambda path, leaf: checksum.Summed(leaf), dtype=np.float32)
  return checksum.checksum_of_summed(sums.params)


def path_of_job(settings: Settings, workdir: str) -> str:
  """Returns the path of `of_job`'s checkpoint; "" if it is the workdir's newest."""
  if settings.checkpoint or checkpoint.latest_step(workdir) is not None:
    return settings.checkpoint
  return settings.init_from


def of_job(settings: Settings, workdir: str) -> CheckpointInfo:
  """Describes `checkpoint`, else the workdir's newest, else `init_from`."""
  path = path_of_job(settings, workdir)
  if path:
    return describe(path, settings)
  return checkpoint_tokens.with_palette(checkpoint.describe(workdir), settings)


def say_packaged(another: str) -> None:
  """Says which model the packaged one is, and how `another` is named."""
  info = describe(packaged.NAME, Settings())
  side, name = info.run["resolution"], os.path.splitext(os.path.basename(info.path))[0]
  say(
    f"checkpoint: {packaged.NAME}, the model that comes with igpt_jax: {name}, {side}×{side} pixels, "
    f"{count_params(info.config):,} parameters, {info.step:,} steps; another one: {another}"
  )


def or_packaged(settings: Settings, workdir: str) -> Settings:
  """Returns settings that name the packaged model if they name none, and the workdir is no run's."""
  of_a_run = workdir_lib.has_begun(workdir) or workdir_lib.read(workdir) is not None
  if of_a_run or settings.checkpoint or settings.init_from:
    return settings
  say_packaged("--config.checkpoint=WORKDIR, or openai/imagegpt-small")
  return dataclasses.replace(settings, checkpoint=packaged.NAME)


@dataclasses.dataclass(frozen=True)
class Start:
  """What a pretraining run starts from.

  Attributes:
    settings: the run's, with all choices made.
    weights: the initial parameters; None: random ones, or the run's own newest checkpoint's.
    palette: that of the parameters; None if they are random or have none.
  """

  settings: Settings
  weights: CheckpointInfo | None = None
  palette: Palette | None = None

  def params(self, mesh: Mesh, report: Report) -> Params | None:
    """Reads the initial parameters onto the mesh; None: random ones."""
    if self.weights is None:
      return None
    report(f"starting from {self.weights.path}")
    return read(self.weights, mesh, report)


def of_run(settings: Settings, workdir: str) -> Start:
  """Returns what `pretrain` starts from; a workdir with a checkpoint is resumed without `init_from`.

  Args:
    settings: as given.
    workdir: the run's.

  Raises:
    UserError: `init_from` can't be read, is of another model than the settings', or has no palette for
      images; or the workdir holds parameters that no run has trained there.
  """
  own = info = checkpoint.newest(workdir)
  if own is not None and "data" not in own.run:
    raise UserError(
      f"workdir: {workdir} holds an imported checkpoint, without a training state to go on from; "
      f"fix: another --workdir, with --config.init_from={workdir}"
    )
  if own is not None:
    fix = f"put those colours back, which {workdir}/palette.npy holds"
    checkpoint_tokens.check_palette(settings, own, fix)
  elif settings.init_from:
    info = describe(settings.init_from, settings)
    check_same_model(settings, info)
    check_colours(settings, info, workdir)
  if info is None:
    return Start(choices.settle(settings))
  palette = None if info.palette is None else checkpoint_tokens.palette_of(info)
  settled = choices.settle(settings, info.config if settings.init_from else None)
  return Start(settled, info if own is None else None, palette)


def check_colours(settings: Settings, info: CheckpointInfo, workdir: str) -> None:
  """Raises UserError if `init_from` has no colours for images, or others than are given or put into the workdir."""
  if settings.data.name != "tokens":
    checkpoint_tokens.check_tokens_known(info, "init_from")
  kept = workdir_lib.own_palette(workdir)
  if kept and info.palette is not None and not checkpoint_tokens.has_colours(info, kept):
    raise UserError(
      f"init_from: {info.path} has other colours than {kept}, which job fit_palette or a person has put "
      "there; fix: another --workdir, or remove that file"
    )
  checkpoint_tokens.check_palette(settings, info, "--config.palette.path=")


def check_same_model(settings: Settings, info: CheckpointInfo) -> None:
  """Raises UserError if the checkpoint's model differs: the fields, both values, and the flags to set."""
  if differing := differences(settings, info):
    lines = "".join(f"  {line}\n" for line in differing)
    raise UserError(
      f"init_from: {info.path} is another model than the config's:\n{lines}"
      f"fix: {' '.join(dict.fromkeys(differing.values()))}; or another checkpoint"
    )


def differences(settings: Settings, info: CheckpointInfo) -> dict[str, str]:
  """Returns what is given otherwise than the checkpoint's model has it: field and both values -> the flag to set."""
  differing = {}

  def compare(field: str, ours, theirs, fix: str, source: str = "config") -> None:
    if ours and ours != theirs:
      line = f"{field}: {ours} in the {source}, {theirs} in the checkpoint"
      differing[line] = f"--config.{fix}"

  size = PRESETS.get(settings.model.size)
  for name in choices.MODEL_SHAPE:
    field, theirs = f"model.{name}", getattr(info.config, name)
    if ours := getattr(settings.model, name):
      compare(field, ours, theirs, f"{field}={theirs}")
    elif size is not None:
      source = f"config's model.size {settings.model.size}"
      compare(field, getattr(size, name), theirs, "model.size=", source)
  asked = choices.model_options(settings)
  for name, value in asked.items():
    theirs = getattr(info.config, name)
    compare(f"model.{name}", value, theirs, f"model.{name}={theirs}")
  n_vocab, resolution = info.config.n_vocab, info.run["resolution"]
  ours, theirs = settings.data.token_kind, info.config.token_kind
  compare("data.token_kind", ours, theirs, f"data.token_kind={theirs}")
  colours = n_vocab if info.config.tokens.needs_palette else 0
  compare("palette.size", settings.palette.size, colours, f"palette.size={colours}")
  compare("objective", settings.objective, info.run["objective"], "objective=")
  if info.config.positions != "rope2d":
    compare(
      "data.resolution", settings.data.resolution, resolution, f"data.resolution={resolution}"
    )
  return differing


def load_model(
  settings: Settings,
  workdir: str,
  mesh: Mesh | None,
  *,
  needs_images: bool,
  check: Callable[[CheckpointInfo], object] = lambda info: None,
) -> tuple[checkpoint.LoadedModel, Mesh]:
  """Reads the model of `checkpoint`, or the workdir's newest, onto the mesh, and returns both.

  `mesh` None: the settings', or what is chosen for the model. `check` may refuse it before its weights are read,
  and before the workdir is made: a job that is refused leaves none.
  `needs_images`: its tokens must stand for images.

  Raises:
    UserError, before the weights are read: there is none, it is of another resolution than the
      data or of other tokens, or it needs a palette and has none.
  """
  info = at_resolution(settings, of_job(settings, workdir))
  if needs_images:
    checkpoint_tokens.check_tokens_known(info)
  check(info)
  workdir_lib.open_workdir(workdir)
  say(f"checkpoint: {info.path}")
  mesh = mesh or devices.mesh_of(settings, info.config)
  return read_model(settings, info, mesh), mesh


def read_model(settings: Settings, info: CheckpointInfo, mesh: Mesh) -> checkpoint.LoadedModel:
  """Reads a checkpoint's weights onto the mesh, to compute in the settings' dtype and attention."""
  dtype = choices.compute_dtype(settings)
  params = read(info, mesh, say)
  return checkpoint.with_params(info, params, dtype=dtype, attention=settings.model.attention)


def read_to_draw(settings: Settings, info: CheckpointInfo, mesh: Mesh) -> checkpoint.LoadedModel:
  """`read_model` with weights in the compute dtype: every pixel reads them all, and caches need room."""
  model = read_model(settings, info, mesh)
  return dataclasses.replace(model, params=to_compute_dtypes(model.config, model.params))


def at_resolution(
  settings: Settings, info: CheckpointInfo, *, any_kind: bool = False
) -> CheckpointInfo:
  """Returns the checkpoint's description at the data's resolution.

  Raises:
    UserError: that isn't the checkpoint's, and its positions are tables of its own resolution; or
      `check_kind`'s, unless its tokens may be of `any_kind`.
  """
  if not any_kind:
    checkpoint_tokens.check_kind(settings, info)
  ours, theirs = settings.data.resolution, info.run["resolution"]
  if ours == theirs:
    return info
  if info.config.positions == "rope2d":
    say(
      f"checkpoint: {info.path} was trained at {theirs}×{theirs} pixels, and is used at {ours}×{ours}"
    )
    config = dataclasses.replace(info.config, n_positions=info.config.tokens.n_positions(ours))
    return dataclasses.replace(info, config=config, run={**info.run, "resolution": ours})
  raise UserError(
    f"data.resolution: {ours}; the checkpoint {info.path} was trained at {theirs}, and has no positions "
    f"beyond that (model.positions=rope2d would); fix: --config.data.resolution={theirs}"
  )
