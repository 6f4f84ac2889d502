"""The runs of an ablation, one seed each: those that job ablate is to train, or finished workdirs."""

import dataclasses
import functools
import os
from collections.abc import Collection, Sequence
from typing import Any

from jax.sharding import Mesh

from igpt_jax import checkpoint, files
from igpt_jax.config import choices, overrides, saved
from igpt_jax.config.fields import (
  FIELDS,
  Settings,
  decides,
  value_of,
  with_values,
)
from igpt_jax.data import sources
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import Split, open_split
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hosts, sharding
from igpt_jax.runner.pretraining import RESULT
from igpt_jax.training import compilation
from igpt_jax.workspace import devices, provenance, training_palette, weights
from igpt_jax.workspace import workdir as workdir_lib

FOLDER = "runs"  # in the workdir: FOLDER/NAME/SEED is a pretraining's workdir
# Settings that decide no run's numbers, but what is compared: a finished run must have the job's.
_MEASURED_BY = ("train.eval_images", "model.dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A run with one seed.

  Attributes:
    name: the run's, which its seeds share.
    seed: its seed.
    settings: those of job pretrain.
    folder: its workdir.
    model: its model.
    made_from: the digest of its settings, seed, data and colours; "" if it has ended.
  """

  name: str
  seed: int
  settings: Settings
  folder: str
  model: ImageGPTConfig
  made_from: str = ""

  @property
  def steps(self) -> int:
    return self.settings.train.steps

  @functools.cached_property
  def parameters(self) -> int:
    return count_params(self.model)

  @functools.cached_property
  def flops_per_step(self) -> float:
    optimizer = choices.optimizer_config(self.settings)
    return compilation.flops_per_step(self.model, optimizer, self.settings.train.batch_size)

  @property
  def flops(self) -> float:
    """FLOPs of the whole run."""
    return self.flops_per_step * self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
  """What all runs of a job share, opened once.

  Attributes:
    train, validation: the images trained on, and those that losses are of.
    palette: the colours; None: the tokens are raw RGB, or data without any.
    palette_path: the runs' `palette.path`: the job's or, if it names none, that of `keep_palette`.
    n_vocab: the number of colours, or of levels.
  """

  train: Split
  validation: Split
  palette: Palette | None
  palette_path: str
  n_vocab: int

  @property
  def made_from(self) -> dict[str, str | None]:
    """The fingerprint of the training images, and the colours' digest."""
    colours = None if self.palette is None else self.palette.centers
    return {"data": self.train.fingerprint, "palette": provenance.of_palette(colours)}


def opened(settings: Settings, workdir: str) -> Opened:
  """Opens the data, and chooses the palette, or fits it, once for all runs; nothing is written.

  Raises:
    UserError: data, palette or initial parameters aren't as they must be.
  """
  train, validation = (open_split(settings.data, name) for name in ("train", "validation"))
  start = weights.of_run(settings, workdir)
  spec = training_palette.training_tokens(
    start.settings, settings.data, train, workdir, start.palette
  )
  kept = "" if spec.palette is None else os.path.join(workdir, training_palette.PALETTE)
  path = settings.palette.path or kept
  return Opened(
    train=train, validation=validation, palette=spec.palette, palette_path=path, n_vocab=spec.n_vocab
  )  # fmt: skip


def keep_palette(shared: Opened, workdir: str, folder: str) -> None:
  """Keeps the palette in the workdir; called once runs have been checked: what is refused changes nothing there.

  Args:
    shared: the palette, and what else runs share.
    workdir: the job's.
    folder: the folder in it that holds the runs.

  Raises:
    UserError: runs are there, and the palette kept beside them, which theirs is, has other colours.
  """
  if shared.palette is None:
    return
  kept = os.path.join(workdir, training_palette.PALETTE)
  if files.exists(kept) and Palette.load(kept) != shared.palette:
    if _has_runs(os.path.join(workdir, folder)):
      raise UserError(
        f"workdir: the runs in {workdir} have other colours, those of {kept}; fix: another --workdir, or "
        f"--config.palette.path={kept}"
      )
  hosts.wait_for_all("kept palette compared")
  if hosts.is_main():
    training_palette.keep_palette(shared.palette, workdir)
  hosts.wait_for_all("palette kept")


def _has_runs(folder: str) -> bool:
  """True if this folder, or one in it, is the workdir of a run that has made a checkpoint."""
  if not files.is_folder(folder):
    return False
  inside = (os.path.join(folder, name) for name in files.names(folder))
  return workdir_lib.has_begun(folder) or any(map(_has_runs, inside))


def entry_of(shared: Opened, name: str, own: Settings, folder: str, mesh: Mesh | None) -> Entry:
  """Returns a run whose model, colours and batch have been checked.

  Args:
    shared: what it shares with the others.
    name: its name, without its seed.
    own: its settings, those of job pretrain, with the job's `palette.path`.
    folder: its workdir.
    mesh: the mesh that it will train on; None: its own settings'.
  """
  start = weights.of_run(own, folder)
  if None not in (start.palette, shared.palette) and start.palette != shared.palette:
    raise UserError(
      f"init_from: {own.init_from}, of {name}, has other colours than the palette that all runs share; fix: "
      "--config.palette.path=FILE, the palette.npy of that checkpoint (packaged's: default), in another --workdir "
      "if runs have begun here"
    )
  settled = start.settings
  model = choices.model_config(settled, n_vocab=shared.n_vocab)
  train, mesh = settled.train, mesh or devices.mesh_of(settled, model)
  sharding.batch_size_per_shard(mesh, train.batch_size, accumulate=train.accumulate)
  sharding.check_model_fits(mesh, n_head=model.n_head, n_embd=model.n_embd)
  made_from = files.digest({
    **compared(own), "model.dtype": choices.compute_dtype(own), "palette.path": "", "seed": own.seed,
    **shared.made_from,
  })  # fmt: skip
  own = with_values(own, {"palette.path": shared.palette_path})
  return Entry(
    name=name, seed=own.seed, settings=own, folder=folder, model=model, made_from=made_from
  )


def planned(settings: Settings, workdir: str, mesh: Mesh | None) -> list[Entry]:
  """Returns the runs of `ablate.runs` with every seed, the baseline's first, all of them checked.

  Raises:
    UserError: data, palette, a model or a run's folder isn't as it must be; nothing has been trained.
  """
  data, ablate = settings.data, settings.ablate
  if ablate.test or ablate.probe != "none":
    test = open_split(data, "test")
    if ablate.probe != "none":
      splits = {name: open_split(data, name) for name in ("train", "validation")}
      sources.check_labels({**splits, "test": test})
  shared = opened(settings, workdir)
  entries, runs = [], overrides.named_runs(settings)
  # A run keeps the others' overrides at the base's values, which may have been others when it began.
  varied = {name for run in runs for name in run.values}
  for run in runs:
    for seed in ablate.seeds:
      folder = os.path.join(workdir, FOLDER, run.name, str(seed))
      own = run.settings(settings, seed)
      check_folder(
        own, folder, shared, "remove it, another name in ablate.runs, or --workdir", varied
      )
      entries.append(entry_of(shared, run.name, own, folder, mesh))
  keep_palette(shared, workdir, FOLDER)
  return entries


def check_folder(
  settings: Settings,
  folder: str,
  shared: Opened,
  fix: str,
  varied: Collection[str] = (),
  branched: bool = False,
) -> None:
  """Raises UserError if a folder holds a run that these settings, data and palette didn't make.

  What a resumed run may change is compared as it was when the run began, and so are the settings that are
  `varied` between runs, whether or not they decide a run's numbers: the comparison is about them. What losses
  are measured by (`_MEASURED_BY`) and on is compared, too.

  Args:
    settings: the run's.
    folder: its workdir.
    shared: the data and the palette.
    fix: what to do about another run, in words.
    varied: settings to compare beside those that decide a run's numbers.
    branched: True for a run that may have begun from another's trunk, with that one's length: it is compared
      as it is to end, once it has ended.
  """
  if not files.is_folder(folder) or not workdir_lib.has_begun(folder):
    return
  workdir_lib.check(settings, folder)
  theirs = workdir_lib.read(folder)
  if theirs is None:
    raise UserError(
      f"workdir: {folder} holds checkpoints without {saved.NAME}, which says what they are of; fix: "
      "that file, or remove the folder"
    )
  lengths = workdir_lib.LENGTH["pretraining"]
  if branched and not files.exists(os.path.join(folder, RESULT)):
    lengths = ()
  ours = {name: value_of(settings, name) for name in sorted({*lengths, *varied, *_MEASURED_BY})}
  if measured_on := read_json(os.path.join(folder, RESULT)).get("validation"):
    theirs["validation"], ours["validation"] = measured_on, shared.validation.fingerprint
  info = checkpoint.newest(folder)
  if info is not None:
    begun = {} if branched else provenance.begun_with(info)
    theirs |= {name: begun[name] for name in lengths if name in begun} | {
      "data": info.run["data"]["fingerprint"],
      "palette": provenance.of_palette(info.palette),
      "model.dtype": info.config.dtype,  # "" is the machine's
    }
    ours |= {**shared.made_from, "model.dtype": choices.compute_dtype(settings)}
  files.check_same("workdir", f"{folder} holds another run", theirs, ours, fix)


def read_json(path: str) -> dict[str, Any]:
  """Reads a run's JSON file; {} if there is none.

  Raises:
    UserError: it is damaged.
  """
  try:
    return files.read_json(path)
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise UserError(
      f"workdir: {path} is damaged ({error}); expected JSON; fix: remove it"
    ) from None


def compared(settings: Settings) -> dict[str, Any]:
  """Returns the settings that runs are told apart by: job pretrain's but for the seed, and for those of a host.

  A host's own that decides the numbers is among them: the checkpoint that a run begins from.
  """
  return {
    name: value_of(settings, name)
    for name, declaration in FIELDS.items()
    if "pretrain" in declaration.jobs and name != "seed"
    if not declaration.host or decides(name, "pretraining")
  }


def differences(entries: Sequence[Entry]) -> dict[str, list[Any]]:
  """Returns the settings in which runs differ, and the value of each run; its first seed stands for it."""
  settings = [compared(entry.settings) for entry in entries]
  return {
    name: values
    for name in settings[0]
    if len(set(map(repr, values := [own[name] for own in settings]))) > 1
  }
