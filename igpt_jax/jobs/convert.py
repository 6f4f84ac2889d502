"""Rewrites a checkpoint in another format, numbers untouched unless `convert.dtype` rounds them.

  python -m igpt_jax.main --config configs/convert.py \
    --config.convert.source=PATH --config.convert.target=PATH --config.convert.format=orbax|huggingface|openai

From and to: this program's own (orbax; safetensors, one file), OpenAI's and Hugging Face's. All in this
host's memory, no device is touched. The palette travels with the weights.
"""

import contextlib
import os

import jax

from igpt_jax import checkpoint, files
from igpt_jax.checkpoint import one_file
from igpt_jax.config.fields import Settings
from igpt_jax.errors import UserError
from igpt_jax.parallel.hosts import say
from igpt_jax.pretrained import formats
from igpt_jax.pretrained.clusters import NPY_NAME
from igpt_jax.units import data_size
from igpt_jax.workspace import weights


def run(settings: Settings, workdir: str) -> None:
  """Writes `source` as `target` in `format`; the workdir isn't used."""
  del workdir
  check(settings)
  wanted, target = settings.convert, _target(settings)
  info = weights.describe(wanted.source, settings)
  check_format(wanted.format, info)
  model = info.config
  say(
    f"source: {info.path}, {info.format}: {model.n_layer} layers, {model.n_head} heads, width "
    f"{model.n_embd}, {model.n_positions} positions of {model.tokens.values}, "
    f"{info.run['objective']}, {'with a' if info.palette is not None else 'no'} palette"
  )
  params = weights.read_on_host(info, say)
  if wanted.dtype:
    params = jax.tree.map(lambda leaf: leaf.astype(wanted.dtype), params)
  if wanted.format == "orbax":
    say(f"writing {target}")
    target = checkpoint.save_params(target, params, info)
  elif wanted.format == one_file.FORMAT:
    with parent_of(target):
      one_file.save(target, params, info)
  else:
    with parent_of(target):
      formats.save(target, wanted.format, model, params, clusters=info.palette, report=say)
  size = f", {data_size(files.size(target))}" if files.is_file(target) else ""
  say(f"target: {target}, {wanted.format}{size}")


@contextlib.contextmanager
def parent_of(target: str):
  """Makes the parent directory of `target`; removes it after a failure, if it was made here."""
  if files.is_remote(target):
    yield
    return
  parent = os.path.dirname(os.path.abspath(target))
  there = os.path.isdir(parent)
  try:
    os.makedirs(parent, exist_ok=True)
    yield
  except OSError as error:
    raise UserError(
      f"config.convert.target: {target}: {error.strerror}; expected a place to write to"
    ) from error
  finally:
    if not there:
      with contextlib.suppress(OSError):
        os.rmdir(parent)  # refused where something was written


def check(settings: Settings) -> None:
  """Raises UserError, naming the setting, for mistakes that show before the source is opened."""
  for name, what in (("source", "a checkpoint to read"), ("target", "a path to write to")):
    if not getattr(settings.convert, name):
      name = f"config.convert.{name}"
      raise UserError(f"{name}: empty; expected {what}; fix: --{name}=PATH")
  if jax.process_count() > 1:
    raise UserError("config.job: convert runs in one process; fix: leave --distributed out")
  target = _target(settings)
  if files.is_remote(target) and settings.convert.format in ("openai", "huggingface"):
    raise UserError(
      f"config.convert.target: {target}; expected a local path for format {settings.convert.format}, whose "
      "files are written in parts; fix: a local target, then `gcloud storage cp -r`"
    )
  taken = [target]
  if settings.convert.format == "openai":
    # Readers would take a palette that lies there for this checkpoint's.
    taken += [f"{target}.index", os.path.join(os.path.dirname(target), NPY_NAME)]
    if os.path.basename(target) == "":
      raise UserError(
        f"config.convert.target: {target} names a directory; expected a prefix in it, such as "
        f"{os.path.join(target, 'model.ckpt-0')}"
      )
  for path in taken:
    if files.exists(path) or os.path.lexists(path):
      raise UserError(f"config.convert.target: {path} exists; fix: name another target")


def _target(settings: Settings) -> str:
  target = settings.convert.target
  if files.is_remote(target):
    return files.place("config.convert.target", target)
  return os.path.expanduser(target)


def check_format(kind: str, info: checkpoint.CheckpointInfo) -> None:
  """Raises UserError, before the weights are read, if `kind` can't hold the model."""
  formats.check_holds(kind, info.config)
  if kind == "huggingface" and not info.config.causal:
    raise UserError(
      f"config.convert.format: huggingface, but {info.path} is a BERT model, which transformers' Image GPT "
      "would compute with a causal mask; fix: --config.convert.format=openai or orbax"
    )
