"""Settings of training runs. Ground floor."""

import dataclasses
import os
import re

from igpt_jax.config.declare import (
  BATCH,
  COMPUTING,
  COUNT,
  FROM_0,
  MAKING,
  OPENING,
  READING,
  TRAINING,
  UPDATING,
  Group,
  setting,
)
from igpt_jax.errors import UserError

# A table: a setting takes as few lines as it needs.
# fmt: off


@dataclasses.dataclass(frozen=True)
class DataConfig(Group, prefix="data", jobs=OPENING):
  """The images, how they are preprocessed, and by how many threads and processes."""

  name: str = setting("digits", "digits (made on first use, nothing to download), folder, tokens, "
    "or a TFDS name, such as cifar10, imagenet2012, imagenet_resized/32x32", decides="run")
  path: str = setting("", "folder: its root (root/SPLIT/CLASS/*.jpg or root/SPLIT/*.jpg); tokens: "
    "a .npy [N, H·W], which is the test split, or a folder with train.npy, validation.npy, "
    "test.npy", path=True, host=True)
  data_dir: str = setting("", "where TFDS keeps prepared data; \"\": TFDS' default", host=True)
  resolution: int = setting(8, "height and width the model sees, in pixels", least=1, decides="run",
    jobs=(*OPENING, "compile"))
  augment: str = setting("none", "of training images: none, paper (random resize and crop as for "
    "ImageNet), cifar (pad, crop, flip), shift (by up to an eighth of the side; for digits)",
    decides="run", choices=("none", "paper", "cifar", "shift"))
  validation: float = setting(0.1, "share of train that is held out: the paper's is 0.04 of "
    "ImageNet, 0.1 of others, and 0 in its final runs, which are evaluated on test alone", least=0,
    below=1, decides="run")
  validation_split: str = setting("", "a stored split held out instead, train is then the whole "
    'of train: validation, val; "": none', decides="run")
  max_bad: float = setting(0.001, "share of a split's images that may be unreadable", least=0,
    most=1)
  resample: str = setting("fused", "of augment=paper in training: fused (one resize), literal "
    "(the paper's two)", decides="run", choices=("fused", "literal"),
    jobs=("pretrain", "finetune", "fit_palette", "benchmark"))
  threads: int = setting(0, "that load batches, in each process, each two ahead: more of them "
    "hide slow reads; 0: chosen", least=0, most=1_024, host=True)
  workers: int = setting(0, "processes that load batches; 0: this one", least=0, host=True)
  cache_mb: int = setting(512, "a data set whose decoded images fit in this is read once", least=0,
    host=True)
  verify: bool = setting(False, "read folders and files of tokens whole to know them, also if "
    "they seem unchanged", host=True)
  manual_dir: str = setting("", "archives fetched by hand; \"\": TFDS' default", path=True,
    host=True, jobs=("prepare",))

  def __post_init__(self) -> None:
    super().__post_init__()
    most = max(16, 4 * (os.cpu_count() or 1))
    named = self.validation_split != "train" and re.fullmatch(r"[\w-]*", self.validation_split)
    for name, allowed, expected in (
      ("workers", self.workers <= most, f"0 to {most}: each takes 100 MB"),
      ("validation_split", named, "the name of a stored split other than train, such as validation"),
      ("name", self.name, "digits, folder, tokens, or a TFDS name"),
    ):
      if not allowed:
        raise UserError(f"config.data.{name}: {getattr(self, name)!r}; expected {expected}")
    if self.name in ("folder", "tokens") and not self.path:
      raise UserError(f"config.data.path: empty; expected where data.name={self.name} lies")


@dataclasses.dataclass(frozen=True)
class PaletteConfig(Group, prefix="palette", jobs=("pretrain", "finetune", "fit_palette")):
  """The palette whose colours are the tokens."""

  path: str = setting("", ".npy [k, 3] in [-1, 1]; \"default\": the project's 512 colours, which "
    "were fitted to CIFAR-10 (igpt_jax/data/assets/README.md); \"\": the checkpoint's, or fitted "
    "to the training images", path=True, host=True,
    jobs=("pretrain", *READING, "convert", "benchmark"))
  size: int = setting(0, "colours; 0: the checkpoint's, those of the path, or 512", least=2,
    decides="run", jobs=(*MAKING, "fit_palette"))
  images: int = setting(10_000, "training images it is fitted to, at most", **COUNT, decides="run")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Group, prefix="model", jobs=MAKING):
  """The transformer's size and computation."""

  size: str = setting("", "s, m, l, xl; \"\": the checkpoint's, or s",
    choices=("s", "m", "l", "xl"), decides="run")
  n_layer: int = setting(0, "0: the size's", **FROM_0, decides="run")
  n_head: int = setting(0, "0: the size's", **FROM_0, decides="run")
  n_embd: int = setting(0, "0: the size's", **FROM_0, decides="run")
  dtype: str = setting("", 'of activations; "": bfloat16 on accelerators, float32 on CPU',
    choices=("float32", "bfloat16"), jobs=COMPUTING)
  remat: str = setting("", "what the backward pass computes again: none, names, offload, full; "
    "\"\": the size's", choices=("none", "names", "offload", "full"))
  attention: str = setting("auto", "its implementation", jobs=COMPUTING,
    choices=("auto", "xla", "blocked", "cudnn", "tpu", "tpu_interpret"))


