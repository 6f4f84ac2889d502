"""python -m igpt_jax.main --config configs/quickstart.py --workdir runs/quickstart

Reads settings from flags and runs the job that they name. --help lists the jobs.
"""

from igpt_jax import stopping

if __name__ == "__main__":
  stopping.listen()  # before the imports, which take a second

import contextlib
import importlib.util
import os
import re
import sys
import time
import traceback
import types
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from igpt_jax import __version__, files, watchdog
from igpt_jax.config import fields, named, saved
from igpt_jax.config import help as help_lib
from igpt_jax.config.declare import JOBS
from igpt_jax.config.fields import FIELDS, Settings, no_such
from igpt_jax.errors import UserError
from igpt_jax.workspace import preflight

_BEGAN = time.monotonic()

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The config file, a name of the project's, or the config.json of a workdir (default: --workdir's); "
  "--config.FIELD=VALUE overrides a field.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where checkpoints, metrics and images go (default: runs/CONFIG; of a config.json, where it lies).",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of several processes: join them by jax.distributed (launch/ sets it)."
)
_CHECK = flags.DEFINE_string(
  "check",
  None,
  "Check the settings and end: here (--check), for a slice (--check=v5litepod-16, v5p:4x4x4, two: "
  "2xv5p-128), or with the data, palette, checkpoint and workdir of the machine (--check=machine).",
)

_A_FILE = "expected a function of that name that returns the settings; fix: begin with a copy of one in configs/"
# The config file whose argument is the path of a config.json.
_SAVED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", "saved.py:")


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; reports a mistake in them, or in the config file, in one line."""
  if {"--help", "-help", "-h"} & set(argv[1:]):
    raise SystemExit(_help(argv))
  if {"--version", "-version"} & set(argv[1:]):
    print(f"igpt_jax {__version__}")
    raise SystemExit(0)
  for flag in filter(None, (re.match(r"--?config\.([\w.]+)", argument) for argument in argv)):
    if flag[1] not in FIELDS:
      raise SystemExit(_fail(f"--{_shortened(no_such(flag[1]))}"))
  try:
    # config_flags looks at sys.argv for the config's fields.
    argv = sys.argv = _with_config_first(argv)
    return flags.FLAGS(argv)
  except UserError as error:
    raise SystemExit(_fail(error)) from None
  except flags.UnrecognizedFlagError as error:
    # config's fields are flags once a config is there.
    unread = error.flagname.startswith("config.")
    raise SystemExit(_fail(_no_config(argv) if unread else _unknown(error))) from None
  except flags.IllegalFlagValueError as error:
    raise SystemExit(_fail(_shortened(_illegal(error)))) from None
  except (flags.Error, TypeError, ValueError, OSError) as error:
    raise SystemExit(_fail(_shortened(error))) from None
  except Exception as error:  # a config file is a program: it may raise anything
    made_by = getattr(error, "obj", None)
    if isinstance(made_by, types.ModuleType) and getattr(error, "name", "") == "get_config":
      raise SystemExit(
        _fail(f"--config: {made_by.__file__} has no get_config(); {_A_FILE}")
      ) from None
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
    raise SystemExit(
      _fail(
        f"--config: {_shortened(f'{type(error).__name__}: {error}')}{where}; expected a config file, "
        "as in configs/, or the config.json of a workdir"
      )
    ) from None


def _unknown(error: flags.UnrecognizedFlagError) -> str:
  """Returns the message about an option that there isn't, with the setting that has its name, if any."""
  meant = fields.todays_name(error.flagname)
  name = f"--{error.flagname}: there is no such option; did you mean --config.{meant}?"
  return name if meant else _shortened(error)


def _illegal(error: flags.IllegalFlagValueError) -> object:
  """Returns the message about a flag whose text isn't of its type, a setting's by what is declared of it."""
  flag, _, text = str(error).removesuffix(f": {error.__context__}").partition("=")
  name = flag.removeprefix("flag --config.")
  if name not in FIELDS or error.__context__ is None:
    return error
  return FIELDS[name].of_another_type(f"config.{name}", text)


def _with_config_first(argv: list[str]) -> list[str]:
  """Returns the arguments with --config=FILE, or the workdir's config.json, as the first of them.

  The config's fields are flags only from there on.

  Raises:
    UserError: there is no such config.
  """
  path, rest, arguments = "", [], iter(argv[1:])
  for argument in arguments:
    if re.match(r"--?config=", argument):
      path = argument.partition("=")[2]
    elif argument in ("--config", "-config"):
      path = next(arguments, "")
    else:
      rest.append("--check=" if argument in ("--check", "-check") else argument)
  if not path and (own := _config_json(argv)) and files.is_file(own):
    path = own
  if path.endswith(".json"):
    path = f"{_SAVED}{path}"
  elif path:
    path = named.path_of(path)
  return [argv[0], *([f"--config={path}"] if path else []), *rest]


def _config_json(argv: list[str]) -> str:
  """Returns the path of a config.json in the workdir that the arguments name; "" if they name none."""
  workdirs = re.findall(r"^--?workdir[=\n](.+)$", "\n".join(argv), re.MULTILINE)
  if not workdirs:
    return ""
  given = workdirs[-1]
  folder = files.place("--workdir", given) if files.is_remote(given) else os.path.expanduser(given)
  return os.path.join(folder, saved.NAME)


