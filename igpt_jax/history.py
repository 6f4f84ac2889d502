"""Translation of older versions' workdirs to today's settings. Ground floor.

A run's config.json and its checkpoints carry the number of the format they were written in; those
without one are of format 1. An older one is read with its own defaults; a newer one is refused.
"""

import copy
from collections.abc import Mapping
from typing import Any

from igpt_jax import __version__
from igpt_jax.errors import NewerFormat, UserError

KEY = "format_version"

# Increased whenever a field's name, or the meaning of stored data changes, so that older programs
# refuse newer workdirs. A new field alone doesn't need it.
FORMAT = 3

# Format -> settings, or groups of them, renamed in it: old name -> new name, "" if removed.
RENAMED: dict[int, dict[str, str]] = {
  3: {
    "images": "complete.images", "keep": "complete.keep", "hide": "complete.hide",
    "passes": "complete.passes", "n": "complete.n", "source": "convert.source",
    "target": "convert.target", "format": "convert.format", "topology": "compile.topology",
    "plan": "compile.plan", "train.keep": "train.max_to_keep", "train.keep_every": "train.keep_period",
    "sample.per_picture": "sample.per_image", "benchmark.pictures": "benchmark.images",
  },
}  # fmt: skip

# Settings added after format 1, by today's names, with the default that older runs behaved like. It
# stays the same here if a setting's default changes later.
ADDED: dict[str, Any] = {
  "data.validation_split": "",
  "data.verify": False,
  "data.token_kind": "palette",
  "train.progress_images": 0,
  "train.optimizer": "adam",
  "model.parametrisation": "standard",
  "model.base_embd": 0,
  "model.base_layer": 0,
  "sizing.minutes": 0.0,
  "sizing.packaged": False,
  "train.decay_steps": 0,
  "train.decay_shape": "1-sqrt",
  "compilation_cache": "user",
  "scratch": "",
  "convert.dtype": "",
  "prepare.short_side": 0,
  "prepare.quality": 95,
  "prepare.target": "",
  "ablate.runs": [],
  "ablate.seeds": [0, 1, 2],
  "ablate.baseline": "",
  "ablate.test": True,
  "ablate.probe": "none",
  "ablate.workdirs": [],
  "isoflop.budgets": [3e11, 1e12, 3e12, 1e13],
  "isoflop.held_out": 0.0,
  "isoflop.shapes": [],
  "isoflop.per_budget": 5,
  "isoflop.tokens_per_parameter": 300.0,
  "isoflop.seeds": [0, 1, 2],
  "isoflop.max_epochs": 4.0,
  "isoflop.beyond": "warn",
  "isoflop.draws": 400,
  "isoflop.budget": 0.0,
  "probe.pooling": "mean",
  "probe.heads": 0,
  "probe.attention_rates": [3e-3, 1e-3, 3e-4, 1e-4],
  "probe.epochs": 100,
  "model.positions": "learned",
  "model.qk_norm": False,
  "model.value_embeddings": False,
  "model.x0_skip": False,
  "mesh.slices": 1,
  "compile.network": 0.0,
  "first_contact.minutes": 10.0,
  "first_contact.configs": [],
  "first_contact.parts": ["training", "sampling", "input", "forecast"],
}

# Fields of a checkpoint's model that were added when results were already kept by the digest of the others.
# At these values they stay out of digests, which go on finding what older versions kept.
ADDED_TO_MODEL: dict[str, Any] = {"token_kind": "palette"}

# Adam's β₂ of a run from before train.b2=0 left it open, which was 0: in float32 this is 0, too.
_B2_OF_ZERO = 1e-300


def format_of(values: Mapping[str, Any], where: str) -> int:
  """Returns the format of a config.json, or of a checkpoint's `run`; `where` is for errors.

  Raises:
    NewerFormat: it is newer than this version's.
    UserError: it isn't a format's number.
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
  """True if a name is, or ends with, that of an added setting, and `value` is its entry in ADDED."""
  parts = name.split(".")
  endings = (".".join(parts[i:]) for i in range(len(parts)))
  return any(ending in ADDED and ADDED[ending] == value for ending in endings)


def todays_name(name: str) -> str:
  """Returns today's name of an older version's setting; "" if removed."""
  for _, names in sorted(RENAMED.items()):
    name = names.get(name, name)
  return name


def with_todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns values of any version, by "group.field", under today's names."""
  return {todays_name(name): value for name, value in values.items()}


def upgraded(config: Mapping[str, Any], number: int) -> dict[str, Any]:
  """Returns a config.json of format `number` with today's names, and with added settings."""
  config = copy.deepcopy(dict(config))
  config.pop(KEY, None)
  for later in sorted(version for version in RENAMED if version > number):
    moved = [(new, _take(config, old)) for old, new in RENAMED[later].items()]
    for new, value in moved:
      if new and value is not _ABSENT:
        _put(config, new, value)
  train = config.get("train", {})
  if train.get("b2") == 0 and "decay_steps" not in train:  # they came together
    train["b2"] = _B2_OF_ZERO
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
  """Sets a setting by its dotted name, unless it is there."""
  *parts, last = name.split(".")
  for part in parts:
    tree = tree.setdefault(part, {})
  tree.setdefault(last, value)
