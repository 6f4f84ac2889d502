"""Files named by `config.complete.images`: one, a glob, or a folder with or without classes."""

import collections
import glob
import itertools
import os
import unicodedata
from typing import NamedTuple

from igpt_jax.data import image_files
from igpt_jax.errors import UserError
from igpt_jax.parallel.hosts import say

# Files that job `complete` writes beside its images' folders, and their unfinished versions.
_RESERVED = frozenset(
  name + partial
  for name in ("grid.png", "complete.json", "settings.json")
  for partial in ("", ".partial")
)


class File(NamedTuple):
  """An image file to read."""

  path: str
  group: str  # name of its class; "" where there are none
  name: str  # name of its results, unique within the group


def find(images: str) -> list[File]:
  """Lists the files in order of their names, class by class.

  Args:
    images: a file; a glob ("my/*.jpg", quoted, so that the shell leaves it alone; ** is any depth);
      or a folder, of images or of folders of images: then each of those is a class.

  Raises:
    UserError: there are no images.
  """
  path = os.path.expanduser(images)
  if os.path.isfile(path):
    return _named([(path, "")])
  if os.path.isdir(path):
    paths, left_out = _in_folder(path)
  else:
    paths, left_out = _matching(path)
    if not paths and not left_out:
      where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
      raise UserError(
        f"config.complete.images: {images!r} matches no file{where}; expected a file, a folder, or a "
        "glob in quotes, such as 'my/*.jpg'"
      )
  others = f"left out {image_files.in_words(left_out)}" if left_out else ""
  if not paths:
    raise UserError(
      f"config.complete.images: {images} holds no images; expected *.jpg or CLASS/*.jpg in it"
      + (f"; {others}" if others else "")
    )
  if others:
    say(f"config.complete.images: {others}")
  return _named(paths)


def _in_folder(root: str) -> tuple[list[tuple[str, str]], dict[str, str]]:
  """Returns a folder's images, then those of its folders at any depth; and what is left out, and why."""
  try:
    folders, images, left_out = image_files.scan(root)
  except OSError as error:
    raise UserError(
      f"config.complete.images: {root}: {error.strerror}; expected a folder that can be read"
    ) from None
  paths = [(os.path.join(root, name), "") for name in images]
  for folder in folders:
    images, others = image_files.find(os.path.join(root, folder))
    paths += [(os.path.join(root, folder, name), folder) for name in images]
    left_out |= {os.path.join(folder, name): why for name, why in others.items()}
  return paths, left_out


def _matching(pattern: str) -> tuple[list[tuple[str, str]], dict[str, str]]:
  """Returns the images that a glob matches; and what is left out, and why."""
  paths, left_out = [], {}
  for path in sorted(glob.glob(pattern, recursive=True)):
    if os.path.isfile(path) and not image_files.is_leftover(os.path.basename(path)):
      why = image_files.why_not(path)
      if why is None:
        paths.append((path, ""))
      else:
        left_out[path] = why
  return paths, left_out


def _named(paths: list[tuple[str, str]]) -> list[File]:
  """Gives the results unique names: the file's stem, its whole name, or that with a number.

  The names also differ from the job's own files and from the folders of classes.
  """
  taken = collections.defaultdict(lambda: set(_RESERVED))

  def first_free(folder: str, *names: str) -> str:
    numbered = (f"{names[-1]}-{i}" for i in itertools.count(2))
    name = next(n for n in itertools.chain(names, numbered) if _plain(n) not in taken[folder])
    taken[folder].add(_plain(name))
    return name

  groups = {name: name and first_free("", name) for name in dict.fromkeys(g for _, g in paths)}
  files = []
  for path, group in paths:
    base = os.path.basename(path)
    name = first_free(groups[group], os.path.splitext(base)[0], base)
    files.append(File(path, groups[group], name))
  return files


def _plain(name: str) -> str:
  """Normalises names that some file systems treat as equal: Cat and cat, é as one or two characters."""
  return unicodedata.normalize("NFC", name).casefold()