@dataclasses.dataclass(frozen=True)
class TrainConfig(Group, prefix="train", jobs=UPDATING):
  """Pretraining's updates, and logging and checkpoints of any training."""

  batch_size: int = setting(128, "images of one update", **BATCH, decides="pretraining")
  accumulate: int = setting(1, "parts that a batch is worked through in, one update in all",
    least=1)
  steps: int = setting(1_000_000, "updates in all", least=1, decides="pretraining")
  learning_rate: float = setting(0.0, "its peak; 0: the size's", above=0, decides="pretraining")
  warmup_steps: int = setting(0, "of linear warm-up", **FROM_0, decides="pretraining")
  schedule: str = setting("cosine", "after the warm-up: cosine, to 0 at `steps`, or constant",
    decides="pretraining", choices=("cosine", "constant"))
  b1: float = setting(0.9, "Adam's", least=0, below=1, decides="run", jobs=MAKING)
  b2: float = setting(0.95, "Adam's", least=0, below=1, decides="run", jobs=MAKING)
  weight_decay: float = setting(0.0, "of matrices, decoupled", **FROM_0, decides="run", jobs=MAKING)
  clip_norm: float = setting(0.0, "of the whole gradient; 0: no clipping", **FROM_0, decides="run",
    jobs=MAKING)
  log_every: int = setting(50, "steps between two logs", least=1, jobs=TRAINING)
  eval_every: int = setting(1_000, "steps between two evaluations; 0: at the end only", **FROM_0,
    jobs=("pretrain",))
  eval_images: int = setting(10_000, "of the validation split, at most; 0: all", **FROM_0,
    jobs=TRAINING)
  checkpoint_every: int = setting(1_000, "steps between two checkpoints", least=1,
    jobs=("pretrain",))
  max_to_keep: int = setting(3, "newest checkpoints that are kept", least=1,
    jobs=("pretrain", "finetune"))
  keep_period: int = setting(0, "checkpoints at multiples of this are kept, too; 0: none", **FROM_0,
    jobs=("pretrain", "finetune"))
  save_retry_seconds: float = setting(600.0, "in which a save that fails is tried again; 0: never",
    **FROM_0, jobs=TRAINING)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Group, prefix="mesh", jobs=COMPUTING):
  """Numbers of devices on the mesh's axes; one may be -1: what is left."""

  data: int = setting(-1, "groups of devices, each with images of its own")
  fsdp: int = setting(1, "devices that split parameters and optimizer state, and images, too")
  tensor: int = setting(1, "devices that split each image's computation")


@dataclasses.dataclass(frozen=True)
class GuardConfig(Group, prefix="guard", jobs=TRAINING):
  """What counts as bad numbers in training, and how to react."""

  in_row: int = setting(10, "updates left out one after the other, not being finite, until `then` "
    "is done", least=1)
  then: str = setting("rollback", "to the last checkpoint before, with other data; or stop; or "
    "warn, which only tells", choices=("rollback", "stop", "warn"))
  spike: float = setting(1.0, "nats per token above the median of the last 20 logged losses that "
    "are a spike; 0: none is", least=0)
  spike_then: str = setting("warn", "rollback, stop or warn, at a spike",
    choices=("rollback", "stop", "warn"))
  rollbacks: int = setting(3, "of one run, at most; then it stops", **FROM_0)


@dataclasses.dataclass(frozen=True)
class ProfileConfig(Group, prefix="profile", jobs=TRAINING):
  """Training steps to trace."""

  start: int = setting(0, "the first step", **FROM_0)
  steps: int = setting(0, "how many; 0: none", **FROM_0)


@dataclasses.dataclass(frozen=True)
class LogConfig(Group, prefix="log", jobs=TRAINING):
  """Writers of metrics beside metrics.jsonl."""

  tensorboard: bool = setting(False, "files that TensorBoard shows", host=True)
  wandb: bool = setting(False, "Weights & Biases", host=True)
  wandb_project: str = setting("igpt_jax", "its project there", host=True)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Group, prefix="finetune", jobs=("finetune",)):
  """Training a model and a linear head together."""

  scratch: bool = setting(False, "from random parameters, to compare with", decides="finetuning")
  layer: int = setting(-1, "whose features the head reads; -1: the last", decides="finetuning")
  generative: float = setting(1.0, "weight of the objective's loss; 0: classification alone",
    **FROM_0, decides="finetuning")
  classification: float = setting(1.0, "weight of the classification loss", **FROM_0,
    decides="finetuning")
  augment: str = setting("", 'of training images; "": data.augment',
    choices=("none", "paper", "cifar", "shift"), decides="finetuning")
  images: int = setting(0, "training images, at most; 0: all", **FROM_0, decides="finetuning")
  batch_size: int = setting(128, "images of one update", **BATCH, decides="finetuning")
  learning_rate: float = setting(0.0, "0: a tenth of the size's", above=0, decides="finetuning")
  warmup_steps: int = setting(0, "of linear warm-up", **FROM_0, decides="finetuning")
  steps: int = setting(10_000, "updates, at most", **COUNT, decides="finetuning")
  eval_every: int = setting(250, "validation accuracy, and a checkpoint", **COUNT,
    decides="finetuning")
  patience: int = setting(10, "evaluations without a better one after which it ends; 0: never",
    **FROM_0, decides="finetuning")
  masks: int = setting(5, "BERT: masks per image in evaluation", **COUNT, decides="finetuning")
