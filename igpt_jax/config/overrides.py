"""The runs of job ablate: named lists of overrides of settings, "NAME: SETTING=VALUE …".

Values are written as on the command line, with quotes around one that has spaces.
"""

import ast
import dataclasses
import re
import shlex
from collections.abc import Callable
from typing import Any

from igpt_jax.config.fields import FIELDS, Settings, no_such, with_values
from igpt_jax.config.job_fields import AblateConfig
from igpt_jax.errors import UserError

# Runs share these: losses are compared on the same tokens, seeds are paired, and one process trains all.
_SHARED = (
  "job", "seed", "data", "palette", "objective", "mask_probability", "train.eval_images", "sizing",
  "mesh", "hang_seconds", "host_seconds", "compilation_cache", "scratch",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NamedRun:
  """A run of `ablate.runs`.

  Attributes:
    name: its folder's, too.
    values: the overrides, by "group.field".
  """

  name: str
  values: dict[str, Any]

  @property
  def text(self) -> str:
    return " ".join(f"{name}={value}" for name, value in self.values.items())

  def settings(self, base: Settings, seed: int) -> Settings:
    """Returns the settings of job pretrain for this run with a seed.

    Raises:
      UserError: naming the run and the value that isn't allowed.
    """
    try:
      own = with_values(base, self.values)
    except UserError as error:
      raise _wrong(self.name, error) from None
    return dataclasses.replace(own, job="pretrain", seed=seed, ablate=AblateConfig())


def named_runs(settings: Settings) -> list[NamedRun]:
  """Returns the runs of `ablate.runs`, the baseline first.

  Raises:
    UserError: one can't be read, names a setting that there isn't or that all runs share, or is there
      twice; or the baseline isn't among them.
  """
  runs: list[NamedRun] = []
  for text in settings.ablate.runs:
    run = _parse(text)
    values = run.settings(settings, 0)
    for other in runs:
      if other.name == run.name:
        raise UserError(
          f"config.ablate.runs: {run.name!r} names two runs; expected different names"
        )
      if other.settings(settings, 0) == values:
        raise UserError(
          f"config.ablate.runs: {run.name}: the same settings as {other.name}; expected each run once"
        )
    runs.append(run)
  if not runs:
    raise UserError(
      "config.ablate.runs: (); expected 'NAME: SETTING=VALUE …' for every run, such as ('original:', "
      "'slow: train.learning_rate=1e-3'); or finished runs in ablate.workdirs"
    )
  name = baseline(settings, [run.name for run in runs])
  return sorted(runs, key=lambda run: run.name != name)


def baseline(settings: Settings, names: list[str]) -> str:
  """Returns the name of the run that the others are compared with.

  Raises:
    UserError: `ablate.baseline` isn't among the names.
  """
  name = settings.ablate.baseline
  if name and name not in names:
    raise UserError(f"config.ablate.baseline: {name!r}; expected one of {', '.join(names)}")
  return name or names[0]


def check(settings: Settings, check_one: Callable[[Settings], object]) -> None:
  """Raises UserError if the settings of job ablate, or of one of its runs by `check_one`, are wrong."""
  if settings.sizing.minutes:
    raise UserError(
      f"config.sizing.minutes: {settings.sizing.minutes:g} sizes one run of job pretrain; expected 0: "
      "runs that are compared have sizes of their own"
    )
  for run in [] if settings.ablate.workdirs else named_runs(settings):
    try:
      check_one(run.settings(settings, 0))
    except UserError as error:
      raise _wrong(run.name, error) from None


def _wrong(name: str, error: UserError) -> UserError:
  return UserError(f"config.ablate.runs: {name}: {error}; fix: that run's overrides")


def _parse(text: str) -> NamedRun:
  name, colon, rest = text.partition(":")
  name = name.strip()
  if not (colon and re.fullmatch(r"[\w+-][\w.+-]{0,79}", name)):
    raise UserError(
      f"config.ablate.runs: {text!r:.200}; expected 'NAME: SETTING=VALUE …', where NAME has letters, "
      "digits and -_.+"
    )
  try:
    parts = shlex.split(rest)
  except ValueError as error:
    raise UserError(
      f"config.ablate.runs: {name}: {rest!r:.200} ({error}); expected SETTING=VALUE …"
    ) from None
  values: dict[str, Any] = {}
  for part in parts:
    field, equals, value = part.partition("=")
    if not equals:
      raise UserError(f"config.ablate.runs: {name}: {part!r:.200}; expected SETTING=VALUE")
    _check_field(name, field)
    if field in values:
      raise UserError(f"config.ablate.runs: {name}: {field} twice; expected it once")
    values[field] = _value(name, field, value)
  return NamedRun(name, values)


def _check_field(name: str, field: str) -> None:
  """Raises UserError unless runs may differ in this setting."""
  if field not in FIELDS:
    raise UserError(
      f"config.ablate.runs: {name}: {no_such(field)}; expected a setting of job pretrain"
    )
  if any(f"{field}.".startswith(f"{shared}.") for shared in _SHARED):
    how = "ablate.seeds" if field == "seed" else f"--config.{field}=, for all runs"
    raise UserError(
      f"config.ablate.runs: {name}: {field} is the same for all runs, which are compared; "
      f"fix: {how}"
    )
  if "pretrain" not in FIELDS[field].jobs:
    raise UserError(
      f"config.ablate.runs: {name}: {field} isn't read by job pretrain; expected a setting that is"
    )


def _value(name: str, field: str, text: str) -> Any:
  """Returns the value of a setting, of its type, from text."""
  default = FIELDS[field].default
  try:
    if isinstance(default, bool):
      return {"true": True, "false": False}[text.lower()]
    if isinstance(default, tuple):
      value = ast.literal_eval(text)
      return value if isinstance(value, tuple) else (value,)
    return type(default)(text)
  except (LookupError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    raise UserError(
      f"config.ablate.runs: {name}: {field}={text!r:.200}; expected a value such as {default!r}"
    ) from None
