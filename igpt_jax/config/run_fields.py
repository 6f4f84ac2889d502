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
  PRETRAINING,
  READING,
  TRAINING,
  UPDATING,
  Group,
  setting,
)
from igpt_jax.errors import UserError
from igpt_jax.tokens import KINDS, PALETTE

_AUGMENTATIONS = ("none", "paper", "cifar", "shift", "photo")

# A table: a setting takes as few lines as it needs.
# fmt: off


@dataclasses.dataclass(frozen=True)
class DataConfig(Group, prefix="data", jobs=OPENING):
  """The images, how they are preprocessed, and by how many threads and processes."""

  name: str = setting("digits", "digits (made on first use, nothing to download), folder, tokens, "
    "or a TFDS name, such as cifar10, imagenet2012, imagenet_resized/32x32", decides="run")
  path: str = setting("", "folder: its root, with root/SPLIT/CLASS/*.jpg, root/SPLIT/*.jpg, or images in "
    "any way, at any depth, of which splits are drawn by contents; tokens: "
    "a .npy [N, H·W], which is the test split, or a folder with train.npy, validation.npy, "
    "test.npy; in a bucket (gs://BUCKET/PATH) it is copied to scratch", path=True, bucket=True, host=True)
  data_dir: str = setting("", "where TFDS keeps prepared data; \"\": TFDS' default", host=True)
  resolution: int = setting(8, "height and width the model sees, in pixels", least=1, decides="run",
    jobs=(*OPENING, "compile"))
  token_kind: str = setting(PALETTE, "what the model predicts: palette (the nearest colour of a palette, as in "
    "the paper), channels (raw red, green and blue of a pixel, one after the other, at one position), "
    "subpixels (the same at three positions)", choices=KINDS, decides="run", jobs=(*OPENING, "compile"))
  augment: str = setting("none", "augmentation in training: none, paper (random resize and crop as for "
    "ImageNet), cifar (pad, crop, flip), shift (by up to an eighth of the side; for digits), photo "
    "(crop and flip; for few photos)", decides="run", choices=_AUGMENTATIONS)
  validation: float = setting(0.1, "share of train that is held out: the paper's is 0.04 of "
    "ImageNet, 0.1 of others, and 0 in its final runs, which are evaluated on test alone", least=0,
    below=1, decides="run")
  validation_split: str = setting("", "a stored split to use instead, such as validation or val, "
    'with the whole of train; "": none', decides="run")
  max_bad: float = setting(0.001, "share of a split's images that may be unreadable; of a folder, 3 "
    "always may, unless this is 0", least=0, most=1)
  resample: str = setting("fused", "resizing of augment=paper in training: fused (one resize), "
    "literal (the paper's two)", decides="run", choices=("fused", "literal"),
    jobs=(*PRETRAINING, "finetune", "fit_palette", "benchmark"))
  threads: int = setting(0, "threads that load batches, in every process, two batches ahead; more "
    "hide slow reads; 0: chosen", least=0, most=1_024, host=True, jobs=(*OPENING, "first_contact"))
  workers: int = setting(0, "processes that load batches; 0: this one", least=0, host=True,
    jobs=(*OPENING, "first_contact"))
  cache_mb: int = setting(512, "a data set whose decoded images fit in it is read once", least=0,
    host=True)
  verify: bool = setting(False, "read folders and files of tokens completely for their digest, "
    "even if they seem unchanged", host=True)
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
class PaletteConfig(Group, prefix="palette", jobs=(*PRETRAINING, "finetune", "fit_palette")):
  """The palette whose colours are the tokens."""

  path: str = setting("", ".npy [k, 3] in [-1, 1]; \"default\": the project's 512 colours, which "
    "were fitted to CIFAR-10 (igpt_jax/data/assets/README.md); \"\": the checkpoint's, or fitted "
    "to the training images", path=True, bucket=True, host=True,
    jobs=(*PRETRAINING, *READING, "convert", "benchmark"))
  size: int = setting(0, "colours; 0: the checkpoint's, those of the path, or 512", least=2,
    decides="run", jobs=(*MAKING, "fit_palette"))
  images: int = setting(10_000, "training images that it is fitted to, at most", **COUNT, decides="run")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Group, prefix="model", jobs=MAKING):
  """The transformer's size and computation."""

  size: str = setting("", "s, m, l, xl; \"\": the checkpoint's, or s",
    choices=("s", "m", "l", "xl"), decides="run")
  n_layer: int = setting(0, "layers; 0: the size's", **FROM_0, decides="run")
  n_head: int = setting(0, "attention heads; 0: the size's", **FROM_0, decides="run")
  n_embd: int = setting(0, "width; 0: the size's", **FROM_0, decides="run")
  dtype: str = setting("", 'dtype of activations; "": bfloat16 on accelerators, float32 on CPU',
    choices=("float32", "bfloat16"), jobs=COMPUTING)
  remat: str = setting("", "rematerialization in the backward pass: none, names, offload, full; \"\": names where "
    "it should fit, else full; on CPUs the size's", choices=("none", "names", "offload", "full"))
  attention: str = setting("auto", "implementation of attention", jobs=COMPUTING,
    choices=("auto", "xla", "blocked", "cudnn", "tpu", "tpu_interpret"))
  # The following aren't the paper's. A checkpoint that training starts from keeps its own.
  positions: str = setting("learned", "learned (a table of all positions), axial (tables of rows and of "
    "columns), rope2d (rotations of queries and keys by row and column; images of any size)",
    choices=("learned", "axial", "rope2d"), decides="run")
  qk_norm: bool = setting(False, "RMS norms of every head's queries and keys", decides="run")
  value_embeddings: bool = setting(False, "every layer adds a vector chosen by the token to the values",
    decides="run")
  x0_skip: bool = setting(False, "every layer adds the embeddings, times learned gains, to its input",
    decides="run")
  parametrisation: str = setting("standard", "what initial values and learning rates depend on: standard, "
    "or complete_p: train.learning_rate is that of the base shape and serves every width and depth",
    choices=("standard", "complete_p"), decides="run")
  base_embd: int = setting(0, "complete_p: width of the model whose learning rate was tuned", **FROM_0,
    decides="run")
  base_layer: int = setting(0, "complete_p: its layers", **FROM_0, decides="run")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Group, prefix="train", jobs=UPDATING):
  """Pretraining's updates, and logging and checkpoints of any training."""

  batch_size: int = setting(128, "images in an update", **BATCH, decides="pretraining")
  accumulate: int = setting(1, "parts that a batch is split into, for one update",
    least=1)
  steps: int = setting(1_000_000, "updates, in all", least=1, decides="pretraining")
  learning_rate: float = setting(0.0, "peak; 0: the size's", above=0, decides="pretraining")
  warmup_steps: int = setting(0, "steps of linear warm-up", **FROM_0, decides="pretraining")
  schedule: str = setting("cosine", "after the warm-up: cosine, to 0 at `steps`; constant; or wsd, constant "
    "until a decay to 0 at `steps`, so that a run can be trained longer from before its decay",
    decides="pretraining", choices=("cosine", "constant", "wsd"))
  decay_steps: int = setting(0, "steps of wsd's decay; 0: a fifth of `steps`", **FROM_0,
    decides="pretraining")
  decay_shape: str = setting("1-sqrt", "how the rate falls in wsd's decay, with the share x of it that "
    "is done: 1-sqrt, with 1 - √x, or linear", decides="pretraining", choices=("linear", "1-sqrt"))
  optimizer: str = setting("adam", "adam, or muon: the blocks' (and heads') matrices by Muon, all else by Adam, at one "
    "learning rate", decides="run", choices=("adam", "muon"), jobs=MAKING)
  b1: float = setting(0.9, "Adam's decay rate", least=0, below=1, decides="run", jobs=MAKING)
  b2: float = setting(0.95, "Adam's decay rate of squares; 0: 0.95^(batch_size / 128), which averages "
    "over as many tokens as 0.95 does at 128: a rule to test, not to trust", least=0, below=1,
    decides="run", jobs=MAKING)
  weight_decay: float = setting(0.0, "weight decay of matrices, decoupled", **FROM_0, decides="run", jobs=MAKING)
  clip_norm: float = setting(0.0, "limit of the gradient's global norm; 0: none", **FROM_0, decides="run",
    jobs=MAKING)
  log_every: int = setting(50, "steps between two logs", least=1, jobs=TRAINING)
  eval_every: int = setting(1_000, "steps between two evaluations; 0: at the end only", **FROM_0,
    jobs=PRETRAINING)
  eval_images: int = setting(10_000, "images of the validation split, at most; 0: all", **FROM_0,
    jobs=TRAINING)
  progress_images: int = setting(0, "held-out images that are completed at each evaluation, and once "
    "early, for progress/STEP.png, TensorBoard and W&B; 0: none", least=0, most=256,
    jobs=PRETRAINING)
  checkpoint_every: int = setting(1_000, "steps between two checkpoints", least=1,
    jobs=PRETRAINING)
  max_to_keep: int = setting(3, "newest checkpoints to keep", least=1,
    jobs=(*PRETRAINING, "finetune"))
  keep_period: int = setting(0, "checkpoints to keep at multiples of it, too; 0: none", **FROM_0,
    jobs=(*PRETRAINING, "finetune"))
  save_retry_seconds: float = setting(600.0, "seconds in which a failed save is retried; 0: never",
    **FROM_0, jobs=TRAINING)


