"""Declarations of settings: default, meaning, bounds or choices, and the jobs that read them.

A group of settings is a frozen dataclass that checks its values against their declarations when it is
made. Every list of settings derives from the declarations. Ground floor.
"""

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeVar

from igpt_jax.errors import UserError

T = TypeVar("T")

# The training runs whose numbers a setting decides: none, all, or those of one kind.
Decides = Literal["nothing", "run", "pretraining", "finetuning"]

MAX_INT = 2**31 - 1  # steps, tokens and records are counted in 32 bits

# What is expected of each type, and how it is written.
_KINDS = {
  bool: ("True or False", "one of these words"),
  int: ("a whole number", "digits alone, such as 1000"),
  float: ("a number", "one such as 0.5 or 1e-3"),
  str: ("text", "quotes around it"),
}
_TUPLES = {
  int: ("a tuple of whole numbers", "one such as (0, 1)"),
  float: ("a tuple of numbers", "one such as (0.5, 1e-3)"),
  str: ("a tuple of texts", "each in quotes, such as ('a', 'b')"),
}
_BOUNDS = {"least": operator.ge, "most": operator.le, "above": operator.gt, "below": operator.lt}

# Modules of igpt_jax.jobs, each with run(settings, workdir).
JOBS = {
  "pretrain": "train a model on images, from random parameters or from a checkpoint's",
  "ablate": "train runs that differ in some settings, and compare what each reaches with its compute",
  "isoflop": "train models of several sizes at several budgets, and find how to spend a larger one",
  "evaluate": "measure the exact likelihood of a split, beside baselines that know no neighbours",
  "probe": "fit linear classifiers to the features of every layer",
  "lowdata": "fit linear classifiers to a few labels of each class",
  "finetune": "train a model and a linear head together to classify",
  "sample": "draw images, and complete those of the test split",
  "complete": "complete your own images, or draw from nothing",
  "quality": "measure the Fréchet distance of samples and completions to the test split",
  "fit_palette": "fit a palette of colours to the training images by k-means",
  "prepare": "download and prepare a TFDS data set",
  "convert": "rewrite a checkpoint in another format",
  "download": "fetch OpenAI's released checkpoints and tokens",
  "compile": "compile for a TPU slice that isn't here; predict its memory use and speed",
  "benchmark": "measure how fast this machine trains, attends, samples and reads images",
  "first_contact": "measure the project's models here in minutes, for a report that can be sent to anybody",
}

# Jobs that pretrain.
PRETRAINING = ("pretrain", "ablate", "isoflop")
TRAINING = (*PRETRAINING, "finetune", "probe")
# Jobs that read a checkpoint.
READING = ("evaluate", "probe", "lowdata", "finetune", "sample", "complete", "quality")
# Jobs that can follow a training run, checkpoint by checkpoint.
WATCHING = ("evaluate", "probe", "sample", "quality")
MEASURING = ("benchmark", "first_contact")
DRAWING = (*PRETRAINING, "sample", "complete", "quality", "compile", *MEASURING)
# Jobs that can make a model without a checkpoint.
MAKING = (*PRETRAINING, "finetune", "compile", *MEASURING)
UPDATING = (*PRETRAINING, "compile", *MEASURING)
COMPUTING = (*PRETRAINING, *READING, "compile", *MEASURING)
_WITHOUT_DATA = ("complete", "convert", "download", "compile", "first_contact")
OPENING = tuple(job for job in JOBS if job not in _WITHOUT_DATA)

# Bounds that many settings have.
BATCH = {"least": 1, "most": 65_536}
COUNT = {"least": 1}
FROM_0 = {"least": 0}


