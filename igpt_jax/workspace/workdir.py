"""Whose run a workdir holds: its config.json, written when a run begins, compared when one goes on."""

import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from igpt_jax import __version__, files, history
from igpt_jax import config as config_lib
from igpt_jax.errors import UserError
from igpt_jax.reporting import summary

# Fields that may differ when a run goes on: they change what is told or done beside the training,
# not what is computed in it; or say where something lies that is compared by its contents.
_FREE = (
  "job", "checkpoint", "watch", "watch_seconds", "watch_patience", "evaluate", "features", "probe", "lowdata",
  "finetune", "sample", "quality", "images", "keep", "hide", "passes", "n", "log", "mesh", "source", "target", "format",
  "download", "topology", "plan", "benchmark", "guard", "hang_seconds", "host_seconds", "profile", "train.accumulate", "data.path", "data.data_dir", "palette.path", "data.max_bad", "data.threads", "data.workers", "data.cache_mb", "data.verify",
  "data.manual_dir", "train.log_every", "train.eval_every", "train.eval_images",
  "train.checkpoint_every", "train.keep", "train.keep_every", "train.save_retry_seconds", "model.dtype", "model.remat", "model.attention",
)  # fmt: skip


# Those that may differ when a fine-tuning goes on: what pretraining alone heeds. Where it begins is
# compared by contents (`finetuning`).
FINETUNE_FREE = (
  *(name for name in _FREE if name != "finetune"),
  "train.batch_size", "train.steps", "train.learning_rate", "train.warmup_steps", "train.schedule",
)  # fmt: skip


def may_differ(field: str, free: Sequence[str] = _FREE) -> bool:
  """Whether a field, or the part of the config that it is in, doesn't decide a run's numbers."""
  return any(field == name or field.startswith(name + ".") for name in free)


def check(config: ConfigDict, workdir: str, free: Sequence[str] = _FREE) -> None:
  """Checks that a workdir which holds a run holds this one.

  Args:
    config: of this run.
    workdir: to look into.
    free: fields, or whole parts of the config, that may differ.

  Raises:
    UserError: it holds another config's run, the fields that differ are listed; or a newer version's,
      that had settings which this one can't heed.
  """
  theirs = read(workdir)
  if theirs is None:
    return
  ours = files.flatten(config_lib.as_json(config))
  changed, unknown = [], []
  for name in sorted(ours.keys() | theirs.keys()):
    if may_differ(name, free):
      continue
    if name not in ours:
      unknown.append(f"  {name}: {theirs[name]}")
    elif theirs.get(name, "absent") != ours[name]:
      changed.append(f"  {name}: {theirs.get(name, 'absent')} there, {ours[name]} here")
  if unknown:
    raise UserError(
      f"workdir: {workdir} holds a run with settings that igpt_jax {__version__} doesn't have:\n"
      + "\n".join(unknown)
      + "\nfix: the newer igpt_jax that began it, or another --workdir"
    )
  if changed:
    raise UserError(
      f"workdir: {workdir} holds another config's run:\n" + "\n".join(changed) + "\n"
      "fix: another --workdir, or the config that this run was begun with"
    )


def read(workdir: str) -> dict[str, Any] | None:
  """The settings of a workdir's run, "part.field" -> value, by today's names; None: it holds none.

  Raises:
    UserError: they can't be read, or are of a newer format.
  """
  path = os.path.join(workdir, "config.json")
  try:
    with open(path, encoding="utf-8") as file:
      config = json.load(file)
    number = history.format_of(config, f"workdir: {path}")
    return files.flatten(history.upgraded(config, number))
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f"workdir: {path} can't be read ({error.strerror}); expected a file") from None
  except (ValueError, TypeError, AttributeError) as error:  # what isn't JSON, or not of this shape
    raise UserError(f"workdir: {path} is damaged ({error}); fix: another --workdir") from None


def claim(config: ConfigDict, workdir: str) -> None:
  """Writes config.json into a workdir that has none: from now on it is this run's."""
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    summary.write_json(path, {history.KEY: history.FORMAT, **config_lib.as_json(config)})


def open_workdir(workdir: str) -> None:
  """Makes the workdir.

  Raises:
    UserError: it can't be made or written to.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
    # A name of its own: in containers the processes of all hosts may have one number.
    with tempfile.NamedTemporaryFile(dir=workdir, prefix=".writable."):
      pass
  except OSError as error:
    raise UserError(f"workdir: {workdir} can't be written to ({error.strerror})") from None
