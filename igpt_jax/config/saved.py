"""Settings of a run, from the config.json in its workdir: as a config of their own, or over another.

`main` opens this file as it opens any config file, with the path of the JSON as its argument.
"""

import json
import os
from collections.abc import Collection, Iterable
from typing import Any

from igpt_jax import files, history
from igpt_jax.config.declare import READING
from igpt_jax.config.fields import FIELDS, base
from igpt_jax.errors import UserError

NAME = "config.json"

# Settings that tell where a run's data and palette lie; their values decide no numbers.
_PLACES = ("data.path", "data.data_dir", "data.max_bad", "palette.path")
# Settings that belong to one data set.
_OF_DATA_SET = {
  "data.name", "data.path", "data.data_dir", "data.max_bad", "data.validation",
  "data.validation_split",
}  # fmt: skip


def get_config(path: str) -> Any:
  """Returns the settings of a config.json by today's names; later ones as its version behaved.

  Raises:
    UserError: it can't be read, or has fields or values that this version doesn't accept.
  """
  saved = read(path, "--config")
  if saved is None:
    raise UserError(f"--config: {path}: No such file; expected the config.json of a workdir")
  strangers = [name for name in saved if name not in FIELDS]
  if strangers:
    raise UserError(
      f"--config: {path} has fields that this version doesn't know: {', '.join(strangers[:5])}"
      f"{', …' if len(strangers) > 5 else ''}; fix: the version of igpt_jax that wrote it, or a copy "
      "without them"
    )
  config = base()
  # Cached programs run here. A workdir may come from somebody else, who mustn't choose the folders.
  if saved.get("compilation_cache") != "off":
    saved.pop("compilation_cache", None)
  saved.pop("scratch", None)
  for name, value in saved.items():
    _put(config, name, value, path)
  return config


def read(path: str, flag: str) -> dict[str, Any] | None:
  """Returns the settings of a config.json, "group.field" -> value, by today's names; None: no such file.

  Args:
    path: the file's.
    flag: the option that names it, for errors.

  Raises:
    UserError: it can't be read, holds no settings, or is of a newer format.
  """
  try:
    with files.opened(path, "r") as file:
      saved = json.load(file)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise UserError(f"{flag}: {path}: {error.strerror}; expected a file") from None
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{flag}: {path} is damaged ({error}); expected JSON; fix: another one"
    ) from None
  number = history.format_of(saved, f"{flag}: {path}") if isinstance(saved, dict) else 0
  if not number or not saved.keys() - {history.KEY}:
    raise UserError(
      f"{flag}: {path} is damaged: it holds no settings; expected the config.json of a workdir"
    )
  try:
    return files.flatten(history.upgraded(saved, number))
  except AttributeError:  # a value in place of a group of settings
    raise UserError(f"{flag}: {path} is damaged; expected the config.json of a workdir") from None


def overlay(
  config: Any, workdir: str, names: Iterable[str], given: Collection[str]
) -> tuple[list[str], list[str]]:
  """Replaces settings of a config by those of a workdir's run, except where the command line has them.

  Args:
    config: a ConfigDict of all settings; changed in place.
    workdir: the run's; without a config.json nothing is replaced.
    names: the settings to replace.
    given: the settings on the command line.

  Returns:
    The differences in words, "data.name: digits here, folder in the run": those of settings that were
    replaced, and those of settings that the command line kept.

  Raises:
    UserError: config.json can't be read.
  """
  path = os.path.join(workdir, NAME)
  saved = read(path, "--workdir") or {}
  here = files.flatten(config.to_dict())
  replaced, kept = [], []
  for name in names:
    theirs = saved.get(name, here[name])
    if (tuple(theirs) if isinstance(theirs, list) else theirs) == here[name]:
      continue
    line = f"{name}: {here[name]!r} here, {theirs!r} in the run"
    if name in given:
      kept.append(line)
    else:
      replaced.append(line)
      _put(config, name, theirs, path)
  return replaced, kept


def take_from_run(config: Any, workdir: str, given: Collection[str]) -> list[str]:
  """Lets a job that reads a run's checkpoint use the data and model that the run was made with.

  A run may have been begun with more on its command line than a config file says; what is on this
  job's command line is used all the same. Nothing changes for a checkpoint from outside the workdir,
  or for other jobs.

  Args:
    config: a ConfigDict of all settings; changed in place.
    workdir: the job's.
    given: the settings on the command line.

  Returns:
    Messages about the settings that differ.
  """
  if config.job not in READING:
    return []
  saved = read(os.path.join(workdir, NAME), "--workdir") or {}
  began_from = saved.get("checkpoint") if saved.get("job") != config.job else ""
  if "checkpoint" not in given and config.checkpoint == began_from:
    config.checkpoint = ""  # another job's, which a fine-tuning began from: not what it has made
  if config.checkpoint and not _is_within(config.checkpoint, workdir):
    return []
  names = [name for name in FIELDS if _is_of_run(name) and config.job in FIELDS[name].jobs]
  said_by = "command line"
  # A config file of the job itself, such as fine-tuning's, names the job's data, not the run's.
  if not {"job", "data.name"} & set(given) and config.data.name != FIELDS["data.name"].default:
    given, said_by = {*given, "data.name"}, "config file"
  if "data.name" in given and saved.get("data.name") != config.data.name:
    names = ["data.name", *(name for name in names if name not in _OF_DATA_SET)]
  replaced, kept = overlay(config, workdir, names, given)
  messages = []
  if replaced:
    messages.append(
      f"config: the run's settings are used, from {os.path.join(workdir, NAME)}: "
      f"{'; '.join(replaced)} (another value: --config.NAME=VALUE)"
    )
  if kept:
    messages.append(f"config: as the {said_by} says, unlike the run's: {'; '.join(kept)}")
  return messages


def _is_of_run(name: str) -> bool:
  """True for settings of a run's data, palette, model and objective."""
  made_of = name.startswith(("data.", "palette.", "model.", "objective", "mask_probability"))
  return made_of and (FIELDS[name].decides == "run" or name in _PLACES)


def _is_within(path: str, folder: str) -> bool:
  if files.is_remote(path) or files.is_remote(folder):
    return f"{path}/".startswith(f"{folder}/")
  path, folder = (os.path.realpath(os.path.expanduser(each)) for each in (path, folder))
  return os.path.commonpath([path, folder]) == folder


def _put(config: Any, name: str, value: Any, path: str) -> None:
  """Sets a setting from a config.json; raises UserError if its type isn't the setting's."""
  default = FIELDS[name].default
  try:
    if value is None:
      raise TypeError("null")
    value = tuple(value) if isinstance(default, tuple) else value
    config.update_from_flattened_dict({name: value})
  except (TypeError, ValueError):
    raise UserError(
      f"--config: {path}: {name} is {value!r:.80}; expected as in {default!r}"
    ) from None
