"""Files that appear whole or not at all. Ground floor: imports nothing of the project."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
  """Gives a path to write to, beside `path`, and moves it there when the block ends well.

  A reader sees the old file or the new one; after an error the old one stays.
  """
  partial = f"{os.fspath(path)}.partial"
  try:
    yield partial
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
    raise
  os.replace(partial, path)
