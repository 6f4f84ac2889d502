"""Which weights a job begins with, whoever wrote them: found, compared with the settings, read.

A checkpoint is this program's own, OpenAI's or Hugging Face's; below here a job sees no difference.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from igpt_jax import __version__, checkpoint
from igpt_jax.checkpoint import CheckpointInfo, checksum
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import Split
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import PRESETS, Params, to_compute_dtypes
from igpt_jax.parallel.hosts import say
from igpt_jax.pretrained import formats
from igpt_jax.pretrained.leaves import Report, placer
from igpt_jax.training.state import param_shardings


def describe(path: str, settings: Settings) -> CheckpointInfo:
  """Opens a checkpoint of any format and checks everything but the weights' numbers.

  A palette is the checkpoint's own (in it, or lying beside the weights), or else
  `config.palette.path`. What a foreign checkpoint doesn't say is taken from the config: the
  probability of a mask.

  Raises:
    UserError: nothing is there that can be read, or `palette.path` doesn't fit it.
  """
  path = os.path.expanduser(path)
  found = (
    checkpoint.describe(path)
    if formats.detect(path) == "orbax"
    else _describe_foreign(path, settings.mask_probability)
  )
  return with_palette(found, settings)


def with_palette(found: CheckpointInfo, settings: Settings) -> CheckpointInfo:
  """The checkpoint with the palette of `palette.path`, if it has none of its own."""
  if found.palette is not None or not settings.palette.path:
    return found
  return dataclasses.replace(found, palette=_given_palette(found, settings).centers)


def _given_palette(found: CheckpointInfo, settings: Settings) -> Palette:
  palette = Palette.given(settings.palette.path)
  if palette.size != found.config.n_vocab:
    raise UserError(
      f"palette.path: {settings.palette.path} has {palette.size} colours; the checkpoint {found.path} "
      f"has {found.config.n_vocab}; fix: the palette that it was trained with"
    )
  return palette


def check_palette(settings: Settings, found: CheckpointInfo, fix: str) -> None:
  """Raises UserError where `palette.path` holds other colours than the tokens of `found` stand for."""
  path = settings.palette.path
  if path and found.palette is not None:
    if not np.array_equal(_given_palette(found, settings).centers, found.palette):
      raise UserError(
        f"palette.path: {path} has other colours than those of the checkpoint {found.path}, which its "
        f"parameters stand for; fix: {fix}"
      )


def _describe_foreign(path: str, mask_probability: float) -> CheckpointInfo:
  with formats.open_foreign(path) as foreign:
    config, clusters, kind, where = (
      foreign.config,
      foreign.clusters,
      foreign.format,
      os.path.abspath(foreign.path),
    )
  resolution = math.isqrt(config.n_positions)
  if resolution**2 != config.n_positions:
    raise UserError(
      f"checkpoint: {where} has {config.n_positions} positions; expected those of a square image"
    )
  step = re.search(r"ckpt-(\d{1,12})$", where) if kind == "openai" else None
  run = {
    "version": __version__,
    "model": dataclasses.asdict(config),
    "objective": "autoregressive" if config.causal else "masked",
    "mask_probability": mask_probability,
    "resolution": resolution,
    "imported_from": kind,
  }
  return CheckpointInfo(where, int(step[1]) if step else 0, config, clusters, run, kind)


def read(found: CheckpointInfo, mesh: Mesh, report: Report) -> Params:
  """The parameters, float32 on the mesh; of a foreign checkpoint one leaf at a time is on a host."""
  if found.format == "orbax":
    return checkpoint.load_params(found, mesh)
  place = placer(param_shardings(found.config, mesh))
  return formats.load(found.path, place=place, dtype=np.float32, report=report).params


def checksum_of(found: CheckpointInfo) -> str:
  """The checksum of its parameters: the same whoever wrote them, wherever they lie, on any mesh.

  A checkpoint of this program says it of itself; another's parameters are read for it, one at a time,
  and no device is touched.
  """
  if "params" in found.sums:
    return found.sums["params"]
  if found.format == "orbax":  # written before checkpoints had checksums
    return checksum.checksum_on_host(checkpoint.load_host_params(found))
  sums = formats.load(found.path, place=lambda path, leaf: checksum.summed(leaf), dtype=np.float32)
  return checksum.checksum_of_summed(sums.params)


def path_of_job(settings: Settings, workdir: str) -> str:
  """Where what `of_job` describes lies; "": in the workdir."""
  if settings.checkpoint or checkpoint.latest_step(workdir) is not None:
    return settings.checkpoint
  return settings.init_from


def of_job(settings: Settings, workdir: str) -> CheckpointInfo:
  """What a job works on that doesn't train from it: `checkpoint`, else the workdir's newest, else
  `init_from`."""
  path = path_of_job(settings, workdir)
  if path:
    return describe(path, settings)
  return with_palette(checkpoint.describe(workdir), settings)


@dataclasses.dataclass(frozen=True)
class Start:
  """Where a training run begins.

  Attributes:
    settings: the run's, with every open choice made.
    weights: what to begin with; None: random parameters, or the run's own newest checkpoint.
    palette: the colours that the parameters stand for, if there are parameters that know any.
  """

  settings: Settings
  weights: CheckpointInfo | None = None
  palette: Palette | None = None

  def params(self, mesh: Mesh, report: Report) -> Params | None:
    """The weights' parameters on the mesh; None: random ones."""
    if self.weights is None:
      return None
    report(f"starting from {self.weights.path}")
    return read(self.weights, mesh, report)


