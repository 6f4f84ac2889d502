"""Every setting there is, with its default; and their translation into what the rooms take.

A config file builds on `base()` and changes what it is about. The ConfigDict ends here: below the
jobs there are frozen dataclasses.
"""

import dataclasses
import json
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from igpt_jax.data.sources import DataConfig
from igpt_jax.errors import UserError
from igpt_jax.model.attention import IMPLEMENTATIONS
from igpt_jax.model.decoding import SamplingConfig
from igpt_jax.model.decoding_cache import CACHE_DTYPES
from igpt_jax.model.image_gpt import PRESETS, ImageGPTConfig, Preset
from igpt_jax.prediction.topology import check_name
from igpt_jax.training.objectives import OBJECTIVES
from igpt_jax.training.optimizer import OptimizerConfig
from igpt_jax.training.profiling import Window

MODEL_SHAPE = ("n_layer", "n_head", "n_embd")


def base() -> ConfigDict:
  """All fields. 0 and "" leave the choice to the preset, the data or a checkpoint, as comments say.

  A checkpoint is one of this program (a workdir, or one step of it), OpenAI's (model.ckpt-N) or
  Hugging Face's (a directory).
  """
  config = ConfigDict()
  config.job = "pretrain"  # a name in igpt_jax.jobs
  config.seed = 0
  config.init_from = ""  # checkpoint that pretrain takes its first parameters from; "": random ones
  config.checkpoint = ""  # what the other jobs read; "": --workdir's newest, or else init_from

  config.data = ConfigDict()
  config.data.name = "digits"  # digits, folder, tokens, or a TFDS name
  config.data.path = ""  # of a folder of pictures, or of tokens [N, H·W] in .npy
  config.data.data_dir = ""  # TFDS' data_dir; "": TFDS' default
  config.data.resolution = 8  # height and width the model sees
  config.data.augment = "none"  # of training pictures: none, paper, cifar, shift
  config.data.validation = 0.1  # share of train held out
  config.data.max_bad = 0.001  # share of unreadable pictures to put up with
  config.data.resample = "fused"  # of `paper` in training: fused (one resize), literal (the two)
  config.data.threads = 0  # that load pictures, in each process; 0: chosen
  config.data.workers = 0  # processes that load pictures; 0: this one
  config.data.cache_mb = 512  # a data set whose decoded pictures fit in this is read once
  config.data.manual_dir = ""  # job prepare: archives fetched by hand; "": TFDS' default

  config.palette = ConfigDict()
  # .npy [k, 3] in [-1, 1]; "default": the project's 512 colours, which were fitted to CIFAR-10
  # (igpt_jax/data/assets/README.md); "": the checkpoint's, or fitted to the training pictures.
  config.palette.path = ""
  config.palette.size = 0  # colours; 0: the checkpoint's, those of the path, or 512
  config.palette.images = 10_000  # training pictures it is fitted to, at most

  config.model = ConfigDict()
  config.model.size = ""  # s, m, l, xl; "": init_from's, or s
  config.model.n_layer = 0  # 0: the size's
  config.model.n_head = config.model.n_embd = 0
  config.model.dtype = ""  # float32, bfloat16; "": bfloat16 on accelerators, float32 on CPU
  config.model.remat = ""  # none, names, full, offload; "": the size's
  config.model.attention = "auto"

  config.objective = ""  # autoregressive, masked (BERT); "": init_from's, or autoregressive
  config.mask_probability = 0.15  # of the masked objective

  config.train = ConfigDict()
  config.train.batch_size = 128
  config.train.accumulate = 1  # parts that a batch is worked through in, one update in all
  config.train.steps = 1_000_000
  config.train.learning_rate = 0.0  # 0: the size's
  config.train.warmup_steps = 0
  config.train.schedule = "cosine"  # to 0 at `steps`; or constant
  config.train.b1 = 0.9
  config.train.b2 = 0.95
  config.train.weight_decay = 0.0
  config.train.clip_norm = 0.0  # 0: no clipping
  config.train.log_every = 50
  config.train.eval_every = 1_000  # 0: at the end only
  config.train.eval_images = 10_000  # of the validation split, at most; 0: all
  config.train.checkpoint_every = 1_000
  config.train.keep = 3  # newest checkpoints
  config.train.keep_every = 0  # and those at multiples of this; 0: none
  config.train.save_retry_seconds = 600.0  # in which a save that fails is tried again; 0: never

  config.mesh = ConfigDict()  # devices; one may be -1: what is left
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1
  config.hang_seconds = 1_800.0  # training without progress, after which it ends; 0: never
  config.host_seconds = 100  # of silence, after which a host counts as lost; with --distributed
  config.profile = ConfigDict({"start": 0, "steps": 0})  # which training steps to trace; 0: none

  config.evaluate = ConfigDict()
  config.evaluate.split = "test"
  config.evaluate.batch_size = 128
  config.evaluate.images = 0  # at most; 0: all
  config.evaluate.masks = 1  # masked objective: masks drawn per picture
  config.evaluate.baseline_images = 50_000  # training pictures the unigrams are counted on

  config.watch = False  # evaluate, probe, sample: every checkpoint of a run, until it ends
  config.watch_seconds = 30.0  # between two looks
  config.watch_patience = 0.0  # seconds without a new one after which watching ends; 0: never

  config.features = ConfigDict()  # of probe and lowdata
  config.features.layers = ()  # of 0 to n_layer; (): all
  config.features.grid = 1  # means over grid × grid blocks of pixels, side by side; 1: over all
  config.features.masks = 0  # BERT: means over that many masked inputs; 0: nothing is masked
  config.features.batch_size = 128
  config.features.images = 0  # training pictures, at most; 0: all
  config.features.eval_images = 0  # of validation, and of test, at most; 0: all
  config.features.cache = ""  # where they are kept; "": features/ in the workdir
  config.features.baselines = ("pixels", "pca", "random")  # beside them: these, or some of them

  config.probe = ConfigDict()
  config.probe.method = ""  # lbfgs, sgd (ImageNet's size); "": by the number of pictures
  config.probe.concatenate = ()  # layers, side by side, as one more set of features
  config.probe.around_best = 0  # that many layers around the best, likewise; 5 in the paper
  config.probe.max_iterations = 1_000  # of L-BFGS
  config.probe.cached = True  # sgd: from stored features; False: from pictures, each time anew
  config.probe.learning_rates = (30.0, 10.0, 3.0, 1.0, 0.3)  # sgd: all at the same time
  config.probe.steps = 1_000_000  # sgd
  config.probe.batch_size = 128  # sgd
  config.probe.eval_every = 10_000  # sgd: validation accuracy, and a checkpoint

  config.lowdata = ConfigDict()
  config.lowdata.labels_per_class = (1, 4, 25, 250, 400)
  config.lowdata.trials = 5  # random subsets of each

  config.finetune = ConfigDict()
  config.finetune.scratch = False  # from random parameters, to compare with
  config.finetune.layer = -1  # whose features the head reads; -1: the last
  config.finetune.generative = 1.0  # weight of the objective's loss; 0: classification alone
  config.finetune.classification = 1.0  # weight of the classification loss
  config.finetune.augment = ""  # of training pictures; "": data.augment
  config.finetune.images = 0  # training pictures, at most; 0: all
  config.finetune.batch_size = 128
  config.finetune.learning_rate = 0.0  # 0: a tenth of the size's
  config.finetune.warmup_steps = 0
  config.finetune.steps = 10_000  # at most
  config.finetune.eval_every = 250  # validation accuracy, and a checkpoint
  config.finetune.patience = 10  # evaluations without a better one after which it ends; 0: never
  config.finetune.masks = 5  # BERT: masks per picture in evaluation

  config.sample = ConfigDict()
  config.sample.samples = 32  # unconditional pictures; 0: compile leaves sampling out
  config.sample.completions = 8  # held-out pictures to complete
  config.sample.per_picture = 4  # completions of each
  config.sample.keep = 0.5  # share of the rows that is given
  config.sample.temperature = 1.0
  config.sample.top_k = 0
  config.sample.top_p = 1.0
  config.sample.cache = ""  # of keys and values: float32, bfloat16, int8; "": the model's dtype
  config.sample.scale = 0  # picture pixels per model pixel in the PNGs; 0: chosen
  config.sample.batch_size = 64  # complete: samples drawn at a time

  config.images = ""  # complete: a file, a glob in quotes, or a folder; "": samples from nothing
  config.keep = 0.5  # complete: share of the rows (or columns) that is given
  config.hide = "lower"  # complete: and by BERT upper, left, right, centre, or a picture of a mask
  config.passes = 16  # complete, by BERT: over the picture, the surest pixels first
  config.n = 8  # complete: samples of each picture

  config.quality = ConfigDict()
  config.quality.images = 1_000  # samples, completions, and pictures of test to compare them with
  config.quality.network = ""  # a checkpoint, or a network in .onnx; "": the model itself
  config.quality.layer = -1  # of that checkpoint; -1: the middle one

  config.source = ""  # convert: a checkpoint
  config.target = ""  # convert: what to write; nothing may be there
  config.format = "orbax"  # convert: orbax (this program's own), huggingface, openai

  config.download = ConfigDict()  # of the released files
  config.download.model = "s"  # s, m, l; "": none
  config.download.step = 1_000_000  # or 131000, 262000, 524000
  config.download.bert = False
  config.download.data = "imagenet"  # test split as tokens: imagenet, cifar10; "": none
  config.download.directory = "downloads"
  config.download.url = ""  # of a mirror; "": where they were released

  config.topology = ""  # compile: chips that needn't be here, v5p:4x4x4; "": this machine's devices
  config.plan = False  # compile: look for the fastest mesh, batch and remat that fit

  config.benchmark = ConfigDict()  # of this machine
  config.benchmark.parts = ("training", "attention", "sampling", "input")
  config.benchmark.repeats = 5  # timings of each, medians are told
  config.benchmark.samples = 8  # pictures that are sampled at a time
  config.benchmark.pictures = 200  # of the data set, that the input pipeline is timed on

  config.log = ConfigDict()
  config.log.tensorboard = False
  config.log.wandb = False
  config.log.wandb_project = "igpt_jax"
  return config


