"""Config files of the project, by name: configs/ of a checkout, which a wheel carries in the package."""

import difflib
import os
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

from igpt_jax.config.fields import FIELDS, Settings, from_config, value_of, with_values
from igpt_jax.errors import UserError

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def folder() -> pathlib.Path:
  """Returns the folder of the project's config files."""
  carried = _PACKAGE / "configs"
  return carried if carried.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
  """Returns the names of the project's configs, such as "quickstart"."""
  return sorted(path.stem for path in folder().glob("*.py"))


def path_of(config: str, what: str = "--config") -> str:
  """Returns the path of a config file that is given by its path or, unless that exists, by its name.

  Args:
    config: the path or name.
    what: what names it, for errors.

  Raises:
    UserError: there is neither.
  """
  if os.path.isfile(config.partition(":")[0]):  # what follows a colon goes to the file
    return config
  if config in names():
    return str(folder() / f"{config}.py")
  meant = "".join(f"; fix: {name}" for name in difflib.get_close_matches(config, names(), 1))
  raise UserError(
    f"{what}: {config[:300]!r}: no such file; expected the path of a config, or the "
    f"name of one of the project's: {', '.join(names())}{meant}"
  )


def settings_of(config: str, what: str) -> Settings:
  """Returns the settings of a config file, each of them checked; arguments as of `path_of`.

  Raises:
    UserError: there is no such file, or it has a wrong value.
  """
  path = path_of(config, what)
  try:
    made = runpy.run_path(path)["get_config"]()
  except UserError:
    raise
  except Exception as error:  # a config file is a program: it may raise anything
    raise UserError(
      f"{what}: {path}: {type(error).__name__}: {error}; expected a config file with get_config(), as in configs/"
    ) from None
  return from_config(made)


def replaced(settings: Settings) -> dict[str, Any]:
  """Returns what job first_contact replaces in its configs: its settings that aren't the program's defaults.

  A setting that is given its default can't be told from one that isn't given: it replaces nothing.
  """
  return {
    name: value_of(settings, name)
    for name, declaration in FIELDS.items()
    if "first_contact" in declaration.jobs
    and name != "job"
    and not name.startswith("first_contact.")
    and value_of(settings, name) != declaration.default
  }


def check(settings: Settings, check_settings: Callable[[Settings], None]) -> None:
  """Checks the configs that job first_contact names, with what it replaces in them.

  Raises:
    UserError: one isn't there, or its settings don't agree.
  """
  for config in settings.first_contact.configs:
    own = settings_of(config, "config.first_contact.configs")
    check_settings(with_values(own, replaced(settings)))
