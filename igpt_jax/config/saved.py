"""Config file that reads a run's settings from its workdir: --config runs/x/config.json.

`main` opens this file as it opens any config file, with the path of the JSON as its argument.
"""

import json
from typing import Any

from igpt_jax import files, history
from igpt_jax.config.fields import FIELDS, base
from igpt_jax.errors import UserError


def get_config(path: str) -> Any:
  """Returns the settings of a config.json by today's names; later ones as its version behaved.

  Raises:
    UserError: it can't be read, or has fields or values that this version doesn't accept.
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
    saved = files.flatten(history.upgraded(saved, number))
  except AttributeError:  # a value in place of a group of settings
    raise UserError(f"--config: {path} is damaged; expected the config.json of a workdir") from None
  config = base()
  strangers = [name for name in saved if name not in FIELDS]
  if strangers:
    raise UserError(
      f"--config: {path} has fields that this version doesn't know: {', '.join(strangers[:5])}"
      f"{', …' if len(strangers) > 5 else ''}; fix: the version of igpt_jax that wrote it, or a copy "
      "without them"
    )
  for name, value in saved.items():
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
  return config