def _no_config(argv: list[str]) -> str:
  path = _config_json(argv)
  missing = f"missing, and there is no {path}" if path else "missing"
  return (
    f"--config: {missing}; expected a config file or a name, such as --config quickstart, or the "
    "--workdir of a run, whose config.json is read"
  )


def _shortened(message: object) -> str:
  """Returns a message without its middle if it is very long: it may quote a user's value."""
  text = str(message)
  return text if len(text) <= 600 else f"{text[:300]} … {text[-300:]}"


def _fail(message: object, status: int = 2) -> int:
  print(f"igpt_jax: {message}", file=sys.stderr)
  return status


def _help(argv: list[str]) -> int:
  """Prints the jobs or, where --config.job names one, its settings."""
  jobs = re.findall(r"^--?config\.job[=\n](.*)$", "\n".join(argv), re.MULTILINE)
  if jobs and jobs[-1] not in JOBS:
    return _fail(f"config.job: {jobs[-1]!r}; expected one of {', '.join(JOBS)}")
  try:
    print(help_lib.of_job(jobs[-1]) if jobs else help_lib.of_program(), flush=True)
  except BrokenPipeError:  # whoever read it has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 0


def _trains(settings: Settings) -> bool:
  return settings.job in ("pretrain", "ablate", "isoflop", "finetune") or (
    settings.job == "probe"
    and (settings.probe.method == "sgd" or settings.probe.pooling == "attentive")
  )


def _rules() -> Callable[[Settings], None] | None:
  """Returns what checks the rules that concern several settings; None: jax, which it needs, isn't installed."""
  if importlib.util.find_spec("jax") is None:
    return None
  from igpt_jax.config import read

  return read.check


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    return _fail(f"unexpected argument {argv[1]!r}: every option begins with --")
  config = _CONFIG.value
  if config is None:
    return _fail(_no_config(sys.argv))
  source = config_flags.get_config_filename(flags.FLAGS["config"])
  from_run = source.startswith(_SAVED)
  source = source.removeprefix(_SAVED) if from_run else source.split(":")[0]
  logging.set_verbosity(logging.WARNING)  # the libraries' own chatter
  folder, name = os.path.split(source)
  own = folder or "." if from_run else os.path.join("runs", os.path.splitext(name)[0])
  try:
    # Until settings are known to be right, jax isn't imported: a mistake is told at once.
    if _CHECK.value not in (None, preflight.MACHINE):
      settings = fields.from_config(config)
      for line in preflight.here(settings, _CHECK.value, _WORKDIR.value or own, _rules()):
        print(line)
      return 0
    workdir = files.place("--workdir", _WORKDIR.value or own)
    given = config_flags.get_override_values(flags.FLAGS["config"])
    differences = saved.take_from_run(config, workdir, given)
    settings = fields.from_config(config)
    from igpt_jax.config import read

    read.check(settings)
    files.use_scratch(settings.scratch)
  except UserError as error:
    return _fail(error, error.status)
  status = _run(settings, workdir, differences)
  stopping.end_if_a_wait_was_left(status)
  return status


def _run(settings: Settings, workdir: str, differences: list[str]) -> int:
  """Runs the job, alone or as one of several processes; returns the exit status.

  Args:
    settings: those of the job.
    workdir: its absolute path.
    differences: messages about settings that differ from those of the workdir's run.
  """
  from igpt_jax.parallel import compilation_cache, hardware, hosts, joining

  checks = _CHECK.value == preflight.MACHINE
  host_seconds, distributed = settings.host_seconds, _DISTRIBUTED.value and not checks
  try:
    with contextlib.ExitStack() as watched:
      if distributed:
        # jax ends the process when another one is silent; its message doesn't name the fix.
        lost = joining.lost(host_seconds, ", or this one was killed")
        watched.enter_context(watchdog.last_words(f"igpt_jax: ended from outside: {lost}"))
        joining.join(host_seconds, _trains(settings))
      from igpt_jax.workspace import agreement, places

      places.check(settings, workdir)
      if checks:
        for line in preflight.machine(settings, workdir):
          print(files.printable(line), flush=True)
        return 0
      hardware.check_platform()
      if distributed:
        agreement.check_settings(settings)
      for message in differences:
        if not distributed or hosts.is_main():  # asking for it initialises the devices
          print(files.printable(message), flush=True)
      if settings.job in FIELDS["compilation_cache"].jobs:  # others measure compiling, or don't
        compilation_cache.use(settings.compilation_cache, workdir)
      job = importlib.import_module(f"igpt_jax.jobs.{settings.job}")
      # Other jobs, and what these two do after their training, may report no progress for hours.
      several = settings.job in ("ablate", "isoflop")
      hang_seconds = settings.hang_seconds if _trains(settings) and not several else 0
      watched.enter_context(watchdog.Watchdog(hang_seconds, "hang_seconds"))
      if settings.job in ("pretrain", "finetune"):  # this process is here for one run
        job.run(settings, workdir, began=_BEGAN)
      else:
        job.run(settings, workdir)
    return 0
  except UserError as error:
    status = _fail(error, error.status)
  except Exception as error:
    from igpt_jax.workspace import memory

    message = memory.in_words(error, settings.job)
    if message is None and not distributed:
      raise
    if message is None:
      traceback.print_exc()
    status = 1 if message is None else _fail(message)
    if joining.is_of_others(error):
      _fail(joining.lost(host_seconds))
  if distributed:
    joining.leave(status)
  return status


if __name__ == "__main__":
  watchdog.tell_stacks()
  app.run(main, flags_parser=_parse_flags)
