"""What a fine-tuning begins with: weights, head, images, optimizer; and every mistake in them."""

import dataclasses
import os

from jax.sharding import Mesh

from igpt_jax import checkpoint, files
from igpt_jax.checkpoint import CheckpointInfo
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import DataConfig, Split, some_of
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import Params
from igpt_jax.parallel.hosts import say
from igpt_jax.training import state
from igpt_jax.workspace import provenance, training_palette
from igpt_jax.workspace import weights as weights_lib


@dataclasses.dataclass(frozen=True)
class Begin:
  """What a fine-tuning starts from, its own newest checkpoint included.

  Attributes:
    settings: the run's, with the model's shape and objective filled in.
    palette: the colours of the tokens.
    mask_probability: of a BERT model.
    weights: parameters to begin with; None: random ones, or its own checkpoint's.
    head: what `weights` has a head at: its layer; None: it has none.
  """

  settings: Settings
  palette: Palette
  mask_probability: float
  weights: CheckpointInfo | None = None
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
  settings: Settings, workdir: str, folder: str, data_config: DataConfig, split: Split
) -> Begin:
  """Finds it, and checks all but the layer.

  Raises:
    UserError: there is no checkpoint, or it is of another resolution, has a head of other classes, or
      has no palette.
  """
  scratch = settings.finetune.scratch
  own = checkpoint.newest(folder)
  resuming = own is not None
  named = settings.checkpoint or settings.init_from or checkpoint.latest_step(workdir) is not None
  if scratch and not resuming and not named:
    settings = choices.settle(settings)
    palette = training_palette.training_palette(settings, data_config, split, folder)
    assert palette is not None, "only bare tokens have none, and they have no labels"
    return Begin(settings, palette, settings.mask_probability)
  found = own if own is not None else weights_lib.of_job(settings, workdir)
  if own is not None and not scratch:
    _check_same_start(settings, workdir, own)
  elif own is not None and not named:
    fix = f"put those colours back, which {folder}/palette.npy holds"
    weights_lib.check_palette(settings, own, fix)
  weights_lib.check_resolution(settings, found)
  palette = weights_lib.palette_of(found)
  has_head = bool(found.classes) and (resuming or not scratch)
  if has_head and found.classes != split.class_names:
    raise UserError(
      f"checkpoint: the head of {found.path} has {len(found.classes)} classes "
      f"({some_of(found.classes)}), {split.fingerprint} has {split.n_classes} "
      f"({some_of(split.class_names)}); fix: the data that it was fine-tuned on, or the checkpoint "
      "that this was begun from, which has no head"
    )
  settled = choices.settle(settings, found.config)
  mask_probability = found.run["mask_probability"]
  if resuming or scratch:
    return Begin(settled, palette, mask_probability)
  head = found.run["layer"] if has_head else None
  return Begin(settled, palette, mask_probability, found, head)


def _check_same_start(settings: Settings, workdir: str, own: CheckpointInfo) -> None:
  """Compares what a fine-tuning was begun from with what is there now, by their contents.

  What has been deleted since isn't missed: the fine-tuning goes on from its own checkpoint.

  Raises:
    UserError: it is another model now; results would be told as those of that one.
  """
  began = own.run["began_with"]
  path = weights_lib.path_of_job(settings, workdir) or workdir
  path = os.path.abspath(os.path.expanduser(path))
  if not os.path.exists(path) and f"{began['checkpoint']}/".startswith(f"{path}/"):
    return
  now = weights_lib.of_job(settings, workdir)
  # A version before this one knew it by its path.
  mine = provenance.of_checkpoint(now) if "parameters" in began else {"checkpoint": now.path}
  folder = os.path.dirname(os.path.dirname(own.path))
  what = f"{now.path} is another model than {folder} was begun from, {began['checkpoint']}"
  fix = (
    f"--config.checkpoint={began['checkpoint']} goes on with what was begun; remove {folder}, or "
    "another --workdir, to begin from the other one"
  )
  files.check_same("checkpoint", what, began, mine, fix)


def describe(start: Begin, settings: Settings) -> str:
  shape = f"{settings.objective}, {choices.model_config(settings, n_vocab=start.palette.size).n_layer} layers"
  return f"random parameters ({shape})" if settings.finetune.scratch else f"a model ({shape})"
