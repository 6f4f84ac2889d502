"""Every setting there is, each declared once.

0 and "" leave a choice to the preset, the data or a checkpoint, as the meanings say. A checkpoint is
one of this program (a workdir, or one step of it), OpenAI's (model.ckpt-N) or Hugging Face's (a
directory). A setting that is new, or has a new name, needs an entry in `history.py`: older workdirs go on.
"""

import dataclasses
import difflib
import json
from typing import Any

from igpt_jax import history
from igpt_jax.config.declare import (
  COMPUTING,
  FROM_0,
  JOBS,
  MAKING,
  READING,
  TRAINING,
  WATCHING,
  Declaration,
  Group,
  declarations,
  setting,
)
from igpt_jax.config.job_fields import (
  BenchmarkConfig,
  CompileConfig,
  CompleteConfig,
  ConvertConfig,
  DownloadConfig,
  EvaluateConfig,
  FeaturesConfig,
  LowdataConfig,
  ProbeConfig,
  QualityConfig,
  SampleConfig,
)
from igpt_jax.config.run_fields import (
  DataConfig,
  FinetuneConfig,
  GuardConfig,
  LogConfig,
  MeshConfig,
  ModelConfig,
  PaletteConfig,
  ProfileConfig,
  TrainConfig,
)


@dataclasses.dataclass(frozen=True)
class Settings(Group, jobs=tuple(JOBS)):
  """All settings of a start, as `config.read` made them."""

  # fmt: off
  job: str = setting("pretrain", "what to do", choices=tuple(JOBS))
  seed: int = setting(0, "of everything drawn", least=0, most=2**32 - 1, decides="run",
    jobs=(*TRAINING, "lowdata", "sample", "complete", "quality", "fit_palette"))
  init_from: str = setting("", "a checkpoint that pretraining takes its first parameters from; "
    '"": random ones', path=True, decides="run", host=True,
    jobs=("pretrain", *READING, "benchmark"))
  checkpoint: str = setting("", "what is read; \"\": --workdir's newest, or else init_from",
    path=True, host=True, jobs=READING)

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  palette: PaletteConfig = dataclasses.field(default_factory=PaletteConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)

  objective: str = setting("", "autoregressive, masked (BERT); \"\": the checkpoint's, or "
    "autoregressive", decides="run", choices=("autoregressive", "masked"), jobs=MAKING)
  mask_probability: float = setting(0.15, "of the masked objective, where a checkpoint doesn't say",
    above=0, below=1, decides="run", jobs=(*COMPUTING, "convert"))

  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
  hang_seconds: float = setting(1_800.0, "training without progress, after which it ends; 0: never",
    **FROM_0, jobs=TRAINING)
  host_seconds: int = setting(100, "of silence, after which a host counts as lost; with "
    "--distributed", least=1, most=10**6)
  profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
  evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
  watch: bool = setting(False, "do it for every checkpoint of a run, until that ends",
    jobs=WATCHING)
  watch_seconds: float = setting(30.0, "between two looks", **FROM_0, jobs=WATCHING)
  watch_patience: float = setting(0.0, "seconds without a new checkpoint after which watching "
    "ends; 0: never", **FROM_0, jobs=WATCHING)

  features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
  probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
  lowdata: LowdataConfig = dataclasses.field(default_factory=LowdataConfig)
  finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
  sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
  complete: CompleteConfig = dataclasses.field(default_factory=CompleteConfig)
  quality: QualityConfig = dataclasses.field(default_factory=QualityConfig)
  convert: ConvertConfig = dataclasses.field(default_factory=ConvertConfig)
  download: DownloadConfig = dataclasses.field(default_factory=DownloadConfig)
  compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
  benchmark: BenchmarkConfig = dataclasses.field(default_factory=BenchmarkConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)
  # fmt: on


FIELDS: dict[str, Declaration] = dict(declarations(Settings))


def decides(name: str, kind: str) -> bool:
  """Whether a setting decides the numbers of a training run: of "pretraining" or "finetuning".

  One that this version doesn't know does, unless it belongs to a group none of whose settings do.
  """
  if name in FIELDS:
    return FIELDS[name].decides in ("run", kind)
  group, dot, _ = name.rpartition(".")
  members = [other for other in FIELDS if dot and other.startswith(f"{group}.")]
  return not members or any(decides(member, kind) for member in members)


def no_such(name: str) -> str:
  """What to tell of a name that no setting has; the one that may be meant is suggested."""
  known = [*FIELDS, *(old for names in history.RENAMED.values() for old in names)]
  of_that_end = [other for other in FIELDS if other.rpartition(".")[2] == name.rpartition(".")[2]]
  meant = [name] if name in known else difflib.get_close_matches(name, known, 1) or of_that_end
  suggestion = f"; did you mean config.{history.todays_name(meant[0])}?" if meant else ""
  return f"config.{name}: there is no such setting{suggestion}"


def base() -> Any:
  """All settings with their defaults, a ConfigDict for config files to change."""
  from ml_collections import ConfigDict

  return ConfigDict(dataclasses.asdict(Settings()))


def as_json(settings: Settings) -> dict[str, Any]:
  """The settings as config.json has them."""
  return json.loads(json.dumps(dataclasses.asdict(settings)))