def _positive(config: ConfigDict, *names: str, least: int = 1) -> None:
  for name in names:
    value: Any = config
    for part in name.split("."):
      value = value[part]
    if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
      raise UserError(f"config.{name}: {value}; expected {least} or more")


def _choice(name: str, value: str, choices) -> None:
  if value not in choices:
    raise UserError(f"config.{name}: {value!r}; expected one of {', '.join(choices)}")


def validate(config: ConfigDict) -> None:
  """Checks what can be checked without data, checkpoint or device.

  Raises:
    UserError: naming the field, its value and what was expected.
  """
  settled = settle(config)
  _choice("objective", settled.objective, OBJECTIVES)
  _choice("model.size", settled.model.size, PRESETS)
  _choice("model.attention", config.model.attention, IMPLEMENTATIONS)
  _choice("sample.cache", config.sample.cache, ("", *CACHE_DTYPES))
  _choice("evaluate.split", config.evaluate.split, ("test", "validation", "train"))
  _positive(
    config, "data.resolution", "palette.images", "train.batch_size", "train.log_every",
    "train.accumulate", "train.checkpoint_every", "train.keep", "evaluate.batch_size", "evaluate.masks",
    "evaluate.baseline_images", "features.grid", "features.batch_size", "probe.max_iterations", "probe.steps",
    "probe.batch_size", "probe.eval_every", "lowdata.trials", "finetune.batch_size", "finetune.steps",
    "finetune.eval_every", "finetune.masks",
    "sample.completions", "sample.per_picture", "sample.batch_size", "quality.images", "n", "passes", "host_seconds", "benchmark.repeats",
    "benchmark.samples", "benchmark.pictures",
  )  # fmt: skip
  _positive(
    config, "seed", "train.eval_every", "train.eval_images", "train.keep_every",
    "evaluate.images", "features.masks", "features.images", "features.eval_images", "probe.around_best", "finetune.images",
    "finetune.warmup_steps", "finetune.patience", "train.save_retry_seconds", "watch_seconds", "watch_patience", "hang_seconds", "sample.scale", "model.n_layer", "model.n_head",
    "model.n_embd", least=0,
  )  # fmt: skip
  trained = {"finetune": config.finetune, "probe": config.probe}.get(config.job, config.train)
  Window(**config.profile).check_within(trained.steps)
  # Job compile may leave sampling out.
  _positive(config, "sample.samples", least=0 if config.job == "compile" else 1)
  if config.palette.size:
    _positive(config, "palette.size", least=2)
  if not 0 < config.mask_probability < 1:
    raise UserError(f"config.mask_probability: {config.mask_probability}; expected within (0, 1)")
  if not 0 < config.data.validation < 1:
    raise UserError(
      f"config.data.validation: {config.data.validation}; expected a share within (0, 1)"
    )
  if not 0 < config.sample.keep < 1:
    raise UserError(f"config.sample.keep: {config.sample.keep}; expected a share within (0, 1)")
  if not 0 < config.keep < 1:
    raise UserError(
      f"config.keep: {config.keep}; expected a share of the upper rows within (0, 1) (to draw whole "
      "pictures leave config.images out)"
    )
  if config.topology:
    if config.job != "compile":
      raise UserError(
        f"config.topology: {config.topology!r} is for job compile; config.job is {config.job!r}"
      )
    check_name(config.topology)
  data(config)
  sampling(config)
  optimizer(config)
  if not config.init_from:  # else the model is known when that is
    settled.model.dtype = config.model.dtype or "float32"  # which one would ask for devices
    model(settled, n_vocab=palette_size(config))


