"""Settings of jobs other than training. Ground floor."""

import dataclasses
import itertools

from igpt_jax.config.declare import (
  BATCH,
  COUNT,
  DRAWING,
  FROM_0,
  MEASURING,
  PRETRAINING,
  Group,
  setting,
)
from igpt_jax.errors import UserError

# A table: a setting takes as few lines as it needs.
# fmt: off


@dataclasses.dataclass(frozen=True)
class AblateConfig(Group, prefix="ablate", jobs=("ablate",)):
  """Runs that differ in some settings (igpt_jax/config/overrides.py), trained and compared."""

  runs: tuple[str, ...] = setting((), 'each "NAME: SETTING=VALUE …", over the other settings')
  seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of every run", least=0, most=2**32 - 1,
    empty=False)
  baseline: str = setting("", 'run that the others are compared with; "": the first')
  test: bool = setting(True, "evaluate on test, when all runs have been trained")
  probe: str = setting("none", "linear probe of every run: none, layers (of which the best counts)",
    choices=("none", "layers"))
  workdirs: tuple[str, ...] = setting((), "finished workdirs of job pretrain, to compare instead of "
    "training")

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("seeds", "runs", "workdirs"):
      values = getattr(self, name)
      if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise UserError(f"config.ablate.{name}: {twice[0]!r} twice; expected each once")
      if name != "seeds" and not all(isinstance(value, str) for value in values):
        raise UserError(f"config.ablate.{name}: {values!r:.200}; expected texts")
    if len(self.workdirs) == 1:
      raise UserError(f"config.ablate.workdirs: {self.workdirs[0]!r}; expected two or more to compare")


@dataclasses.dataclass(frozen=True)
class IsoflopConfig(Group, prefix="isoflop", jobs=("isoflop",)):
  """Runs of several sizes at each of several budgets, and the surface of losses that is fitted to them."""

  budgets: tuple[float, ...] = setting((3e11, 1e12, 3e12, 1e13), "FLOPs of a run, which the surface is "
    "fitted to", above=0, empty=False)
  held_out: float = setting(0.0, "FLOPs of a run that is forecast first, and then trained; 0: none", **FROM_0)
  shapes: tuple[str, ...] = setting((), "shapes of the ladder (igpt_jax/isoflop/ladder.py) to choose "
    "from, LAYERSxWIDTH; (): all")
  per_budget: int = setting(5, "shapes that a budget trains, around the best size expected", least=3,
    most=9)
  tokens_per_parameter: float = setting(300.0, "expected of the best size at the first budget", above=0)
  seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of the middle shape of each budget; the first is that "
    "of all others", least=0, most=2**32 - 1, empty=False)
  max_epochs: float = setting(4.0, "epochs from which on repeated images are no longer as good as new ones",
    above=0)
  beyond: str = setting("warn", "what to do about a run of more epochs: warn, refuse", choices=("warn",
    "refuse"))
  draws: int = setting(400, "surfaces of the bootstrap that intervals are made of", least=20, most=100_000)
  budget: float = setting(0.0, "FLOPs to write a config file for, when all is trained; 0: none", **FROM_0)

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("seeds", "shapes"):
      values = getattr(self, name)
      if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise UserError(f"config.isoflop.{name}: {twice[0]!r} twice; expected each once")
    budgets = self.budgets
    if len(budgets) < 2 or any(b < 1.5 * a for a, b in itertools.pairwise(budgets)):
      raise UserError(
        f"config.isoflop.budgets: {budgets!r:.200}; expected two or more, the smallest first, about ×3 apart "
        "(×1.5 at least)"
      )
    if self.held_out and self.held_out <= budgets[-1]:
      raise UserError(
        f"config.isoflop.held_out: {self.held_out:g}; expected more than the budgets, {budgets[-1]:g}; "
        "0 holds none out"
      )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Group, prefix="evaluate", jobs=("evaluate", "ablate")):
  """The likelihood of a split."""

  split: str = setting("test", "split to evaluate", choices=("test", "validation", "train"),
    jobs=("evaluate",))
  batch_size: int = setting(128, "images at a time", **BATCH)
  images: int = setting(0, "images, at most; 0: all", **FROM_0, jobs=("evaluate", "finetune", "ablate"))
  masks: int = setting(1, "masked objective: masks drawn per image", **COUNT)
  baseline_images: int = setting(50_000, "training images that unigrams are counted on", **COUNT,
    jobs=("evaluate",))


