"""Every setting there is, each declared once.

0 and "" leave a choice to the preset, the data or a checkpoint, as the meanings say. A checkpoint is
one of this program (a workdir, or one step of it), OpenAI's (model.ckpt-N) or Hugging Face's (a
directory). A setting that is new, or has a new name, needs an entry in `history.py`: older workdirs go on.
"""

import dataclasses
import json
import os
import re
from typing import TYPE_CHECKING, Any

from igpt_jax.config.declare import Declaration, Group, declarations, setting
from igpt_jax.errors import UserError

if TYPE_CHECKING:
  from ml_collections import ConfigDict

# Each is a module of igpt_jax.jobs with run(settings, workdir).
JOBS = {
  "pretrain": "train a model on images, from random parameters or from a checkpoint's",
  "evaluate": "measure the exact likelihood of a split, beside baselines that know no neighbours",
  "probe": "fit linear classifiers to the features of every layer",
  "lowdata": "fit linear classifiers to a few labels of each class",
  "finetune": "train a model and a linear head together to classify",
  "sample": "draw images, and complete those of the test split",
  "complete": "complete your own images, or draw from nothing",
  "quality": "measure the Fréchet distance of samples and completions to the test split",
  "fit_palette": "fit a palette of colours to the training images by k-means",
  "prepare": "download and prepare a TFDS data set",
  "convert": "rewrite a checkpoint in another format",
  "download": "fetch OpenAI's released checkpoints and tokens",
  "compile": "compile for a TPU slice that isn't here; predict its memory use and speed",
  "benchmark": "measure how fast this machine trains, attends, samples and reads images",
}

_TRAINING = ("pretrain", "finetune", "probe")
# Jobs that read a checkpoint, those of them that are run on one after the other of a run's, those that draw.
_READING = ("evaluate", "probe", "lowdata", "finetune", "sample", "complete", "quality")
_WATCHING = ("evaluate", "probe", "sample", "quality")
_DRAWING = ("sample", "complete", "quality", "compile", "benchmark")
# Jobs that may make a model of their own.
_MAKING = ("pretrain", "finetune", "compile", "benchmark")
_UPDATING = ("pretrain", "compile", "benchmark")
_COMPUTING = ("pretrain", *_READING, "compile", "benchmark")
_OPENING = tuple(job for job in JOBS if job not in ("complete", "convert", "download", "compile"))

_BATCH = {"least": 1, "most": 65_536}
_COUNT = {"least": 1}
_FROM_0 = {"least": 0}


