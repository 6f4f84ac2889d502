"""What workdirs of other versions say, in today's words. Ground floor.

A run's config.json and its checkpoints carry the number of the format they were written in; those
without one are of format 1. An older one is read as its run meant it; a newer one is refused.
"""

import copy
from collections.abc import Mapping
from typing import Any

from igpt_jax import __version__
from igpt_jax.errors import NewerFormat, UserError

KEY = "format_version"

# Goes up whenever a field changes its name, or what is written its meaning: then older programs are
# wrong about newer workdirs, and say so. A new field alone doesn't need it.
FORMAT = 3

# Format -> the config's fields, or whole parts of it, that have another name from then on: old name ->
# new name, "" for one that is gone. Dots lead into parts.
RENAMED: dict[int, dict[str, str]] = {
  3: {
    "images": "complete.images", "keep": "complete.keep", "hide": "complete.hide",
    "passes": "complete.passes", "n": "complete.n", "source": "convert.source",
    "target": "convert.target", "format": "convert.format", "topology": "compile.topology",
    "plan": "compile.plan", "train.keep": "train.max_to_keep", "train.keep_every": "train.keep_period",
    "sample.per_picture": "sample.per_image", "benchmark.pictures": "benchmark.images",
  },
}  # fmt: skip

# Fields that came after format 1, by today's names, each with its default when it came: so did runs
# that don't name it. A default that changes later doesn't change it here.
ADDED: dict[str, Any] = {
  "data.validation_split": "",
  "data.verify": False,
}


def format_of(values: Mapping[str, Any], where: str) -> int:
  """The format of a config.json, or of what a checkpoint says.

  Args:
    values: as read.
    where: it is from, to be told.

  Raises:
    NewerFormat: this version doesn't know it.
    UserError: it is no number.
  """
  number = values.get(KEY, 1)
  if not isinstance(number, int) or isinstance(number, bool) or number < 1:
    raise UserError(f"{where}: {KEY} {number!r}; expected 1 to {FORMAT}; it is damaged")
  if number > FORMAT:
    raise NewerFormat(
      f"{where}: written in format {number} by a newer igpt_jax; this one, {__version__}, reads 1 to "
      f"{FORMAT}; fix: use the newer igpt_jax"
    )
  return number


def is_default_of_later(name: str, value: Any) -> bool:
  """Whether a field, or one that a longer name ends with, came later, and has the default of then."""
  parts = name.split(".")
  endings = (".".join(parts[i:]) for i in range(len(parts)))
  return any(ending in ADDED and ADDED[ending] == value for ending in endings)


def todays_name(name: str) -> str:
  """What a field of an older version is called now; "" where it is gone, itself where it never changed."""
  for _, names in sorted(RENAMED.items()):
    name = names.get(name, name)
  return name


def with_todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
  """Values by "part.field" that any version wrote, by today's names."""
  return {todays_name(name): value for name, value in values.items()}


def upgraded(config: Mapping[str, Any], number: int) -> dict[str, Any]:
  """A config as JSON that was written in format `number`, with today's names and all of today's fields."""
  config = copy.deepcopy(dict(config))
  config.pop(KEY, None)
  for later in sorted(version for version in RENAMED if version > number):
    moved = [(new, _take(config, old)) for old, new in RENAMED[later].items()]
    for new, value in moved:
      if new and value is not _ABSENT:
        _put(config, new, value)
  for name, value in ADDED.items():
    _put(config, name, value)
  return config


_ABSENT = object()


def _take(tree: dict[str, Any], name: str) -> Any:
  *parts, last = name.split(".")
  for part in parts:
    tree = tree.get(part, {})
  return tree.pop(last, _ABSENT)


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
  """Sets a field by its dotted name, unless it is there."""
  *parts, last = name.split(".")
  for part in parts:
    tree = tree.setdefault(part, {})
  tree.setdefault(last, value)
