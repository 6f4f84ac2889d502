"""Commands that install the packages of an extra of setup.py. Ground floor: imports nothing of the project.

The project is in no index, so an extra has no name to install: a checkout is installed again with it,
and beside a wheel the packages themselves are.
"""

import importlib.metadata
import pathlib
import shlex

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def in_checkout() -> bool:
  """Returns True if this is the package of a checkout, False if it is an installed wheel's."""
  return (CHECKOUT / "setup.py").is_file()


def install(extra: str) -> str:
  """Returns the command that installs what an extra needs, for messages: "pip install …"."""
  if in_checkout():
    target = "." if pathlib.Path.cwd() == CHECKOUT else str(CHECKOUT)
    return f"pip install -e {shlex.quote(f'{target}[{extra}]')}"
  try:
    return f"pip install {shlex.join(_requirements(extra))}"
  except importlib.metadata.PackageNotFoundError:  # the package was copied, not installed
    return f"install what the extra {extra} of igpt_jax's setup.py lists"


def _requirements(extra: str) -> list[str]:
  """Returns the packages of an extra, with their versions, from what the installed package says."""
  listed = [line.partition(";") for line in importlib.metadata.requires("igpt_jax") or ()]
  return [package.strip() for package, _, when in listed if f'extra == "{extra}"' in when]