@dataclasses.dataclass(frozen=True)
class DataConfig(Group, prefix="data", jobs=_OPENING):
  """Which images, how they are made ready, and with how much help."""

  name: str = setting(
    "digits", "digits (made on first use, nothing to download), folder, tokens, or a TFDS name, such as "
    "cifar10, imagenet2012, imagenet_resized/32x32", decides="run",
  )  # fmt: skip
  path: str = setting(
    "", "folder: its root (root/SPLIT/CLASS/*.jpg or root/SPLIT/*.jpg); tokens: a .npy [N, H·W], which is "
    "the test split, or a folder with train.npy, validation.npy, test.npy", path=True, host=True,
  )  # fmt: skip
  data_dir: str = setting("", 'where TFDS keeps prepared data; "": TFDS\' default', host=True)
  resolution: int = setting(
    8, "height and width the model sees, in pixels", least=1, decides="run",
    jobs=(*_OPENING, "compile"),
  )  # fmt: skip
  augment: str = setting(
    "none", "of training images: none, paper (random resize and crop as for ImageNet), cifar (pad, crop, "
    "flip), shift (by up to an eighth of the side; for digits)", decides="run",
    choices=("none", "paper", "cifar", "shift"),
  )  # fmt: skip
  validation: float = setting(
    0.1, "share of train that is held out: the paper's is 0.04 of ImageNet, 0.1 of others, and 0 in its final "
    "runs, which are evaluated on test alone", least=0, below=1, decides="run",
  )  # fmt: skip
  validation_split: str = setting(
    "", 'a stored split held out instead, train is then the whole of train: validation, val; "": none',
    decides="run",
  )  # fmt: skip
  max_bad: float = setting(
    0.001, "share of a split's images that may be unreadable", least=0, most=1
  )
  resample: str = setting(
    "fused", "of augment=paper in training: fused (one resize), literal (the paper's two)", decides="run",
    choices=("fused", "literal"), jobs=("pretrain", "finetune", "fit_palette", "benchmark"),
  )  # fmt: skip
  threads: int = setting(
    0, "that load batches, in each process, each two ahead: more of them hide slow reads; 0: chosen",
    least=0, most=1_024, host=True,
  )  # fmt: skip
  workers: int = setting(0, "processes that load batches; 0: this one", least=0, host=True)
  cache_mb: int = setting(
    512, "a data set whose decoded images fit in this is read once", least=0, host=True
  )
  verify: bool = setting(
    False, "read folders and files of tokens whole to know them, also if they seem unchanged",
    host=True,
  )  # fmt: skip
  manual_dir: str = setting(
    "", 'archives fetched by hand; "": TFDS\' default', path=True, host=True, jobs=("prepare",)
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    most = max(16, 4 * (os.cpu_count() or 1))
    smallest = 5 if self.augment == "cifar" else 1  # 4 pixels are reflected at each side
    largest = 256 if self.augment == "paper" else 1_024
    for name, allowed, expected in (
      ("resolution", smallest <= self.resolution <= largest, f"{smallest} to {largest}"),
      ("workers", self.workers <= most, f"0 to {most}: each takes 100 MB"),
      (
        "validation_split",
        re.fullmatch(r"[\w-]*", self.validation_split) and self.validation_split != "train",
        "the name of a stored split other than train, such as validation",
      ),
      ("name", bool(self.name), "digits, folder, tokens, or a TFDS name"),
    ):
      if not allowed:
        raise UserError(f"config.data.{name}: {getattr(self, name)!r}; expected {expected}")
    if self.name in ("folder", "tokens") and not self.path:
      raise UserError(f"config.data.path: empty; expected where data.name={self.name} lies")


@dataclasses.dataclass(frozen=True)
class PaletteConfig(Group, prefix="palette", jobs=("pretrain", "finetune", "fit_palette")):
  """The colours that images are made of."""

  path: str = setting(
    "", '.npy [k, 3] in [-1, 1]; "default": the project\'s 512 colours, which were fitted to CIFAR-10 '
    '(igpt_jax/data/assets/README.md); "": the checkpoint\'s, or fitted to the training images',
    path=True, host=True, jobs=("pretrain", *_READING, "convert", "benchmark"),
  )  # fmt: skip
  size: int = setting(
    0, "colours; 0: the checkpoint's, those of the path, or 512", least=2, decides="run",
    jobs=(*_MAKING, "fit_palette"),
  )  # fmt: skip
  images: int = setting(10_000, "training images it is fitted to, at most", **_COUNT, decides="run")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Group, prefix="model", jobs=_MAKING):
  """The transformer's size, and how it is computed."""

  size: str = setting(
    "", 's, m, l, xl; "": the checkpoint\'s, or s', choices=("s", "m", "l", "xl"), decides="run"
  )
  n_layer: int = setting(0, "0: the size's", **_FROM_0, decides="run")
  n_head: int = setting(0, "0: the size's", **_FROM_0, decides="run")
  n_embd: int = setting(0, "0: the size's", **_FROM_0, decides="run")
  dtype: str = setting(
    "", 'of activations; "": bfloat16 on accelerators, float32 on CPU',
    choices=("float32", "bfloat16"), jobs=_COMPUTING,
  )  # fmt: skip
  remat: str = setting(
    "", 'what the backward pass computes again: none, names, full, offload; "": the size\'s',
    choices=("none", "names", "full", "offload"),
  )  # fmt: skip
  attention: str = setting(
    "auto", "its implementation", jobs=_COMPUTING,
    choices=("auto", "xla", "blocked", "cudnn", "tpu", "tpu_interpret"),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig(Group, prefix="train", jobs=_UPDATING):
  """Pretraining's updates; and how often any training is logged and saved."""

  batch_size: int = setting(128, "images of one update", **_BATCH, decides="pretraining")
  accumulate: int = setting(
    1, "parts that a batch is worked through in, one update in all", least=1
  )
  steps: int = setting(1_000_000, "updates in all", least=1, decides="pretraining")
  learning_rate: float = setting(0.0, "its peak; 0: the size's", above=0, decides="pretraining")
  warmup_steps: int = setting(0, "of linear warm-up", **_FROM_0, decides="pretraining")
  schedule: str = setting(
    "cosine", "after the warm-up: cosine, to 0 at `steps`, or constant", decides="pretraining",
    choices=("cosine", "constant"),
  )  # fmt: skip
  b1: float = setting(0.9, "Adam's", least=0, below=1, decides="run", jobs=_MAKING)
  b2: float = setting(0.95, "Adam's", least=0, below=1, decides="run", jobs=_MAKING)
  weight_decay: float = setting(
    0.0, "of matrices, decoupled", **_FROM_0, decides="run", jobs=_MAKING
  )
  clip_norm: float = setting(
    0.0, "of the whole gradient; 0: no clipping", **_FROM_0, decides="run", jobs=_MAKING
  )
  log_every: int = setting(50, "steps between two logs", least=1, jobs=_TRAINING)
  eval_every: int = setting(
    1_000, "steps between two evaluations; 0: at the end only", **_FROM_0, jobs=("pretrain",)
  )
  eval_images: int = setting(
    10_000, "of the validation split, at most; 0: all", **_FROM_0, jobs=_TRAINING
  )
  checkpoint_every: int = setting(
    1_000, "steps between two checkpoints", least=1, jobs=("pretrain",)
  )
  max_to_keep: int = setting(
    3, "newest checkpoints that are kept", least=1, jobs=("pretrain", "finetune")
  )
  keep_period: int = setting(
    0, "checkpoints at multiples of this are kept, too; 0: none", **_FROM_0,
    jobs=("pretrain", "finetune"),
  )  # fmt: skip
  save_retry_seconds: float = setting(
    600.0, "in which a save that fails is tried again; 0: never", **_FROM_0, jobs=_TRAINING
  )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Group, prefix="mesh", jobs=_COMPUTING):
  """How many devices share what; one may be -1: what is left."""

  data: int = setting(-1, "groups of devices, each with images of its own")
  fsdp: int = setting(1, "devices that split parameters and optimizer state, and images, too")
  tensor: int = setting(1, "devices that split each image's computation")


