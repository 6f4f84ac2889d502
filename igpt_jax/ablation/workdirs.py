"""Finished workdirs that job ablate compares: which are seeds of one run, and what can't be compared."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from igpt_jax import checkpoint, files
from igpt_jax.ablation.entries import Entry, compared, read_json
from igpt_jax.config import overrides, saved
from igpt_jax.config.fields import Settings, decides, from_config, value_of, with_values
from igpt_jax.errors import UserError
from igpt_jax.runner.pretraining import RESULT
from igpt_jax.workspace import provenance
from igpt_jax.workspace import workdir as workdir_lib


class _Run(NamedTuple):
  """A finished run: its settings, its last checkpoint, and the fingerprint of the images its loss is of."""

  settings: Settings
  info: checkpoint.CheckpointInfo
  measured_on: str | None  # None: an older version wrote it


def finished(settings: Settings) -> tuple[list[Entry], list[str]]:
  """Returns the runs in `ablate.workdirs`, and in words what keeps their losses from being compared.

  Runs that differ in nothing but their seeds share a name: that of the folder, or of the one above if the
  folder is named after the seed.

  Raises:
    UserError: one isn't a finished pretraining, has no loss on validation, or is there twice.
  """
  folders = [files.place("config.ablate.workdirs", path) for path in settings.ablate.workdirs]
  if len({files.is_remote(folder) for folder in folders}) > 1:
    raise UserError(
      f"config.ablate.workdirs: {', '.join(folders)}: local ones and such of buckets; expected the one or the "
      "other; fix: gcloud storage cp -r gs://BUCKET/RUN ."
    )
  runs = [_read(folder) for folder in folders]
  keys = [_without_seed(run) for run in runs]
  names: dict[str, str] = {}  # key -> name
  for folder, run, key in zip(folders, runs, keys, strict=True):
    names.setdefault(key, _name_of(folder, run.settings.seed))
  if len(set(names.values())) < len(names):
    above = os.path.commonpath(folders)
    names = {key: os.path.relpath(folders[keys.index(key)], above) for key in names}
  entries: list[Entry] = []
  for folder, (own, info, _), key in zip(folders, runs, keys, strict=True):
    for other in entries:
      if (other.name, other.seed) == (names[key], own.seed):
        raise UserError(
          f"config.ablate.workdirs: {folder}: the same settings and seed as {other.folder}; expected "
          "each run once"
        )
    entries.append(
      Entry(name=names[key], seed=own.seed, settings=own, folder=folder, model=info.config)
    )
  first = overrides.baseline(settings, list(names.values()))
  entries.sort(key=lambda entry: entry.name != first)
  return entries, _incomparable(runs)


def _read(folder: str) -> _Run:
  theirs = workdir_lib.read(folder)
  if theirs is None or theirs["job"] != "pretrain":
    what = "no config.json" if theirs is None else f"a run of job {theirs['job']}"
    raise UserError(
      f"config.ablate.workdirs: {folder} has {what}; expected the workdir of a finished run of job pretrain"
    )
  own = from_config(saved.get_config(os.path.join(folder, saved.NAME)))
  made = checkpoint.latest_step(folder)
  result = read_json(os.path.join(folder, RESULT))
  if made != own.train.steps or not result:
    raise UserError(
      f"config.ablate.workdirs: {folder} has made {made or 0:,} of {own.train.steps:,} steps; expected "
      f"a finished run; fix: igpt_jax --workdir {folder} goes on with it"
    )
  if "validation_loss" not in result:
    raise UserError(
      f"config.ablate.workdirs: {folder} has no loss on validation: nothing was held out "
      "(data.validation: 0), or its masks hid no pixel; expected runs that have one; fix: without it, or "
      "--config.job=evaluate on each, which takes test"
    )
  info = checkpoint.describe(folder)
  own = with_values(own, {"model.dtype": info.config.dtype})  # "": it was the machine's
  return _Run(own, info, result.get("validation"))


# They decide no run's numbers but by rounding, or which images losses are of.
_BESIDE_NUMBERS = (
  "model.dtype", "model.attention", "model.remat", "train.accumulate", "train.eval_images"
)  # fmt: skip


def _without_seed(run: _Run) -> str:
  """Returns the digest of all but the seed that decides a run's losses, and which images they are of."""
  deciding = {
    name: value
    for name, value in compared(run.settings).items()
    if decides(name, "pretraining") or name in _BESIDE_NUMBERS
  }
  data, palette = run.info.run["data"]["fingerprint"], provenance.of_palette(run.info.palette)
  return files.digest({**deciding, "data": data, "validation": run.measured_on, "palette": palette})


def _name_of(folder: str, seed: int) -> str:
  above, name = os.path.split(folder)
  return os.path.basename(above) if name == str(seed) else name


def _incomparable(runs: Sequence[_Run]) -> list[str]:
  """Returns in words what differs of the tokens that losses were measured on, as far as it is known."""
  known = [
    {
      "data": info.run["data"]["fingerprint"],
      "validation": measured_on,
      "tokens": info.config.token_kind if info.config.tokens.needs_palette else "raw RGB",
      "palette": provenance.of_palette(info.palette),
      "objective": info.run["objective"],
      "preprocessing": provenance.recipe(own.data),
      **{name: value_of(own, name) for name in ("data.resolution", "train.eval_images")},
    }
    for own, info, measured_on in runs
  ]
  values = {
    name: list(dict.fromkeys(each[name] for each in known if each[name] is not None))
    for name in known[0]
  }
  return [
    f"{name}: {', '.join(map(str, several))}"
    for name, several in values.items()
    if len(several) > 1
  ]
