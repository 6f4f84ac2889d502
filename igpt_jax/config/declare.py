"""How a setting is declared: once, with its default, meaning, bounds or choices, and whom it concerns.

A group of settings is a frozen dataclass whose values are checked against their declarations when one
is made. Whatever lists settings is derived from the declarations. Ground floor.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeVar

from igpt_jax.errors import UserError

T = TypeVar("T")

# Whose numbers a setting decides: of no training run, of every one, of pretraining or fine-tuning alone.
Decides = Literal["nothing", "run", "pretraining", "finetuning"]

MAX_INT = 2**31 - 1  # steps, tokens and records are counted in 32 bits

_KINDS = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  str: "text",
  tuple: "a tuple",
}


# Each is a module of igpt_jax.jobs with run(settings, workdir).
JOBS = {
  "pretrain": "train a model on images, from random parameters or from a checkpoint's",
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
}

TRAINING = ("pretrain", "finetune", "probe")
# Jobs that read a checkpoint, those of them that are run on one after the other of a run's, those that draw.
READING = ("evaluate", "probe", "lowdata", "finetune", "sample", "complete", "quality")
WATCHING = ("evaluate", "probe", "sample", "quality")
DRAWING = ("sample", "complete", "quality", "compile", "benchmark")
# Jobs that may make a model of their own.
MAKING = ("pretrain", "finetune", "compile", "benchmark")
UPDATING = ("pretrain", "compile", "benchmark")
COMPUTING = ("pretrain", *READING, "compile", "benchmark")
OPENING = tuple(job for job in JOBS if job not in ("complete", "convert", "download", "compile"))

# Bounds that many settings have.
BATCH = {"least": 1, "most": 65_536}
COUNT = {"least": 1}
FROM_0 = {"least": 0}


@dataclasses.dataclass(frozen=True)
class Declaration:
  """What is known of a setting beside its name; of a tuple the bounds and choices are of its items.

  Attributes:
    default: a value that is always allowed, also outside of the bounds: then it leaves a choice open.
    meaning: for a person.
    least, most: bounds, inclusive.
    above, below: bounds, exclusive.
    choices: all values there are.
    decides: whose numbers it decides; a run can't go on with another value of what decides it.
    host: each host of a run may have its own value.
    path: it names a local file or folder.
    empty: a tuple may have no items.
    jobs: that read it.
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
  empty: bool = True
  jobs: tuple[str, ...] = ()

  def expected(self) -> str:
    """What values may be, in words; "": anything of the kind."""
    if self.choices:
      several = "some" if isinstance(self.default, tuple) else "one"
      return f"{several} of {', '.join(str(choice) for choice in self.choices if choice != '')}"
    if self.above is not None and self.below is not None:
      return f"within ({self.above:g}, {self.below:g})"
    if self.above is not None:
      return f"more than {self.above:g}"
    if self.least is None:
      return ""
    if self.below is not None:
      return f"{self.least:g} to below {self.below:g}"
    return f"{self.least:,} or more" if self.most is None else f"{self.least:,} to {self.most:,}"

  def check(self, name: str, value: Any) -> None:
    """Raises UserError, naming the setting, where a value isn't one that it can have."""
    kind = type(self.default)
    # A whole number is a number; True isn't one.
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
      raise UserError(f"{name}: {value!r:.200}; expected {_KINDS[kind]}")
    for item in value if isinstance(value, tuple) else (value,):
      self._check_number(name, item)
    if value == self.default:
      return
    if not self.empty and not value:
      raise UserError(f"{name}: (); expected {self.expected()}, such as {self.default}")
    for item in value if isinstance(value, tuple) else (value,):
      if not self._allows(item):
        shown = repr(item) if isinstance(item, str) else item
        raise UserError(f"{name}: {shown}; expected {self.expected()}")

  def _check_number(self, name: str, value: Any) -> None:
    """Whole numbers are such that 32 bits hold (the seed, 32 bits without a sign), others are finite."""
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{name}: {value}; expected a finite number")
    if not isinstance(value, int):
      return
    least, most = (0, self.most) if self.most and self.most > MAX_INT else (-MAX_INT, MAX_INT)
    if not least <= value <= most:
      # Python writes no number of several thousand digits.
      shown = value if abs(value) < 2**128 else f"a number of {value.bit_length():,} bits"
      raise UserError(f"{name}: {shown}; expected {least:,} to {most:,}")

  def _allows(self, value: Any) -> bool:
    if self.choices:
      return value in self.choices
    bounds = (self.least, self.most, self.above, self.below)
    if bounds == (None,) * 4:
      return True
    return (
      isinstance(value, int | float)
      and (self.least is None or value >= self.least)
      and (self.most is None or value <= self.most)
      and (self.above is None or value > self.above)
      and (self.below is None or value < self.below)
    )


def setting(default: T, meaning: str, **declared: Any) -> T:
  """A field of a group; `declared` are the attributes of its Declaration."""
  declaration = Declaration(default, meaning, **declared)
  field: Any = dataclasses.field(default=default, metadata={"declared": declaration})
  return field


class Group:
  """Some settings, each checked as it is declared; `prefix` leads to them, `jobs` read them all."""

  prefix: ClassVar[str] = ""
  jobs: ClassVar[tuple[str, ...]] = ()

  def __init_subclass__(cls, *, prefix: str = "", jobs: tuple[str, ...] = ()) -> None:
    cls.prefix, cls.jobs = prefix, jobs

  def __post_init__(self) -> None:
    for name, declaration in declarations(type(self), deep=False):
      value = getattr(self, name.rpartition(".")[2])
      declaration.check(f"config.{name}", value)


def declarations(group: type[Group], deep: bool = True) -> Iterator[tuple[str, Declaration]]:
  """The names, "group.field", of a group's settings, and what is declared of them, in order.

  Args:
    group: whose.
    deep: those of the groups in it, too.
  """
  for field in dataclasses.fields(group):  # type: ignore[arg-type]
    declaration = field.metadata.get("declared")
    if declaration is not None:
      name = f"{group.prefix}.{field.name}" if group.prefix else field.name
      yield name, dataclasses.replace(declaration, jobs=declaration.jobs or group.jobs)
    elif deep:
      yield from declarations(field.default_factory)  # type: ignore[arg-type]
