"""What a fine-tuning begins with: weights, head, pictures, optimizer; and every mistake in them."""

import dataclasses
import os

from jax.sharding import Mesh
from ml_collections import ConfigDict

from igpt_jax import checkpoint, files
from igpt_jax import config as config_lib
from igpt_jax.checkpoint import Described
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import DataConfig, Split, some_of
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import Params
from igpt_jax.parallel.hosts import say
from igpt_jax.training import state
from igpt_jax.training.optimizer import OptimizerConfig
from igpt_jax.workspace import provenance, training_palette
from igpt_jax.workspace import weights as weights_lib


@dataclasses.dataclass(frozen=True)
class Begin:
  """What a fine-tuning starts from, its own newest checkpoint included.

  Attributes:
    config: the run's, with the model's shape and objective filled in.
    palette: the colours of the tokens.
    mask_probability: of a BERT model.
    weights: parameters to begin with; None: random ones, or its own checkpoint's.
    head: what `weights` has a head at: its layer; None: it has none.
  """

  config: ConfigDict
  palette: Palette
  mask_probability: float
  weights: Described | None = None
  head: int | None = None

  def params(self, mesh: Mesh) -> Params | None:
    """The model's and, if there is one, the head's, on the mesh; None: random ones."""
    if self.weights is None:
      return None
    say(f"checkpoint: {self.weights.path}")
    params = weights_lib.read(self.weights, mesh, say)
    if self.head is None:
      return params
    return params | {state.HEAD: checkpoint.load_head(self.weights, mesh)}


def begin(
  config: ConfigDict, workdir: str, folder: str, data_config: DataConfig, split: Split
) -> Begin:
  """Finds it, and checks all but the layer.

  Raises:
    UserError: there is no checkpoint, or it is of another resolution, has a head of other classes, or
      has no palette.
  """
  scratch = config.finetune.scratch
  own = checkpoint.newest(folder)
  resuming = own is not None
  named = config.checkpoint or config.init_from or checkpoint.latest_step(workdir) is not None
  if scratch and not resuming and not named:
    config = config_lib.settle(config)
    palette = training_palette.training_palette(config, data_config, split, folder)
    return Begin(config, palette, config.mask_probability)
  found = own if own is not None else weights_lib.of_job(config, workdir)
  if own is not None and not scratch:
    _check_same_start(config, workdir, own)
  elif own is not None and not named:
    fix = f"put those colours back, which {folder}/palette.npy holds"
    weights_lib.check_palette(config, own, fix)
  weights_lib.check_resolution(config, found)
  palette = weights_lib.palette_of(found)
  has_head = bool(found.classes) and (resuming or not scratch)
  if has_head and found.classes != split.class_names:
    raise UserError(
      f"checkpoint: the head of {found.path} has {len(found.classes)} classes "
      f"({some_of(found.classes)}), {split.fingerprint} has {split.n_classes} "
      f"({some_of(split.class_names)}); fix: the data that it was fine-tuned on, or the checkpoint "
      "that this was begun from, which has no head"
    )
  settled = config_lib.settle(config, found.config)
  mask_probability = found.run["mask_probability"]
  if resuming or scratch:
    return Begin(settled, palette, mask_probability)
  head = found.run["layer"] if has_head else None
  return Begin(settled, palette, mask_probability, found, head)


def _check_same_start(config: ConfigDict, workdir: str, own: Described) -> None:
  """Compares what a fine-tuning was begun from with what is there now, by their contents.

  What has been deleted since isn't missed: the fine-tuning goes on from its own checkpoint.

  Raises:
    UserError: it is another model now; results would be told as those of that one.
  """
  began = own.run["began_with"]
  path = weights_lib.path_of_job(config, workdir) or workdir
  path = os.path.abspath(os.path.expanduser(path))
  if not os.path.exists(path) and f"{began['checkpoint']}/".startswith(f"{path}/"):
    return
  now = weights_lib.of_job(config, workdir)
  if "parameters" in began:
    differing = files.differing(began, provenance.of_checkpoint(now))
  else:  # begun by a version that knew it by its path
    differing = files.differing(began, {"checkpoint": now.path})
  if differing:
    folder = os.path.dirname(os.path.dirname(own.path))
    raise UserError(
      f"checkpoint: {now.path} is another model than {folder} was begun from, {began['checkpoint']}:\n"
      + "\n".join(differing)
      + f"\nfix: --config.checkpoint={began['checkpoint']} goes on with what was begun; remove {folder}, or "
      "another --workdir, to begin from the other one"
    )


def describe(start: Begin, config: ConfigDict) -> str:
  shape = (
    f"{config.objective}, {config_lib.model(config, n_vocab=start.palette.size).n_layer} layers"
  )
  return f"random parameters ({shape})" if config.finetune.scratch else f"a model ({shape})"


def make_optimizer_config(config: ConfigDict) -> OptimizerConfig:
  """Pretraining's betas, decay and clipping; a lower rate, constant after the warm-up."""
  config = config.copy_and_resolve_references()
  settings = config.finetune
  config.train.update({
    "learning_rate": settings.learning_rate,
    "steps": settings.steps,
    "warmup_steps": settings.warmup_steps,
    "schedule": "constant",
  })  # fmt: skip
  made = config_lib.optimizer(config)
  if settings.learning_rate:
    return made
  return dataclasses.replace(made, learning_rate=made.learning_rate / 10)


def check_settings(settings: ConfigDict) -> None:
  """Raises UserError for settings that make no sense whatever the model is."""
  for name in ("generative", "classification", "learning_rate"):
    if not settings[name] >= 0:
      raise UserError(f"finetune.{name}: {settings[name]}; expected 0 or more")
  if not settings.generative + settings.classification:
    raise UserError(
      "finetune.generative and finetune.classification: both 0; expected a positive weight"
    )
  if settings.warmup_steps > settings.steps:
    raise UserError(
      f"finetune.warmup_steps: {settings.warmup_steps}; expected at most finetune.steps "
      f"{settings.steps}"
    )
