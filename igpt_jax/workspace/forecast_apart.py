"""Job compile in a process of its own: this one's compiler is that of the TPUs that are attached."""

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from igpt_jax import files, history
from igpt_jax.config.fields import Settings, as_json
from igpt_jax.errors import UserError
from igpt_jax.reporting import summary

_children: list[subprocess.Popen] = []


def end() -> None:
  """Ends the job that runs, if one does: this process is about to end."""
  for child in list(_children):
    child.kill()


class OutOfTime(Exception):
  """The time was over before the job had ended."""


def run_job(settings: Settings, until: float) -> dict[str, Any]:
  """Returns the contents of compile.json.

  Args:
    settings: those of job compile.
    until: time (`time.monotonic`) at which it is ended.

  Raises:
    UserError: the job failed.
    OutOfTime: it was ended.
  """
  # It mustn't look for the TPUs that this process has.
  environment = {
    name: value
    for name, value in os.environ.items()
    if name == "TPU_LIBRARY_PATH" or not name.startswith(("TPU_", "MEGASCALE_"))
  }
  with tempfile.TemporaryDirectory(prefix="igpt_jax_") as folder:
    config = os.path.join(folder, "config.json")
    summary.write_json(config, {history.KEY: history.FORMAT, **as_json(settings)})
    with subprocess.Popen(
      [sys.executable, "-m", "igpt_jax.main", f"--config={config}", f"--workdir={folder}"],
      env=environment | {"JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    ) as child:
      _children.append(child)
      try:
        _, errors = child.communicate(timeout=max(until - time.monotonic(), 1.0))
      except subprocess.TimeoutExpired:
        raise OutOfTime from None
      finally:
        child.kill()  # no effect on one that has ended
        _children.remove(child)
    if child.returncode:
      last = (errors.strip().splitlines() or ["nothing was said"])[-1]
      raise UserError(
        f"forecast: job compile ended with status {child.returncode}: {last}; expected 0"
      )
    return files.read_json(os.path.join(folder, "compile.json"))