@dataclasses.dataclass(frozen=True)
class GuardConfig(Group, prefix="guard", jobs=_TRAINING):
  """What counts as bad numbers in training, and what is to be done about them."""

  in_row: int = setting(
    10, "updates left out one after the other, not being finite, until `then` is done", least=1
  )
  then: str = setting(
    "rollback", "to the last checkpoint before, with other data; or stop; or warn, which only tells",
    choices=("rollback", "stop", "warn"),
  )  # fmt: skip
  spike: float = setting(
    1.0, "nats per token above the median of the last 20 logged losses that are a spike; 0: none is",
    least=0,
  )  # fmt: skip
  spike_then: str = setting(
    "warn", "rollback, stop or warn, at a spike", choices=("rollback", "stop", "warn")
  )
  rollbacks: int = setting(3, "of one run, at most; then it stops", **_FROM_0)


@dataclasses.dataclass(frozen=True)
class ProfileConfig(Group, prefix="profile", jobs=_TRAINING):
  """Which training steps to trace."""

  start: int = setting(0, "the first step", **_FROM_0)
  steps: int = setting(0, "how many; 0: none", **_FROM_0)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Group, prefix="evaluate", jobs=("evaluate",)):
  """The likelihood of a split."""

  split: str = setting("test", "to evaluate", choices=("test", "validation", "train"))
  batch_size: int = setting(128, "images at a time", **_BATCH)
  images: int = setting(0, "at most; 0: all", **_FROM_0, jobs=("evaluate", "finetune"))
  masks: int = setting(1, "masked objective: masks drawn per image", **_COUNT)
  baseline_images: int = setting(50_000, "training images the unigrams are counted on", **_COUNT)


