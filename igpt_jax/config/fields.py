"""All settings, each declared once. Light: a wrong value is refused before jax is imported.

0 and "" leave a choice to the preset, the data, a checkpoint or the devices, as the meanings say. A checkpoint is
this program's (a workdir, one step of it, a model in one file, or "packaged", which comes with it), OpenAI's
(model.ckpt-N) or Hugging Face's (a directory).
A new or renamed setting needs an entry in `history.py`, so that older workdirs can be resumed.
"""

import dataclasses
import difflib
import json
from typing import Any

from igpt_jax import files, history
from igpt_jax.config import job_fields as jobs
from igpt_jax.config import run_fields as runs
from igpt_jax.config.declare import (
  COMPUTING,
  FROM_0,
  JOBS,
  MAKING,
  PRETRAINING,
  READING,
  TRAINING,
  WATCHING,
  Declaration,
  Group,
  declarations,
  setting,
)
from igpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings(Group, jobs=tuple(JOBS)):
  """All settings of one start of the program, made by `config.read`."""

  # fmt: off
  # ruff: noqa: RUF009 (groups are frozen)
  job: str = setting("pretrain", "job to run", choices=tuple(JOBS))
  seed: int = setting(0, "seed of all random numbers", least=0, most=2**32 - 1, decides="run",
    jobs=(*TRAINING, "lowdata", "sample", "complete", "quality", "fit_palette"))
  init_from: str = setting("", "a checkpoint that pretraining takes its first parameters from, such as "
    'packaged, the model that comes with igpt_jax; "": random ones', path=True, bucket=True, decides="run", host=True,
    jobs=(*PRETRAINING, *READING, "benchmark"))
  checkpoint: str = setting("", "checkpoint to read, local, in a bucket (gs://BUCKET/PATH), of the Hugging "
    "Face hub (openai/imagegpt-small), or packaged; \"\": --workdir's newest, or else init_from, or else for job "
    "complete packaged",
    path=True, bucket=True, host=True, jobs=READING)

  data: runs.DataConfig = runs.DataConfig()
  palette: runs.PaletteConfig = runs.PaletteConfig()
  model: runs.ModelConfig = runs.ModelConfig()

  objective: str = setting("", "autoregressive, masked (BERT); \"\": the checkpoint's, or "
    "autoregressive", decides="run", choices=("autoregressive", "masked"), jobs=MAKING)
  mask_probability: float = setting(0.15, "probability of a mask, unless stored in a checkpoint",
    above=0, below=1, decides="run", jobs=(*COMPUTING, "convert"))

  train: runs.TrainConfig = runs.TrainConfig()
  sizing: runs.SizingConfig = runs.SizingConfig()
  mesh: runs.MeshConfig = runs.MeshConfig()
  guard: runs.GuardConfig = runs.GuardConfig()
  hang_seconds: float = setting(1_800.0, "seconds without progress before training ends; 0: no limit",
    **FROM_0, jobs=TRAINING)
  host_seconds: int = setting(100, "seconds of silence before a host counts as lost; with "
    "--distributed", least=1, most=10**6)
  compilation_cache: str = setting("user", "where compiled programs are kept, so that the next start "
    "reads them: user (the user's cache folder), workdir, off, or a folder, in a bucket too; the "
    "environment's JAX_COMPILATION_CACHE_DIR goes first; several hosts need one place that all reach",
    path=True, bucket=True, host=True, jobs=(*PRETRAINING, *READING))
  scratch: str = setting("", "local folder for copies of files in buckets that are mapped into memory, and "
    "for what is made for them; \"\": in the user's cache folder", path=True, host=True, jobs=tuple(JOBS))
  profile: runs.ProfileConfig = runs.ProfileConfig()
  ablate: jobs.AblateConfig = jobs.AblateConfig()
  isoflop: jobs.IsoflopConfig = jobs.IsoflopConfig()
  evaluate: jobs.EvaluateConfig = jobs.EvaluateConfig()
  watch: bool = setting(False, "run the job on every checkpoint of a run, until that ends",
    jobs=WATCHING)
  watch_seconds: float = setting(30.0, "seconds between two looks for checkpoints", **FROM_0, jobs=WATCHING)
  watch_patience: float = setting(0.0, "seconds without a new checkpoint before watching "
    "ends, and that it waits for a run to begin; 0: no limit, and the run has begun", **FROM_0, jobs=WATCHING)

  features: jobs.FeaturesConfig = jobs.FeaturesConfig()
  probe: jobs.ProbeConfig = jobs.ProbeConfig()
  lowdata: jobs.LowdataConfig = jobs.LowdataConfig()
  finetune: runs.FinetuneConfig = runs.FinetuneConfig()
  sample: jobs.SampleConfig = jobs.SampleConfig()
  complete: jobs.CompleteConfig = jobs.CompleteConfig()
  quality: jobs.QualityConfig = jobs.QualityConfig()
  prepare: jobs.PrepareConfig = jobs.PrepareConfig()
  convert: jobs.ConvertConfig = jobs.ConvertConfig()
  download: jobs.DownloadConfig = jobs.DownloadConfig()
  compile: jobs.CompileConfig = jobs.CompileConfig()
  benchmark: jobs.BenchmarkConfig = jobs.BenchmarkConfig()
  first_contact: jobs.FirstContactConfig = jobs.FirstContactConfig()
  log: runs.LogConfig = runs.LogConfig()
  # fmt: on


