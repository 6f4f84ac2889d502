"""The text of --help: the jobs, and the settings that a job reads, from their declarations."""

import textwrap

from igpt_jax.config import named
from igpt_jax.config.declare import JOBS, Declaration
from igpt_jax.config.fields import FIELDS

_WIDTH = 100


def of_program() -> str:
  """Returns the usage, with a line for each job."""
  width = max(map(len, JOBS))
  lines = (f"  {name:{width}}  {line}" for name, line in JOBS.items())
  return "\n".join((
    "igpt_jax --config FILE [--workdir DIR] [--config.SETTING=VALUE …]", "",
    "FILE is a config file, the name of one of the project's, or the config.json of a workdir; without",
    "--config it is DIR/config.json. --config.job names a job:",
    "", *lines, "", "--config.job=NAME --help lists the settings that a job reads. --version prints the version.",
    "", textwrap.fill(f"The project's configs: {', '.join(named.names())}", _WIDTH),
  ))  # fmt: skip


def of_job(job: str) -> str:
  """Returns name, default, meaning and bounds of every setting that the job reads."""
  lines = [f"{job}: {JOBS[job]}", ""]
  for name, declaration in FIELDS.items():
    if job in declaration.jobs and name != "job":
      lines.append(f"  --config.{name}={declaration.default!r}")
      lines.append(textwrap.indent(textwrap.fill(_meaning(declaration), _WIDTH - 6), " " * 6))
  return "\n".join(lines)


def _meaning(declaration: Declaration) -> str:
  meaning, choices = declaration.meaning, declaration.choices
  if choices and all(str(choice) in meaning for choice in choices):
    return meaning
  expected = declaration.expected()
  return f"{meaning} ({expected})" if expected else meaning