@dataclasses.dataclass(frozen=True)
class FeaturesConfig(Group, prefix="features", jobs=("probe", "lowdata")):
  """What linear classifiers are fitted to."""

  layers: tuple[int, ...] = setting((), "of 0 to n_layer; (): all")
  grid: int = setting(
    1, "means over grid × grid blocks of pixels, side by side; 1: over all", **_COUNT
  )
  masks: int = setting(
    0, "BERT: means over that many masked inputs; 0: nothing is masked", **_FROM_0
  )
  batch_size: int = setting(128, "images at a time", **_BATCH)
  images: int = setting(0, "training images, at most; 0: all", **_FROM_0)
  eval_images: int = setting(0, "of validation, and of test, at most; 0: all", **_FROM_0)
  cache: str = setting(
    "", 'where they are kept; "": features/ in the workdir', path=True, host=True
  )
  baselines: tuple[str, ...] = setting(
    ("pixels", "pca", "random"), "to compare with: these, or some of them",
    choices=("pixels", "pca", "random"),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Group, prefix="probe", jobs=("probe",)):
  """Linear classifiers on all labels."""

  method: str = setting(
    "", 'lbfgs, sgd (ImageNet\'s size); "": by the number of images', choices=("lbfgs", "sgd")
  )
  concatenate: tuple[int, ...] = setting((), "layers, side by side, as one more set of features")
  around_best: int = setting(
    0, "that many layers around the best, likewise; 5 in the paper", **_FROM_0
  )
  max_iterations: int = setting(1_000, "of L-BFGS", **_COUNT, jobs=("probe", "lowdata"))
  cached: bool = setting(True, "sgd: from stored features; False: from images, each time anew")
  learning_rates: tuple[float, ...] = setting(
    (30.0, 10.0, 3.0, 1.0, 0.3), "sgd: all at the same time", above=0, empty=False
  )
  steps: int = setting(1_000_000, "sgd", **_COUNT)
  batch_size: int = setting(128, "sgd", **_BATCH)
  eval_every: int = setting(10_000, "sgd: validation accuracy, and a checkpoint", **_COUNT)


@dataclasses.dataclass(frozen=True)
class LowdataConfig(Group, prefix="lowdata", jobs=("lowdata",)):
  """Linear classifiers on a few labels."""

  labels_per_class: tuple[int, ...] = setting(
    (1, 4, 25, 250, 400), "how many labels are given", least=1, empty=False
  )
  trials: int = setting(5, "random subsets of each", **_COUNT)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Group, prefix="finetune", jobs=("finetune",)):
  """Training a model and a linear head together."""

  scratch: bool = setting(False, "from random parameters, to compare with", decides="finetuning")
  layer: int = setting(-1, "whose features the head reads; -1: the last", decides="finetuning")
  generative: float = setting(
    1.0, "weight of the objective's loss; 0: classification alone", **_FROM_0, decides="finetuning"
  )
  classification: float = setting(
    1.0, "weight of the classification loss", **_FROM_0, decides="finetuning"
  )
  augment: str = setting(
    "", 'of training images; "": data.augment', choices=("none", "paper", "cifar", "shift"),
    decides="finetuning",
  )  # fmt: skip
  images: int = setting(0, "training images, at most; 0: all", **_FROM_0, decides="finetuning")
  batch_size: int = setting(128, "images of one update", **_BATCH, decides="finetuning")
  learning_rate: float = setting(0.0, "0: a tenth of the size's", above=0, decides="finetuning")
  warmup_steps: int = setting(0, "of linear warm-up", **_FROM_0, decides="finetuning")
  steps: int = setting(10_000, "updates, at most", **_COUNT, decides="finetuning")
  eval_every: int = setting(
    250, "validation accuracy, and a checkpoint", **_COUNT, decides="finetuning"
  )
  patience: int = setting(
    10, "evaluations without a better one after which it ends; 0: never", **_FROM_0,
    decides="finetuning",
  )  # fmt: skip
  masks: int = setting(5, "BERT: masks per image in evaluation", **_COUNT, decides="finetuning")


