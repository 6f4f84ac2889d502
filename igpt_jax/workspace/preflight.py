"""What can be known of a job before a slice is paid for, and on its first host before the others start.

  python -m igpt_jax.main … --check                   reads the settings, here
  python -m igpt_jax.main … --check=v5litepod-16      and whether batch, mesh and model divide over that slice
  python -m igpt_jax.main … --check=2xv5p:4x4x4       over two slices
  python -m igpt_jax.main … --check=machine           opens data, palette, checkpoint and workdir, there

Without jax `here` checks every setting by itself, the batch and the mesh; with jax all that a job's start
checks of its settings, too. `machine` uses no accelerator: those of other hosts may not be there yet.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from igpt_jax import files, units
from igpt_jax.config.declare import MAKING, OPENING, READING
from igpt_jax.config.fields import Settings, value_of
from igpt_jax.errors import UserError
from igpt_jax.parallel import sizes, tpu_types
from igpt_jax.parallel.tpu_types import Slice

MACHINE = "machine"
_PRICES = "https://cloud.google.com/tpu/pricing"
_SAVE_RATE = 100e6  # bytes a second that a host writes of a checkpoint, assumed; most write faster

# The batches of a job that must divide over the devices.
_BATCHES = {
  "pretrain": ("train.batch_size",),
  "benchmark": ("train.batch_size",),
  "finetune": ("finetune.batch_size",),
  "evaluate": ("evaluate.batch_size",),
  "lowdata": ("features.batch_size",),
  "probe": ("features.batch_size",),
}


def here(
  settings: Settings, asked: str, workdir: str, check: Callable[[Settings], None] | None
) -> Iterator[str]:
  """Yields lines about a job and the slice that it is meant for.

  Launchers read the line "grace: N s", the seconds that a run needs to save when it is told to stop.

  Args:
    settings: the job's, each of them checked.
    asked: the slice's type or topology, "v5litepod-16" or "2xv5p:4x4x4"; "": none.
    workdir: as given; a local one is of another machine, and isn't looked at.
    check: checks what concerns several settings, as a job's start does; None: jax, which that needs, isn't here.

  Raises:
    UserError: there is no such slice, or the settings have a mistake or don't suit it.
  """
  files.place("--workdir", workdir, used=False)
  asked_for = tpu_types.find(asked, "slice") if asked else None
  if asked_for:
    _check_mesh(settings, asked_for)
  if check is not None:
    check(settings)
  left = "" if check else "; what concerns several settings is checked on the slice (no jax here)"
  yield f"config: job {settings.job}: its settings are right{left}"
  if asked_for is None:
    return
  hosts = units.counted(asked_for.hosts, "host")
  yield f"slice: {asked_for}: {units.counted(asked_for.chips, 'chip')}, {hosts}"
  if settings.job != "pretrain" or settings.init_from or settings.sizing.minutes:
    yield "time: no forecast; it is for pretraining from random parameters, of a size that is set"
  elif check is None:
    yield "time: no forecast without jax here"
  else:
    yield from _forecast(settings, asked_for)
  yield f"price: chip-hours times that of a chip and hour of {asked_for.kind.type}, by region: {_PRICES}"


def _check_mesh(settings: Settings, asked_for: Slice) -> None:
  """Raises UserError if the mesh or a batch doesn't divide, or the config is for another number of slices."""
  slices, count = settings.mesh.slices, asked_for.count
  if slices not in (-1, count):
    raise UserError(
      f"config.mesh.slices: {slices}; {units.counted(count, 'slice')} would be asked for; expected the same; fix: "
      f"--slices={slices} of the launcher, or --config.mesh.slices={count}"
    )
  mesh = _sizes(settings, asked_for)
  shards = count * mesh[0] * mesh[1]
  for name in _BATCHES.get(settings.job, ()):
    accumulate = settings.train.accumulate if name.startswith("train.") else 1
    if not settings.sizing.minutes:
      sizes.images_per_shard(shards, value_of(settings, name), name, accumulate, count)


def _sizes(settings: Settings, asked_for: Slice, fsdp: int = 1) -> tuple[int, ...]:
  """Returns the mesh's sizes over each slice; `fsdp` if that is open."""
  own = settings.mesh.with_fsdp(fsdp)
  return sizes.mesh_sizes(own.data, own.fsdp, own.tensor, asked_for.devices, asked_for.count)