def settle(config: ConfigDict, start: ImageGPTConfig | None = None) -> ConfigDict:
  """A copy in which what was left open is chosen: as in the model that training starts from, or s.

  Learning rates are the size's: `model.size` is then the published one of that shape, if it is one.
  """
  config = config.copy_and_resolve_references()
  if start is not None:
    config.model.update({name: getattr(start, name) for name in MODEL_SHAPE})
    config.palette.size = start.n_vocab
    config.objective = "autoregressive" if start.causal else "masked"
    shapes = {tuple(getattr(size, n) for n in MODEL_SHAPE): name for name, size in PRESETS.items()}
    shape = tuple(getattr(start, name) for name in MODEL_SHAPE)
    config.model.size = config.model.size or shapes.get(shape, "")
  config.model.size = config.model.size or "s"
  config.objective = config.objective or "autoregressive"
  return config


def palette_size(config: ConfigDict) -> int:
  """How many colours to ask for, where no palette is given."""
  return config.palette.size or 512


def preset(config: ConfigDict) -> Preset:
  return PRESETS[settle(config).model.size]


def _on_cpu(config: ConfigDict) -> bool:
  """Whether what is compiled is for a CPU; job `compile` is for chips that aren't here."""
  return not config.topology and jax.default_backend() == "cpu"