@dataclasses.dataclass(frozen=True)
class FeaturesConfig(Group, prefix="features", jobs=("probe", "lowdata", "ablate")):
  """Features that linear classifiers are fitted to."""

  layers: tuple[int, ...] = setting((), "layers, 0 to n_layer; (): all", items=int)
  grid: int = setting(1, "concatenate means over grid × grid blocks of pixels; 1: mean over all",
    **COUNT)
  masks: int = setting(0, "BERT: masked inputs to average features over; 0: nothing is masked",
    **FROM_0)
  batch_size: int = setting(128, "images at a time", **BATCH)
  images: int = setting(0, "training images, at most; 0: all", **FROM_0)
  eval_images: int = setting(0, "images of validation, and of test, at most; 0: all", **FROM_0)
  cache: str = setting("", 'folder of stored features; "": features/ in the workdir', path=True,
    bucket=True, host=True, jobs=("probe", "lowdata"))
  baselines: tuple[str, ...] = setting(("pixels", "pca", "random"), "to compare with: these, or "
    "some of them", choices=("pixels", "pca", "random"), jobs=("probe", "lowdata"))


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Group, prefix="probe", jobs=("probe",)):
  """Classifiers on all labels."""

  pooling: str = setting("mean", "mean over positions, and linear classifiers; or attentive: one "
    "learned query attends to all positions (AIM's probe), results in probe_attentive.*",
    choices=("mean", "attentive"))
  heads: int = setting(0, "attentive: heads of the attention; 0: as many as the model has", **FROM_0)
  method: str = setting("", "mean: lbfgs, sgd (ImageNet's size); \"\": by the number of images",
    choices=("lbfgs", "sgd"))
  concatenate: tuple[int, ...] = setting((), "layers to concatenate, as one more set of features",
    items=int)
  around_best: int = setting(0, "layers around the best to concatenate, likewise; 5 in the paper",
    **FROM_0)
  max_iterations: int = setting(1_000, "iterations of L-BFGS", **COUNT,
    jobs=("probe", "lowdata", "ablate"))
  cached: bool = setting(True, "sgd, attentive: train on stored features (attentive: of every "
    "position); False: compute them anew")
  learning_rates: tuple[float, ...] = setting((30.0, 10.0, 3.0, 1.0, 0.3), "sgd: trained in "
    "parallel", above=0, empty=False)
  attention_rates: tuple[float, ...] = setting((3e-3, 1e-3, 3e-4, 1e-4), "attentive: AdamW's "
    "learning rates, trained in parallel", above=0, empty=False)
  steps: int = setting(1_000_000, "sgd: updates", **COUNT)
  epochs: int = setting(100, "attentive: passes over the training images", **COUNT)
  batch_size: int = setting(128, "sgd, attentive: images in an update", **BATCH)
  eval_every: int = setting(10_000, "sgd, attentive: steps between two evaluations, and checkpoints",
    **COUNT)


@dataclasses.dataclass(frozen=True)
class LowdataConfig(Group, prefix="lowdata", jobs=("lowdata",)):
  """Linear classifiers on a few labels."""

  labels_per_class: tuple[int, ...] = setting((1, 4, 25, 250, 400), "labels per class",
    least=1, empty=False)
  trials: int = setting(5, "random subsets per number of labels", **COUNT)


@dataclasses.dataclass(frozen=True)
class SampleConfig(Group, prefix="sample", jobs=("sample",)):
  """Sampling of images."""

  samples: int = setting(32, "unconditional images; 0: compile leaves sampling out", least=0,
    most=65_536, jobs=("sample", "compile"))
  completions: int = setting(8, "images of test to complete", **BATCH)
  per_image: int = setting(4, "completions per image", **BATCH, jobs=(*PRETRAINING, "sample"))
  keep: float = setting(0.5, "share of the rows that is kept", above=0, below=1,
    jobs=(*PRETRAINING, "sample", "quality"))
  temperature: float = setting(1.0, "1e-6 or more; 0: the likeliest colour", jobs=DRAWING)
  top_k: int = setting(0, "of the likeliest colours; 0: all", jobs=DRAWING)
  top_p: float = setting(1.0, "1e-6 to 1: the likeliest colours whose probabilities reach it",
    jobs=DRAWING)
  cache: str = setting("", "dtype of keys and values: float32, bfloat16, int8; \"\": the model's",
    choices=("float32", "bfloat16", "int8"),
    jobs=(*PRETRAINING, "sample", "complete", "quality", "compile"))
  scale: int = setting(0, "image pixels per model pixel in the PNGs; 0: chosen", **FROM_0,
    jobs=(*PRETRAINING, "sample", "complete"))
  batch_size: int = setting(64, "samples drawn at a time", **BATCH, jobs=("complete", "quality"))