FIELDS: dict[str, Declaration] = dict(declarations(Settings))


def decides(name: str, kind: str) -> bool:
  """True if a setting decides the numbers of a training run of a kind, "pretraining" or "finetuning".

  An unknown setting does, unless it belongs to a group none of whose settings do.
  """
  if name in FIELDS:
    return FIELDS[name].decides in ("run", kind)
  group, dot, _ = name.rpartition(".")
  members = [other for other in FIELDS if dot and other.startswith(f"{group}.")]
  return not members or any(decides(member, kind) for member in members)


def no_such(name: str) -> str:
  """Returns the message about a name that no setting has, with the one of that field, or else the most similar."""
  same_field = [other for other in FIELDS if other.rpartition(".")[2] == name.rpartition(".")[2]]
  close = difflib.get_close_matches(name, same_field, 1, 0) or difflib.get_close_matches(
    name, _known(), 1
  )
  meant = todays_name(name) or (history.todays_name(close[0]) if close else "")
  suggestion = f"; did you mean config.{meant}?" if meant else ""
  return f"config.{name}: there is no such setting{suggestion}"


def todays_name(name: str) -> str:
  """Returns the name of the setting that has this name, or had it in an older version; "": none."""
  return history.todays_name(name) if name in _known() else ""


def _known() -> list[str]:
  return [*FIELDS, *(old for names in history.RENAMED.values() for old in names)]


def base() -> Any:
  """Returns a ConfigDict of all settings' defaults, for config files to change."""
  from ml_collections import ConfigDict

  return ConfigDict(dataclasses.asdict(Settings()))


def from_config(config: Any) -> Settings:
  """Returns the settings of a ConfigDict, each of them checked.

  Raises:
    UserError: naming the setting, its value and what was expected.
  """
  parts: dict[str, dict[str, Any]] = {"": {}}
  for name, value in files.flatten(config.to_dict()).items():
    if name not in FIELDS:
      raise UserError(f"config: {no_such(name)}; fix: --help lists the settings")
    group, _, field = name.rpartition(".")
    parts.setdefault(group, {})[field] = tuple(value) if isinstance(value, list) else value
  groups: dict[str, Any] = {
    field.name: type(field.default)(**parts.get(field.name, {}))
    for field in dataclasses.fields(Settings)
    if isinstance(field.default, Group)
  }
  return Settings(**parts[""], **groups)


def value_of(settings: Settings, name: str) -> Any:
  """Returns the value of a setting, by "group.field" or "field"."""
  group, _, field = name.rpartition(".")
  return getattr(getattr(settings, group) if group else settings, field)


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
  """Returns the settings with these values, by "group.field" or "field"."""
  groups: dict[str, dict[str, Any]] = {}
  for name, value in values.items():
    group, _, field = name.rpartition(".")
    groups.setdefault(group, {})[field] = value
  root = groups.pop("", {})
  changed = {
    group: dataclasses.replace(getattr(settings, group), **fields)
    for group, fields in groups.items()
  }
  return dataclasses.replace(settings, **root, **changed)


def as_json(settings: Settings) -> dict[str, Any]:
  """Returns the settings as config.json stores them."""
  return json.loads(json.dumps(dataclasses.asdict(settings)))