@dataclasses.dataclass(frozen=True)
class Declaration:
  """All that is declared of a setting; the bounds and choices of a tuple are those of its items.

  Attributes:
    default: allowed even if it is out of bounds: then it leaves a choice open.
    meaning: one phrase for --help.
    least, most: inclusive bounds.
    above, below: exclusive bounds.
    choices: all allowed values.
    decides: the runs whose numbers it decides, and which can't be resumed with another value.
    host: True if every host of a run may have its own value.
    path: True if it names a local file or folder.
    bucket: True if it may also be the address of one in a bucket.
    empty: True if a tuple may be empty.
    items: the type of a tuple's items, if its default has none.
    jobs: the jobs that read it.
  """

  default: Any
  meaning: str
  least: float | None = None
  most: float | None = None
  above: float | None = None
  below: float | None = None
  choices: tuple[Any, ...] = ()
  decides: Decides = "nothing"
  host: bool = False
  path: bool = False
  bucket: bool = False
  empty: bool = True
  items: type = str
  jobs: tuple[str, ...] = ()

  def expected(self) -> str:
    """Returns the allowed values in words; "" if any value of the type is."""
    if self.choices:
      several = "some" if isinstance(self.default, tuple) else "one"
      return f"{several} of {', '.join(str(choice) for choice in self.choices if choice != '')}"
    if self.above is not None:
      both = self.below is not None
      return f"within ({self.above:g}, {self.below:g})" if both else f"more than {self.above:g}"
    if self.least is None:
      return ""
    if self.below is not None:
      return f"{self.least:g} to below {self.below:g}"
    return f"{self.least:,} or more" if self.most is None else f"{self.least:,} to {self.most:,}"

  @property
  def item(self) -> type:
    """The type of the value, or of the items of a tuple."""
    if not isinstance(self.default, tuple):
      return type(self.default)
    return type(self.default[0]) if self.default else self.items

  def of_another_type(self, name: str, value: Any) -> UserError:
    """Returns the error that a value, or a text that stands for one, isn't of the setting's type."""
    what, fix = (_TUPLES if isinstance(self.default, tuple) else _KINDS)[self.item]
    bounds = f", {self.expected()}" if self.expected() else ""
    return UserError(f"{name}: {value!r:.200}; expected {what}{bounds}; fix: {fix}")

  def check(self, name: str, value: Any) -> None:
    """Raises UserError, naming the setting, if the value isn't allowed."""
    is_tuple = isinstance(self.default, tuple)
    items = value if is_tuple and isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) != is_tuple or not all(map(self._is_of_type, items)):
      raise self.of_another_type(name, value)
    for item in items:
      self._check_number(name, item)
    if value == self.default:
      return
    if not self.empty and not items:
      raise UserError(f"{name}: (); expected {self.expected()}, such as {self.default}")
    for item in items:
      if not self._allows(item):
        shown = repr(item) if isinstance(item, str) else item
        raise UserError(f"{name}: {shown}; expected {self.expected()}")

  def _is_of_type(self, item: Any) -> bool:
    # A whole number is a number, but True isn't.
    kinds = (int, float) if self.item is float else self.item
    return isinstance(item, kinds) and not (isinstance(item, bool) and self.item is not bool)

  def _check_number(self, name: str, value: Any) -> None:
    """Whole numbers must fit 32 bits (the seed: unsigned ones), others must be finite."""
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{name}: {value}; expected a finite number")
    if not isinstance(value, int):
      return
    least, most = (0, self.most) if self.most and self.most > MAX_INT else (-MAX_INT, MAX_INT)
    if not least <= value <= most:
      # Python refuses to print a number of several thousand digits.
      shown = value if abs(value) < 2**128 else f"a number of {value.bit_length():,} bits"
      raise UserError(f"{name}: {shown}; expected {least:,} to {most:,}")

  def _allows(self, value: Any) -> bool:
    if self.choices:
      return value in self.choices
    bounds = {name: bound for name in _BOUNDS if (bound := getattr(self, name)) is not None}
    return not bounds or (
      isinstance(value, int | float)
      and all(_BOUNDS[name](value, bound) for name, bound in bounds.items())
    )


def setting(default: T, meaning: str, **declared: Any) -> T:
  """Returns a field of a group; `declared` are the attributes of its Declaration."""
  declaration = Declaration(default, meaning, **declared)
  field: Any = dataclasses.field(default=default, metadata={"declared": declaration})
  return field


class Group:
  """Base of a group of settings, which are checked when it is made.

  Attributes:
    prefix: the beginning of their names, "group."; "" at the root.
    jobs: the jobs that read those settings that don't declare their own.
  """

  prefix: ClassVar[str] = ""
  jobs: ClassVar[tuple[str, ...]] = ()

  def __init_subclass__(cls, *, prefix: str = "", jobs: tuple[str, ...] = ()) -> None:
    cls.prefix, cls.jobs = prefix and f"{prefix}.", jobs

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      if declaration := field.metadata.get("declared"):
        declaration.check(f"config.{self.prefix}{field.name}", getattr(self, field.name))


def declarations(group: type[Group]) -> Iterator[tuple[str, Declaration]]:
  """Yields names, "group.field", and declarations of a group's settings and of the groups in it."""
  for field in dataclasses.fields(group):  # type: ignore[arg-type]
    if declaration := field.metadata.get("declared"):
      jobs = declaration.jobs or group.jobs
      yield group.prefix + field.name, dataclasses.replace(declaration, jobs=jobs)
    else:
      yield from declarations(type(field.default))  # type: ignore[arg-type]
