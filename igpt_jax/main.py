"""python -m igpt_jax.main --config configs/quickstart.py --workdir runs/quickstart

Flags become a config, `config.job` names what to run; nothing else happens here.
"""

import contextlib
import importlib
import os
import re
import sys
import threading
import time
import traceback
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from igpt_jax import files, watchdog
from igpt_jax.errors import UserError

_BEGAN = time.monotonic()

# Each is a module of igpt_jax.jobs with run(config, workdir).
JOBS = (
  "pretrain", "evaluate", "probe", "lowdata", "finetune", "sample", "complete", "quality",
  "fit_palette", "prepare", "convert", "download", "compile", "benchmark",
)  # fmt: skip

# Of several processes one may have long work of its own at the end (fitting probes) ...
_WAIT_FOR_OTHERS_SECONDS = 7 * 86_400
# ... but when one fails, all of them usually do, for the same reason and at the same time.
_WAIT_FOR_OTHERS_TO_FAIL_SECONDS = 10

_LOST = (
  "another host was probably lost (killed, stopped, or cut off for config.host_seconds: {}) or never came{}; "
  "the lines above say more; the same command on all hosts goes on from the newest checkpoint"
)
# How a backend's error reads when the other end of a connection is gone.
_OF_OTHERS = re.compile(r"gloo|nccl|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The config file, or the config.json of a workdir; --config.FIELD=VALUE overrides a field.",
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


# The config file that takes a config.json for its argument.
_SAVED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config_saved.py:")


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; a mistake in them, or in the config file, is one line, not a traceback."""
  argv = [
    re.sub(r"^(--?config=|)(?=.+\.json$)", rf"\g<1>{_SAVED}", argument)
    if argument.startswith(("--config=", "-config=")) or before in ("--config", "-config")
    else argument
    for before, argument in zip(["", *argv], argv, strict=False)
  ]
  try:
    return flags.FLAGS(argv)
  except UserError as error:
    raise SystemExit(_fail(error)) from None
  except (AttributeError, KeyError) as error:
    # ml_collections suggests the right name, inside a twice quoted string.
    said = str(error).replace("\\", "").strip("'\"").replace("'nDid you", "; did you")
    raise SystemExit(_fail(f"--config.FIELD: there is no such field: {said}")) from None
  except (flags.Error, TypeError, ValueError, OSError) as error:
    raise SystemExit(_fail(_shortened(error))) from None
  except Exception as error:  # a config file is a program: it may raise anything
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
    raise SystemExit(
      _fail(
        f"--config: {_shortened(f'{type(error).__name__}: {error}')}{where}; expected a config file, "
        "as in configs/, or the config.json of a workdir"
      )
    ) from None


def _shortened(message: object) -> str:
  """A message that quotes what a person gave, however long that is."""
  text = str(message)
  return text if len(text) <= 600 else f"{text[:300]} … {text[-300:]}"


def _fail(message: object, status: int = 2) -> int:
  print(f"igpt_jax: {message}", file=sys.stderr)
  return status


def _trains(config) -> bool:
  return config.job in ("pretrain", "finetune") or (
    config.job == "probe" and config.probe.method == "sgd"
  )


def _join_processes(config) -> None:
  """Finds the other processes: TPU pods, GKE and SLURM are recognised, else JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES and JAX_PROCESS_ID say where they are."""
  import jax

  # It takes SIGTERM over. Training answers that by saving; other jobs are to end by it.
  jax.config.update("jax_enable_preemption_service", _trains(config))

  # `validate` asks for devices, and so comes later.
  seconds = config.host_seconds
  if not isinstance(seconds, int | float) or not 1 <= seconds <= 10**6:
    raise UserError(f"config.host_seconds: {seconds}; expected 1 to 1,000,000")
  environment = os.environ
  settings = {}
  if "JAX_COORDINATOR_ADDRESS" in environment and "JAX_PROCESS_ID" in environment:
    settings = {
      "num_processes": int(environment["JAX_NUM_PROCESSES"]),
      "process_id": int(environment["JAX_PROCESS_ID"]),
    }
  try:
    jax.distributed.initialize(
      **settings,
      heartbeat_timeout_seconds=int(seconds),
      shutdown_timeout_seconds=_WAIT_FOR_OTHERS_SECONDS,
    )
  except (ValueError, KeyError) as error:
    raise UserError(
      f"--distributed: no cluster was recognised ({error}); expected a TPU pod, GKE, SLURM, or "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; fix: set them, or leave "
      "--distributed out on one host"
    ) from None


def _leave(status: int) -> NoReturn:
  """Ends one of several processes after an error, with a status of its own.

  The interpreter's end would wait for the others, and they may be waiting for this one. So it waits
  just so long that all can say why they end; who is still at work then loses this one's heartbeat.
  """
  import jax

  farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  farewell.start()
  farewell.join(_WAIT_FOR_OTHERS_TO_FAIL_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  watchdog.end_workers()
  os._exit(status)


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    return _fail(f"unexpected argument {argv[1]!r}: every option begins with --")
  if _CONFIG.value is None:
    return _fail("--config: missing; expected a file, such as --config configs/quickstart.py")
  source = config_flags.get_config_filename(flags.FLAGS["config"])
  saved = source.startswith(_SAVED)
  source = source.removeprefix(_SAVED) if saved else source.split(":")[0]
  if not os.path.isfile(source):
    return _fail(f"--config: {source}: no such file; configs/ holds those of the project")
  config = _CONFIG.value
  logging.set_verbosity(logging.WARNING)  # the libraries' own chatter
  folder, name = os.path.split(source)
  own = folder or "." if saved else os.path.join("runs", os.path.splitext(name)[0])
  workdir = _WORKDIR.value or own
  try:
    if config.job not in JOBS:
      raise UserError(f"config.job: {config.job!r}; expected one of {', '.join(JOBS)}")
    from igpt_jax import config as config_lib
    from igpt_jax.parallel import hardware
    from igpt_jax.runner import goodput
    from igpt_jax.workspace import agreement, places

    with contextlib.ExitStack() as watched:
      if _DISTRIBUTED.value:
        # jax ends the process when it hears nothing from another one, in words of its own.
        lost = _LOST.format(config.host_seconds, ", or this one was killed")
        watched.enter_context(watchdog.last_words(f"igpt_jax: ended from outside: {lost}"))
        _join_processes(config)
      config_lib.validate(config)
      workdir = files.local("--workdir", workdir)
      places.check(config, workdir)
      hardware.check_platform()
      if _DISTRIBUTED.value:
        agreement.check_config(config_lib.as_json(config))
      job = importlib.import_module(f"igpt_jax.jobs.{config.job}")
      goodput.process_began(_BEGAN)
      # Other jobs may be right to say nothing for hours.
      hang_seconds = config.hang_seconds if _trains(config) else 0
      watched.enter_context(watchdog.Watchdog(hang_seconds, "hang_seconds"))
      job.run(config, workdir)
    return 0
  except UserError as error:
    status = _fail(error, error.status)
  except KeyboardInterrupt:
    status = 130
  except Exception as error:
    from igpt_jax.workspace import memory

    said = memory.in_words(error, config.job)
    if said is None and not _DISTRIBUTED.value:
      raise
    if said is None:
      traceback.print_exc()
    status = 1 if said is None else _fail(said)
    if _OF_OTHERS.search(str(error)):
      _fail(_LOST.format(config.host_seconds, ""))
  if _DISTRIBUTED.value:
    _leave(status)
  return status


if __name__ == "__main__":
  watchdog.tell_stacks()
  app.run(main, flags_parser=_parse_flags)
