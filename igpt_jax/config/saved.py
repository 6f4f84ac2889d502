"""A run's settings from the config.json in its workdir: --config runs/x/config.json.

`main` opens this file as it opens any config file, with the path of the JSON as its argument.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from igpt_jax import history
from igpt_jax.config_fields import base
from igpt_jax.errors import UserError


def get_config(path: str) -> ConfigDict:
  """All fields, by today's names; those that a run of an older version didn't know are as it meant them.

  Args:
    path: of a config.json.

  Raises:
    UserError: it can't be read, or has fields or values that this version doesn't take.
  """
  try:
    with open(path, encoding="utf-8") as file:
      saved = json.load(file)
  except OSError as error:
    raise UserError(
      f"--config: {path}: {error.strerror}; expected the config.json of a workdir"
    ) from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"--config: {path} is damaged ({error}); expected JSON") from None
  if not isinstance(saved, dict):
    raise UserError(f"--config: {path} holds no settings; expected the config.json of a workdir")
  number = history.format_of(saved, f"--config: {path}")
  try:
    saved = history.upgraded(saved, number)
  except AttributeError:  # a value where a part of the settings is expected
    raise UserError(f"--config: {path} is damaged; expected the config.json of a workdir") from None
  config = base()
  strangers = []
  for name, value in _leaves(saved):
    default = config
    for part in name:
      default = default.get(part) if isinstance(default, ConfigDict) else None
    if default is None or isinstance(default, ConfigDict):
      strangers.append(".".join(name))
      continue
    try:
      if value is None:
        raise TypeError("null")
      value = tuple(value) if isinstance(default, tuple) else value
      config.update_from_flattened_dict({".".join(name): value})
    except (TypeError, ValueError):
      raise UserError(
        f"--config: {path}: {'.'.join(name)} is {value!r:.80}; expected as in {default!r}"
      ) from None
  if strangers:
    raise UserError(
      f"--config: {path} has fields that this version doesn't know: {', '.join(strangers[:5])}"
      f"{', …' if len(strangers) > 5 else ''}; fix: the version of igpt_jax that wrote it, or a copy "
      "without them"
    )
  return config


def _leaves(
  tree: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
  """The path of each value, and the value."""
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, (*above, name))
    else:
      yield (*above, name), value