@dataclasses.dataclass(frozen=True)
class SampleConfig(Group, prefix="sample", jobs=("sample",)):
  """How images are drawn."""

  samples: int = setting(
    32, "unconditional images; 0: compile leaves sampling out", least=0, most=65_536,
    jobs=("sample", "compile"),
  )  # fmt: skip
  completions: int = setting(8, "images of test to complete", **_BATCH)
  per_image: int = setting(4, "completions of each", **_BATCH)
  keep: float = setting(
    0.5, "share of the rows that is given", above=0, below=1, jobs=("sample", "quality")
  )
  temperature: float = setting(1.0, "1e-6 or more; 0: the likeliest colour", jobs=_DRAWING)
  top_k: int = setting(0, "of the likeliest colours; 0: all", jobs=_DRAWING)
  top_p: float = setting(
    1.0, "1e-6 to 1: the likeliest colours whose probabilities reach it", jobs=_DRAWING
  )
  cache: str = setting(
    "", 'dtype of keys and values: float32, bfloat16, int8; "": the model\'s',
    choices=("float32", "bfloat16", "int8"), jobs=("sample", "complete", "quality", "compile"),
  )  # fmt: skip
  scale: int = setting(
    0, "image pixels per model pixel in the PNGs; 0: chosen", **_FROM_0, jobs=("sample", "complete")
  )
  batch_size: int = setting(64, "samples drawn at a time", **_BATCH, jobs=("complete", "quality"))


@dataclasses.dataclass(frozen=True)
class CompleteConfig(Group, prefix="complete", jobs=("complete",)):
  """Images of one's own, and what is given of them."""

  images: str = setting(
    "", 'a file, a glob in quotes, or a folder; "": samples from nothing', path=True, host=True
  )
  keep: float = setting(
    0.5, "share of the rows (or columns) that is given; to draw whole images leave `images` out",
    above=0, below=1,
  )  # fmt: skip
  hide: str = setting(
    "lower", "the part to draw; by BERT also upper, left, right, centre, or an image of a mask"
  )
  passes: int = setting(16, "BERT: over the image, the most confident pixels first", **_COUNT)
  n: int = setting(8, "samples of each image", **_BATCH)


@dataclasses.dataclass(frozen=True)
class QualityConfig(Group, prefix="quality", jobs=("quality",)):
  """The distance of samples to held-out images."""

  images: int = setting(
    1_000, "samples, completions, and images of test to compare them with", least=2
  )
  network: str = setting(
    "", 'a checkpoint, or a network in .onnx, whose features are compared; "": the model itself',
    path=True,
  )  # fmt: skip
  layer: int = setting(-1, "of that checkpoint; -1: the middle one")


@dataclasses.dataclass(frozen=True)
class ConvertConfig(Group, prefix="convert", jobs=("convert",)):
  """From where to where."""

  source: str = setting("", "a checkpoint", path=True, host=True)
  target: str = setting("", "what to write; nothing may be there", path=True)
  format: str = setting(
    "orbax", "orbax (this program's own), huggingface, openai",
    choices=("openai", "huggingface", "orbax"),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DownloadConfig(Group, prefix="download", jobs=("download",)):
  """Which of the released files."""

  model: str = setting("s", 's, m, l; "": none', choices=("s", "m", "l", ""))
  step: int = setting(
    1_000_000, "or 131000, 262000, 524000", choices=(131_000, 262_000, 524_000, 1_000_000)
  )
  bert: bool = setting(False, "the model of the BERT objective")
  data: str = setting(
    "imagenet", 'test split as tokens: imagenet, cifar10; "": none', choices=("imagenet", "cifar10", "")
  )  # fmt: skip
  directory: str = setting("downloads", "where they go", path=True)
  url: str = setting("", 'of a mirror; "": where they were released')


@dataclasses.dataclass(frozen=True)
class CompileConfig(Group, prefix="compile", jobs=("compile",)):
  """A slice to compile for."""

  topology: str = setting("", "chips that needn't be here, such as v5p:4x4x4")
  plan: bool = setting(False, "look for the fastest mesh, batch and remat that fit")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Group, prefix="benchmark", jobs=("benchmark",)):
  """What is measured of this machine."""

  parts: tuple[str, ...] = setting(
    ("training", "attention", "sampling", "input"), "what to measure", empty=False,
    choices=("training", "attention", "sampling", "input"),
  )  # fmt: skip
  repeats: int = setting(5, "timings of each, medians are told", **_COUNT)
  samples: int = setting(8, "images that are sampled at a time", **_BATCH)
  images: int = setting(200, "of the data set, that the input pipeline is timed on", **_COUNT)


