"""Start of a fine-tuning: weights, head and palette, and the checks of all three."""

import dataclasses
import os

from jax.sharding import Mesh

from igpt_jax import checkpoint, files, units
from igpt_jax.checkpoint import CheckpointInfo
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.sources import DataConfig, Split
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import Params
from igpt_jax.parallel.hosts import say
from igpt_jax.pretrained import hub
from igpt_jax.tokens import TokenSpec
from igpt_jax.training import state
from igpt_jax.workspace import checkpoint_tokens, provenance, training_palette
from igpt_jax.workspace import weights as weights_lib


@dataclasses.dataclass(frozen=True)
class Begin:
  """What a fine-tuning starts from.

  Attributes:
    settings: the run's, with all choices made.
    spec: what the tokens are, with the colours of a palette.
    mask_probability: the masked objective's.
    weights: the initial parameters; None: random ones, or its own newest checkpoint's.
    head: the layer of the head in `weights`; None: they have no head.
  """

  settings: Settings
  spec: TokenSpec
  mask_probability: float
  weights: CheckpointInfo | None = None
  head: int | None = None

  def params(self, mesh: Mesh) -> Params | None:
    """Reads the initial parameters, and head if any, onto the mesh; None: random ones."""
    if self.weights is None:
      return None
    say(f"checkpoint: {self.weights.path}")
    params = weights_lib.read(self.weights, mesh, say)
    head = {} if self.head is None else {state.HEAD: checkpoint.load_head(self.weights, mesh)}
    return params | head


def begin(
  settings: Settings,
  workdir: str,
  folder: str,
  data_config: DataConfig,
  split: Split,
  start: CheckpointInfo | None = None,
) -> Begin:
  """Returns the start of a fine-tuning in `folder`, checked except for the head's layer.

  `start` is the checkpoint that it begins from, unless it has its own; None: that of the settings.

  Raises:
    UserError: there is no checkpoint, or it is of another resolution, has a head of other classes, or
      has no palette.
  """
  scratch = settings.finetune.scratch
  own = checkpoint.newest(folder)
  named = settings.checkpoint or settings.init_from or checkpoint.latest_step(workdir) is not None
  if scratch and own is None and not named:
    settings = choices.settle(settings, batch_size=settings.finetune.batch_size)
    spec = training_palette.training_tokens(settings, data_config, split, folder)
    return Begin(settings, spec, settings.mask_probability)
  info = own or start or weights_lib.of_job(settings, workdir)
  if own is not None and not scratch:
    _check_same_start(settings, workdir, own)
  elif own is not None and not named:
    fix = f"put those colours back, which {folder}/palette.npy holds"
    checkpoint_tokens.check_palette(settings, own, fix)
  info = weights_lib.at_resolution(settings, info)
  spec = checkpoint_tokens.tokens_of(info)
  has_head = bool(info.classes) and (own is not None or not scratch)
  if has_head and info.classes != split.class_names:
    raise UserError(
      f"checkpoint: the head of {info.path} has {len(info.classes)} classes "
      f"({units.some_of(info.classes)}), {split.fingerprint} has {split.n_classes} "
      f"({units.some_of(split.class_names)}); fix: the data that it was fine-tuned on, or the checkpoint "
      "that this was begun from, which has no head"
    )
  settled = choices.settle(settings, info.config, settings.finetune.batch_size)
  mask_probability = info.run["mask_probability"]
  if own is not None or scratch:
    return Begin(settled, spec, mask_probability)
  return Begin(settled, spec, mask_probability, info, info.run["layer"] if has_head else None)


def _check_same_start(settings: Settings, workdir: str, own: CheckpointInfo) -> None:
  """Raises UserError if the checkpoint that a fine-tuning was begun from has other contents now.

  If it has been deleted since, the fine-tuning goes on from its own checkpoint.
  """
  began = own.run["began_with"]
  path = weights_lib.path_of_job(settings, workdir) or workdir
  if hub.is_name(path) and hub.is_snapshot(began["checkpoint"], path):
    return  # what it was begun from isn't fetched again
  path = files.place("checkpoint", path)
  if not files.exists(path) and f"{began['checkpoint']}/".startswith(f"{path}/"):
    return
  now = weights_lib.at_resolution(settings, weights_lib.of_job(settings, workdir))
  # Older versions identified it by its path.
  ours = provenance.of_checkpoint(now) if "parameters" in began else {"checkpoint": now.path}
  folder = os.path.dirname(os.path.dirname(own.path))
  what = f"{now.path} is another model than {folder} was begun from, {began['checkpoint']}"
  fix = (
    f"--config.checkpoint={began['checkpoint']} goes on with what was begun; remove {folder}, or "
    "another --workdir, to begin from the other one"
  )
  files.check_same("checkpoint", what, began, ours, fix)


def describe(start: Begin, settings: Settings) -> str:
  model = choices.model_config(settings, n_vocab=start.spec.n_vocab)
  shape = f"{settings.objective}, {model.n_layer} layers"
  return f"random parameters ({shape})" if settings.finetune.scratch else f"a model ({shape})"