def compute_dtype(config: ConfigDict) -> str:
  return config.model.dtype or ("float32" if _on_cpu(config) else "bfloat16")


def model(config: ConfigDict, *, n_vocab: int) -> ImageGPTConfig:
  """The model; touches no device unless the dtype is left to it."""
  size, config = preset(config), settle(config)
  return ImageGPTConfig(
    n_layer=config.model.n_layer or size.n_layer,
    n_head=config.model.n_head or size.n_head,
    n_embd=config.model.n_embd or size.n_embd,
    n_vocab=n_vocab,
    n_positions=config.data.resolution**2,
    causal=config.objective == "autoregressive",
    dtype=compute_dtype(config),
    remat=config.model.remat or size.remat,
    attention=config.model.attention,
  )


def optimizer(config: ConfigDict) -> OptimizerConfig:
  size, config = preset(config), settle(config)
  default = (
    size.learning_rate if config.objective == "autoregressive" else size.learning_rate_masked
  )
  return OptimizerConfig(
    learning_rate=config.train.learning_rate or default,
    steps=config.train.steps,
    warmup_steps=config.train.warmup_steps,
    schedule=config.train.schedule,
    b1=config.train.b1,
    b2=config.train.b2,
    weight_decay=config.train.weight_decay,
    clip_norm=config.train.clip_norm,
  )


def sampling(config: ConfigDict) -> SamplingConfig:
  return SamplingConfig(
    temperature=config.sample.temperature,
    top_k=config.sample.top_k,
    top_p=config.sample.top_p,
  )


def data(config: ConfigDict) -> DataConfig:
  """The data room's settings: the fields of `config.data` by their names."""
  names = {field.name for field in dataclasses.fields(DataConfig)}
  return DataConfig(**{name: value for name, value in config.data.items() if name in names})


def as_json(config: ConfigDict) -> dict[str, Any]:
  return json.loads(config.to_json())


# ILSVRC-2012's training pictures, and the share of them that the paper trains on while tuning.
_IMAGENET_TRAIN = 1_281_167
_IMAGENET_VALIDATION = 0.04


def imagenet(size: str, resolution: int) -> ConfigDict:
  """The paper's pretraining on ImageNet (section 3): its pictures, batch, steps and warm-up."""
  config = base()
  config.data.name = "imagenet2012"
  config.data.resolution = resolution
  config.data.augment = "paper"
  config.data.validation = _IMAGENET_VALIDATION
  config.model.size = size
  config.train.batch_size = 64 if size == "xl" else 128
  config.train.steps = 2_000_000 if size == "xl" else 1_000_000
  epoch = _IMAGENET_TRAIN * (1 - _IMAGENET_VALIDATION)
  config.train.warmup_steps = round(epoch / config.train.batch_size)
  config.train.log_every = 100
  config.train.eval_every = 10_000
  config.train.checkpoint_every = 5_000
  config.train.keep_every = 100_000
  if size in ("l", "xl"):
    # Their state doesn't fit one chip: parameters and moments are split over all of them.
    config.mesh.data, config.mesh.fsdp = 1, -1
  return config


def openai_eval(size: str) -> ConfigDict:
  """The released checkpoint of a size on the released tokens, where the download job puts them."""
  config = base()
  config.job = "evaluate"
  config.download.model = size
  config.checkpoint = f"downloads/igpt-{size}-1000000/model.ckpt-1000000"
  config.data.name = "tokens"
  config.data.path = "downloads/datasets/imagenet_teX.npy"
  config.data.resolution = 32
  config.model.dtype = "float32"  # as published, and the figures have four decimals
  return config