@dataclasses.dataclass(frozen=True)
class CompleteConfig(Group, prefix="complete", jobs=("complete",)):
  """Images to complete, and the part of them that is kept."""

  images: str = setting("", 'a file, a glob in quotes, or a folder; "": samples from nothing',
    path=True, host=True)
  keep: float = setting(0.5, "share of the rows (or columns) that is kept; to draw whole images "
    "leave `images` out", above=0, below=1)
  hide: str = setting("lower", "the part to draw; by BERT also upper, left, right, centre, or an "
    "image of a mask")
  passes: int = setting(16, "BERT: passes over the image, the most confident pixels first", **COUNT,
    jobs=(*PRETRAINING, "complete"))
  n: int = setting(8, "samples per image", **BATCH)


@dataclasses.dataclass(frozen=True)
class QualityConfig(Group, prefix="quality", jobs=("quality",)):
  """The distance of samples to held-out images."""

  images: int = setting(1_000, "samples, completions, and images of test to compare them with",
    least=2)
  network: str = setting("", "a checkpoint, or a network in .onnx, whose features are compared; "
    '"": the model itself', path=True)
  layer: int = setting(-1, "layer of that checkpoint; -1: the middle one")


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Group, prefix="prepare", jobs=("prepare",)):
  """A smaller copy of a prepared data set, whose training images are read faster."""

  short_side: int = setting(0, "pixels of its training images' shorter side: 256 serves models of "
    "32×32 to 64×64; 0: no copy", least=64, most=1024)
  quality: int = setting(95, "of JPEG, colours at full resolution; 0: PNG", least=0, most=100)
  target: str = setting("", 'its folder, for data.data_dir; "": data_dir-shortN', path=True)


@dataclasses.dataclass(frozen=True)
class ConvertConfig(Group, prefix="convert", jobs=("convert",)):
  """The checkpoint to convert, its target and format."""

  source: str = setting("", "a checkpoint", path=True, bucket=True, host=True)
  target: str = setting("", "what to write; nothing may be there", path=True, bucket=True)
  format: str = setting("orbax", "orbax (this program's own), safetensors (the same as one file), "
    "huggingface, openai", choices=("openai", "huggingface", "orbax", "safetensors"))
  dtype: str = setting("", 'what weights are rounded to; "": as they are',
    choices=("float32", "bfloat16", ""))


@dataclasses.dataclass(frozen=True)
class DownloadConfig(Group, prefix="download", jobs=("download",)):
  """Released files to fetch."""

  model: str = setting("s", 's, m, l (XL was not released); "": none',
    choices=("s", "m", "l", ""))
  step: int = setting(1_000_000, "or 131000, 262000, 524000",
    choices=(131_000, 262_000, 524_000, 1_000_000))
  bert: bool = setting(False, "the model of the BERT objective")
  data: str = setting("imagenet", 'test split as tokens: imagenet, cifar10; "": none',
    choices=("imagenet", "cifar10", ""))
  directory: str = setting("downloads", "folder to write to", path=True)
  url: str = setting("", 'mirror; "": where they were released')


@dataclasses.dataclass(frozen=True)
class CompileConfig(Group, prefix="compile", jobs=("compile",)):
  """The slice to compile for."""

  topology: str = setting("", "chips that needn't be here, such as v5p:4x4x4; mesh.slices: how many "
    "such slices")
  network: float = setting(0.0, "Gbit/s that a chip sends to other slices; 0: the figure published for "
    "its generation", **FROM_0)
  plan: bool = setting(False, "look for the fastest mesh, batch and remat that fit")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Group, prefix="benchmark", jobs=("benchmark",)):
  """Measurements of this machine."""

  parts: tuple[str, ...] = setting(("training", "attention", "sampling", "input"), "what to "
    "measure", empty=False, choices=("training", "attention", "sampling", "input"))
  repeats: int = setting(5, "timings of a measurement, whose median is reported", **COUNT, jobs=MEASURING)
  samples: int = setting(8, "images drawn at a time", **BATCH, jobs=MEASURING)
  images: int = setting(200, "images of the data set that the input pipeline is timed on", **COUNT,
    jobs=MEASURING)


@dataclasses.dataclass(frozen=True)
class FirstContactConfig(Group, prefix="first_contact", jobs=("first_contact",)):
  """A report on new machines, within some minutes. What else the job reads replaces the configs' own values,
  unless it is the program's default."""

  minutes: float = setting(10.0, "time after which no part begins; one that has begun is ended early", above=0)
  configs: tuple[str, ...] = setting((), "configs to measure, by names or paths, those first that train "
    "fastest; (): imagenet32_s, _m and _l, on a CPU quickstart")
  parts: tuple[str, ...] = setting(("training", "sampling", "input", "forecast"), "what to do, in this "
    "order; forecasts are for TPUs", empty=False, choices=("training", "sampling", "input", "forecast"))
