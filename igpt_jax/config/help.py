"""What --help prints: the jobs, and the settings that a job reads; made of the declarations."""

import textwrap

from igpt_jax.config.declare import JOBS, Declaration
from igpt_jax.config.fields import FIELDS

_WIDTH = 100


def of_program() -> str:
  """How the program is called, and a line for each job."""
  width = max(map(len, JOBS))
  lines = [f"  {name:{width}}  {line}" for name, line in JOBS.items()]
  return "\n".join(
    [
      "python -m igpt_jax.main --config FILE [--workdir DIR] [--config.SETTING=VALUE …]",
      "",
      "FILE is a config file, as in configs/, or the config.json of a workdir. --config.job names a job:",
      "",
      *lines,
      "",
      "--config.job=NAME --help lists the settings that a job reads.",
    ]
  )


def of_job(job: str) -> str:
  """Name, default, meaning and bounds of every setting that the job reads."""
  lines = [f"{job}: {JOBS[job]}", ""]
  for name, declaration in FIELDS.items():
    if job in declaration.jobs and name != "job":
      lines.append(f"  --config.{name}={declaration.default!r}")
      lines += textwrap.wrap(
        _meaning(declaration), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
      )
  return "\n".join(lines)


def _meaning(declaration: Declaration) -> str:
  expected = declaration.expected()
  if not expected or (
    declaration.choices and all(str(c) in declaration.meaning for c in declaration.choices)
  ):
    return declaration.meaning
  return f"{declaration.meaning} ({expected})"
