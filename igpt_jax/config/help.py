"""The text of --help and docs/settings.md, from the declarations of jobs and settings.

python -m igpt_jax.config.help > docs/settings.md
"""

import dataclasses
import inspect
import textwrap
from collections.abc import Iterable

from igpt_jax.config import named
from igpt_jax.config.declare import JOBS, Declaration, Group, declarations
from igpt_jax.config.fields import FIELDS, Settings

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
    "--check reads a job's settings and ends; --check=v5litepod-16 also for that TPU slice; --check=machine",
    "opens the data, palette, checkpoint and workdir.",
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


_PAGE = """# Settings

Written by `python -m igpt_jax.config.help` from the declarations in `igpt_jax/config/fields.py`,
`igpt_jax/config/run_fields.py` and `igpt_jax/config/job_fields.py`, and checked by a test: change those and run it
again, not this page.

Each setting is given as `--config.NAME=VALUE`, or set in a config file as `config.NAME = VALUE`. `0` and `''` leave a
choice to the preset, the data or the checkpoint, as the meaning says. "Fixed" names the runs that a setting decides
the numbers of: such a run can't be resumed with another value. `--config.job=NAME --help` lists what one job reads."""

_FIXED = {
  "nothing": "", "run": "every run", "pretraining": "pretraining", "finetuning": "fine-tuning"
}  # fmt: skip


def of_all() -> str:
  """Returns docs/settings.md: a table of settings for each group."""
  groups = [
    type(field.default)
    for field in dataclasses.fields(Settings)
    if isinstance(field.default, Group)
  ]
  root = {name: declaration for name, declaration in FIELDS.items() if "." not in name}
  parts = [_PAGE, _section("The whole program", "Settings that belong to no group.", root)]
  for group in sorted(groups, key=lambda group: group.prefix):
    parts.append(
      _section(f"`{group.prefix}*`", inspect.getdoc(group) or "", dict(declarations(group)))
    )
  return "\n\n".join(parts)


def _section(title: str, text: str, settings: dict[str, Declaration]) -> str:
  rows = ["| setting | default | meaning | read by | fixed |", "|---|---|---|---|---|"]
  for name, declaration in settings.items():
    cells = (
      f"`{name}`",
      f"`{declaration.default!r}`",
      _meaning(declaration).replace("|", "\\|"),
      _jobs(declaration.jobs),
      _FIXED[declaration.decides],
    )
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join((f"## {title}", "", text, "", *rows))


def _jobs(jobs: Iterable[str]) -> str:
  """Returns the jobs' names, or those that are missing where these are fewer."""
  missing = [job for job in JOBS if job not in jobs]
  read = [job for job in JOBS if job in jobs]
  if len(read) <= len(missing):
    return ", ".join(read)
  return f"all but {', '.join(missing)}" if missing else "all"


if __name__ == "__main__":
  print(of_all())
