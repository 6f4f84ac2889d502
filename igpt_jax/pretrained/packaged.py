"""The model that comes with this package, so that there is something to try before training.

`checkpoint.one_file` reads it, like any other model in one file; assets/README.md has its origin.
"""

import pathlib

from igpt_jax.errors import UserError

NAME = "packaged"  # stands for it wherever a checkpoint is named
FILE = pathlib.Path(__file__).parent / "assets" / "cifar10_16.safetensors"


def path() -> str:
  """Returns the path of its file.

  Raises:
    UserError: this installation lacks it.
  """
  if not FILE.is_file():
    raise UserError(
      f"checkpoint: {NAME}: this installation lacks {FILE}; fix: install igpt_jax again, or name a "
      "checkpoint, such as runs/quickstart or openai/imagegpt-small (photos: --config.sizing.packaged=False)"
    )
  return str(FILE)