def of_run(settings: Settings, workdir: str, split: Split) -> Start:
  """Where `pretrain` begins, or goes on: in a workdir with a checkpoint `init_from` isn't read.

  Args:
    settings: as they were given.
    workdir: of the run.
    split: what it trains on.

  Raises:
    UserError: `init_from` can't be read, is of another model than the settings ask for, or has no
      palette for these images; or the workdir holds parameters that no run here has trained.
  """
  own = checkpoint.newest(workdir)
  if own is not None:
    if "data" not in own.run:
      raise UserError(
        f"workdir: {workdir} holds an imported checkpoint, without a training state to go on from; "
        f"fix: another --workdir, with --config.init_from={workdir}"
      )
    check_palette(settings, own, f"put those colours back, which {workdir}/palette.npy holds")
    settled = choices.settle(settings, own.config if settings.init_from else None)
    return Start(settled, palette=_palette(own))
  if not settings.init_from:
    return Start(choices.settle(settings))
  found = describe(settings.init_from, settings)
  _check_same_model(settings, found)
  check_palette(settings, found, "--config.palette.path=")
  if found.palette is None and not split.is_tokens:
    raise no_palette(found, "init_from")
  return Start(choices.settle(settings, found.config), found, _palette(found))


def _palette(found: CheckpointInfo) -> Palette | None:
  if found.palette is None:
    return None
  return Palette(found.palette, name=f"palette of {found.path}")


def _check_same_model(settings: Settings, found: CheckpointInfo) -> None:
  """Compares what the settings ask for with what the checkpoint is.

  Raises:
    UserError: naming every field that differs, both values, and the flags that mend it.
  """
  differing, fixes = [], {}  # fixes: a set in order

  def compare(field: str, mine, theirs, fix: str, source: str = "config") -> None:
    if mine and mine != theirs:
      differing.append(f"  {field}: {mine} in the {source}, {theirs} in the checkpoint")
      fixes[f"--config.{fix}"] = None

  size = PRESETS.get(settings.model.size)
  for name in choices.MODEL_SHAPE:
    theirs = getattr(found.config, name)
    if getattr(settings.model, name) or size is None:
      compare(f"model.{name}", getattr(settings.model, name), theirs, f"model.{name}={theirs}")
    else:
      compare(
        f"model.{name}",
        getattr(size, name),
        theirs,
        "model.size=",
        f"config's model.size {settings.model.size}",
      )
  n_vocab, resolution = found.config.n_vocab, found.run["resolution"]
  compare("palette.size", settings.palette.size, n_vocab, f"palette.size={n_vocab}")
  compare("objective", settings.objective, found.run["objective"], "objective=")
  compare("data.resolution", settings.data.resolution, resolution, f"data.resolution={resolution}")
  if differing:
    raise UserError(
      f"init_from: {found.path} is another model than the config's:\n"
      + "\n".join(differing)
      + f"\nfix: {' '.join(fixes)}; or another checkpoint"
    )


def no_palette(found: CheckpointInfo, setting: str = "checkpoint") -> UserError:
  """The error that says that colours are needed and not known, and what to do."""
  why = {
    "orbax": "it was trained on bare tokens",
    "openai": "no kmeans_centers.npy lies beside it",
    "huggingface": "it has no preprocessor_config.json",
  }[found.format]
  return UserError(
    f"{setting}: {found.path} carries no palette ({why}); expected the {found.config.n_vocab} colours "
    "that its tokens stand for; fix: --config.palette.path=FILE.npy"
  )


def load_model(
  settings: Settings,
  workdir: str,
  mesh: Mesh,
  *,
  needs_palette: bool,
  check: Callable[[checkpoint.CheckpointInfo], object] = lambda found: None,
) -> checkpoint.LoadedModel:
  """The model of `config.checkpoint`, whoever wrote it, or the workdir's newest, on the mesh.

  `check` may refuse it before its weights are read.

  Raises:
    UserError, before the weights are read: there is none, it is of another resolution than the
      data, or its palette is needed and not known.
  """
  found = of_job(settings, workdir)
  check_resolution(settings, found)
  if needs_palette:
    palette_of(found)
  check(found)
  say(f"checkpoint: {found.path}")
  return read_model(settings, found, mesh)


def read_model(
  settings: Settings, found: checkpoint.CheckpointInfo, mesh: Mesh
) -> checkpoint.LoadedModel:
  """What was found, with its weights on the mesh, to compute as the settings say."""
  return checkpoint.with_params(
    found,
    read(found, mesh, say),
    dtype=choices.compute_dtype(settings),
    attention=settings.model.attention,
  )


def read_to_draw(
  settings: Settings, found: checkpoint.CheckpointInfo, mesh: Mesh
) -> checkpoint.LoadedModel:
  """`read_model`, its weights in the dtype they are multiplied in: all of them are read for every
  pixel, and what they don't take is left for the caches."""
  trained = read_model(settings, found, mesh)
  return dataclasses.replace(trained, params=to_compute_dtypes(trained.config, trained.params))


def check_resolution(settings: Settings, trained: checkpoint.CheckpointInfo) -> None:
  """Raises UserError when the data's resolution isn't the checkpoint's."""
  if settings.data.resolution != trained.run["resolution"]:
    raise UserError(
      f"data.resolution: {settings.data.resolution}; the checkpoint {trained.path} was trained at "
      f"{trained.run['resolution']}; fix: --config.data.resolution={trained.run['resolution']}"
    )


def palette_of(trained: checkpoint.CheckpointInfo) -> Palette:
  """The colours that the model's tokens stand for.

  Raises:
    UserError: they aren't known.
  """
  if trained.palette is None:
    raise no_palette(trained)
  return Palette(np.asarray(trained.palette), name=f"palette of {trained.path}")