def _forecast(settings: Settings, asked_for: Slice) -> Iterator[str]:
  """Yields the lines on time and grace; needs jax.

  Raises:
    UserError: the model doesn't divide over the mesh.
  """
  from jax.sharding import AbstractMesh

  from igpt_jax.config import choices
  from igpt_jax.parallel import hardware, sharding
  from igpt_jax.prediction import forecast_table
  from igpt_jax.training import arrangement, state
  from igpt_jax.training.optimizer import make_optimizer

  # The dtype is the slice's, not this machine's.
  compiled = dataclasses.replace(settings.compile, topology=asked_for.topology)
  settled = choices.settle(dataclasses.replace(settings, compile=compiled))
  model = choices.model_config(settled)
  optimizer = choices.optimizer_config(settled)
  train, step = settings.train, 0.0
  fsdp = arrangement.fsdp(
    model, train.batch_size // train.accumulate, asked_for.devices, hardware.kind_of(asked_for.kind.name),
    settings.mesh.tensor, asked_for.count, settings.model.remat,
  )  # fmt: skip
  mesh = _sizes(settings, asked_for, fsdp)
  sharding.check_model_fits(
    AbstractMesh(mesh, sizes.MESH_AXES), n_head=model.n_head, n_embd=model.n_embd
  )
  name = forecast_table.name_of(
    {
      "model": dataclasses.asdict(model),
      "objective": settled.objective,
      "optimizer": optimizer.optimizer,
    }
  )
  known = forecast_table.known(name, asked_for.title, train.batch_size, mesh)
  if known is None:
    several = f" --config.mesh.slices={asked_for.count}" if asked_for.count > 1 else ""
    yield (
      f"time: no forecast of {name} on {asked_for.title}; to get one: the same settings with --config.job=compile "
      f"--config.compile.topology={asked_for.topology}{several} --workdir={forecast_table.WORKDIR}"
    )
  else:
    step = known.step_seconds * train.batch_size / known.batch_size
    hours = train.steps * step / 3_600
    same = (known.batch_size, known.mesh) == (train.batch_size, mesh)
    made = "" if same else f", made with batch {known.batch_size}, mesh {known.mesh}"
    yield (
      f"time: {units.significant(hours)} hours, {units.significant(hours * asked_for.chips)} chip-hours: "
      f"{train.steps:,} steps of {1e3 * step:,.0f} ms, {name} (forecast in {known.source}{made}; not a "
      "measurement, expect up to 30% more)"
    )
  n_bytes = state.state_bytes(model, make_optimizer(optimizer))
  seconds = math.ceil(2 * step + n_bytes / (asked_for.hosts * _SAVE_RATE))
  steps = "two steps and " if step else "besides two steps, whose time isn't known, "
  yield (
    f"grace: {seconds} s to save when told to stop: {steps}{units.data_size(n_bytes)} by "
    f"{units.counted(asked_for.hosts, 'host')} at {_SAVE_RATE / 1e6:.0f} MB/s each (assumed)"
  )


def machine(settings: Settings, workdir: str) -> Iterator[str]:
  """Yields a line for each thing that the job will read or write on this machine, once it is opened.

  Call it before devices are used: it leaves accelerators alone.

  Raises:
    UserError: one of them isn't there, or isn't as it should be.
  """
  import jax

  jax.config.update("jax_platforms", "cpu")
  from igpt_jax.data import bucket_folders, sources
  from igpt_jax.data.palette import Palette
  from igpt_jax.workspace import weights
  from igpt_jax.workspace import workdir as workdir_lib

  workdir_lib.open_workdir(workdir)
  if settings.job == "pretrain":
    workdir_lib.check(settings, workdir)
  yield f"workdir: {workdir}: can be written to"
  data = settings.data
  if settings.job in OPENING and settings.job != "prepare":
    if data.name in ("folder", "tokens") and files.is_remote(data.path):
      # The run copies all of it, which may take longer than other hosts wait for this one.
      yield f"data: {bucket_folders.look(data.name, data.path)}"
    else:
      yield f"data: {sources.open_split(data, 'train').fingerprint}"
  if path := settings.palette.path:
    yield f"palette: {path}: {Palette.from_setting(path).size} colours"
  if settings.job == "pretrain":
    start = weights.of_run(settings, workdir).weights
    if start is not None:
      yield f"checkpoint: {start.path}"
  elif settings.job in READING and not settings.watch:  # else the training makes it
    if settings.job == "complete":
      settings = weights.or_packaged(settings, workdir)
    if settings.job not in MAKING or settings.checkpoint or settings.init_from:
      yield f"checkpoint: {weights.of_job(settings, workdir).path}"