@dataclasses.dataclass(frozen=True)
class SizingConfig(Group, prefix="sizing", jobs=("pretrain",)):
  """Settings chosen by the machine's speed and the number of images (workspace/sizing.py)."""

  minutes: float = setting(0.0, "minutes that training may take here: resolution, model, palette, batch, "
    "steps and cadence are chosen for it, once, where they have the program's defaults; more of them "
    "later: more steps; 0: all as given", **FROM_0)
  packaged: bool = setting(False, "with minutes: begin with the model that comes with igpt_jax, unless something "
    "that is given contradicts it, or the minutes and images allow a larger model from random values")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Group, prefix="mesh", jobs=COMPUTING):
  """Numbers of devices on the mesh's axes, within a slice; one may be -1: what is left."""

  data: int = setting(-1, "groups of devices, with different images")
  fsdp: int = setting(0, "devices that split parameters, optimizer state and images; 0: what is left if data is "
    "set, else chosen by the model and the devices, and 1 on CPUs")
  tensor: int = setting(1, "devices that split the computation of an image")
  slices: int = setting(1, "slices of accelerators, each with a copy of the state and other images, that "
    "sum gradients over the network; -1: as many as there are")

  def with_fsdp(self, chosen: int) -> "MeshConfig":
    """Returns it with `fsdp` settled, if that is open: what is left if `data` is set, else as chosen."""
    left = 1 if self.tensor == -1 else -1
    return dataclasses.replace(self, fsdp=self.fsdp or (chosen if self.data == -1 else left))