@dataclasses.dataclass(frozen=True)
class LogConfig(Group, prefix="log", jobs=_TRAINING):
  """Where metrics go beside metrics.jsonl."""

  tensorboard: bool = setting(False, "files that TensorBoard shows", host=True)
  wandb: bool = setting(False, "Weights & Biases", host=True)
  wandb_project: str = setting("igpt_jax", "its project there", host=True)


@dataclasses.dataclass(frozen=True)
class Settings(Group, jobs=tuple(JOBS)):
  """All settings of a start, as `config.read` made them."""

  job: str = setting("pretrain", "what to do", choices=tuple(JOBS))
  seed: int = setting(
    0, "of everything drawn", least=0, most=2**32 - 1, decides="run",
    jobs=(*_TRAINING, "lowdata", "sample", "complete", "quality", "fit_palette"),
  )  # fmt: skip
  init_from: str = setting(
    "", 'a checkpoint that pretraining takes its first parameters from; "": random ones', path=True,
    decides="run", host=True, jobs=("pretrain", *_READING, "benchmark"),
  )  # fmt: skip
  checkpoint: str = setting(
    "", 'what is read; "": --workdir\'s newest, or else init_from', path=True, host=True, jobs=_READING
  )  # fmt: skip

  data: DataConfig = DataConfig()
  palette: PaletteConfig = PaletteConfig()
  model: ModelConfig = ModelConfig()

  objective: str = setting(
    "", 'autoregressive, masked (BERT); "": the checkpoint\'s, or autoregressive', decides="run",
    choices=("autoregressive", "masked"), jobs=_MAKING,
  )  # fmt: skip
  mask_probability: float = setting(
    0.15, "of the masked objective, where a checkpoint doesn't say", above=0, below=1, decides="run",
    jobs=(*_COMPUTING, "convert"),
  )  # fmt: skip

  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  guard: GuardConfig = GuardConfig()
  hang_seconds: float = setting(
    1_800.0, "training without progress, after which it ends; 0: never", **_FROM_0, jobs=_TRAINING
  )
  host_seconds: int = setting(
    100, "of silence, after which a host counts as lost; with --distributed", least=1, most=10**6
  )
  profile: ProfileConfig = ProfileConfig()
  evaluate: EvaluateConfig = EvaluateConfig()
  watch: bool = setting(
    False, "do it for every checkpoint of a run, until that ends", jobs=_WATCHING
  )
  watch_seconds: float = setting(30.0, "between two looks", **_FROM_0, jobs=_WATCHING)
  watch_patience: float = setting(
    0.0, "seconds without a new checkpoint after which watching ends; 0: never", **_FROM_0,
    jobs=_WATCHING,
  )  # fmt: skip

  features: FeaturesConfig = FeaturesConfig()
  probe: ProbeConfig = ProbeConfig()
  lowdata: LowdataConfig = LowdataConfig()
  finetune: FinetuneConfig = FinetuneConfig()
  sample: SampleConfig = SampleConfig()
  complete: CompleteConfig = CompleteConfig()
  quality: QualityConfig = QualityConfig()
  convert: ConvertConfig = ConvertConfig()
  download: DownloadConfig = DownloadConfig()
  compile: CompileConfig = CompileConfig()
  benchmark: BenchmarkConfig = BenchmarkConfig()
  log: LogConfig = LogConfig()


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


def base() -> "ConfigDict":
  """All settings with their defaults, for config files to change."""
  from ml_collections import ConfigDict

  return ConfigDict(dataclasses.asdict(Settings()))


def as_json(settings: Settings) -> dict[str, Any]:
  """The settings as config.json has them."""
  return json.loads(json.dumps(dataclasses.asdict(settings)))