@dataclasses.dataclass(frozen=True)
class GuardConfig(Group, prefix="guard", jobs=TRAINING):
  """What counts as bad numbers in training, and how to react."""

  in_row: int = setting(10, "successive updates skipped as not finite until `then` is done", least=1)
  then: str = setting("rollback", "rollback (to the last checkpoint before, with other data), stop, "
    "or warn", choices=("rollback", "stop", "warn"))
  spike: float = setting(1.0, "nats per token above the median of the last 20 logged losses that "
    "count as a spike; 0: none", least=0)
  spike_then: str = setting("warn", "reaction to a spike: rollback, stop or warn",
    choices=("rollback", "stop", "warn"))
  rollbacks: int = setting(3, "rollbacks of a run, at most; then it stops", **FROM_0)


@dataclasses.dataclass(frozen=True)
class ProfileConfig(Group, prefix="profile", jobs=TRAINING):
  """Training steps to trace."""

  start: int = setting(0, "the first step", **FROM_0)
  steps: int = setting(0, "number of steps; 0: none", **FROM_0)


@dataclasses.dataclass(frozen=True)
class LogConfig(Group, prefix="log", jobs=TRAINING):
  """Writers of metrics beside metrics.jsonl."""

  tensorboard: bool = setting(False, "files that TensorBoard shows", host=True)
  wandb: bool = setting(False, "Weights & Biases", host=True)
  wandb_project: str = setting("igpt_jax", "its project there", host=True)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Group, prefix="finetune", jobs=("finetune",)):
  """Training a model and a linear head together."""

  scratch: bool = setting(False, "start from random parameters, to compare with", decides="finetuning")
  layer: int = setting(-1, "layer whose features the head reads; -1: the last", decides="finetuning")
  generative: float = setting(1.0, "weight of the objective's loss; 0: classification alone",
    **FROM_0, decides="finetuning")
  classification: float = setting(1.0, "weight of the classification loss", **FROM_0,
    decides="finetuning")
  augment: str = setting("", 'augmentation in training; "": data.augment',
    choices=_AUGMENTATIONS, decides="finetuning")
  images: int = setting(0, "training images, at most; 0: all", **FROM_0, decides="finetuning")
  batch_size: int = setting(128, "images of one update", **BATCH, decides="finetuning")
  learning_rate: float = setting(0.0, "0: a tenth of the size's", above=0, decides="finetuning")
  warmup_steps: int = setting(0, "steps of linear warm-up", **FROM_0, decides="finetuning")
  steps: int = setting(10_000, "updates, at most", **COUNT, decides="finetuning")
  eval_every: int = setting(250, "steps between two evaluations, and checkpoints", **COUNT,
    decides="finetuning")
  patience: int = setting(10, "evaluations without improvement before it ends; 0: no limit",
    **FROM_0, decides="finetuning")
  masks: int = setting(5, "BERT: masks per image in evaluation", **COUNT, decides="finetuning")
