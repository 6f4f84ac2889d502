"""Which files a person means by `config.images`: one, a glob, or a folder with or without classes."""

import collections
import glob
import itertools
import os
import pathlib
import unicodedata
from typing import NamedTuple

from igpt_jax.data.sources import PICTURE_SUFFIXES
from igpt_jax.errors import UserError

# What job `complete` writes beside the folders of its images, whole or not yet.
_RESERVED = frozenset(
  name + partial
  for name in ("grid.png", "complete.json", "settings.json")
  for partial in ("", ".partial")
)


class File(NamedTuple):
  """One picture to read.

  Attributes:
    path: of the file.
    group: name of its class; "" where there are none.
    name: what its results are called; no two of a group share one.
  """

  path: str
  group: str
  name: str


def find(images: str) -> list[File]:
  """Files in order of their names, class after class.

  Args:
    images: a file; a glob ("my/*.jpg", quoted, so that the shell leaves it alone; ** is any depth);
      or a folder, of pictures or of folders of pictures: then each of those is a class.

  Raises:
    UserError: there are none.
  """
  path = os.path.expanduser(images)
  if os.path.isfile(path):
    return _named([(path, "")])
  if os.path.isdir(path):
    found = _in_folder(pathlib.Path(path))
    if not found:
      raise UserError(
        f"config.images: {images} holds no pictures; expected *.jpg or CLASS/*.jpg in it "
        f"({', '.join(sorted(PICTURE_SUFFIXES))})"
      )
    return _named(found)
  matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
  if not matches:
    raise UserError(
      f"config.images: {images!r} matches no file in {os.getcwd()}; expected a file, a folder, or a "
      "glob in quotes, such as 'my/*.jpg'"
    )
  return _named([(match, "") for match in matches])


def _in_folder(root: pathlib.Path) -> list[tuple[str, str]]:
  """Its own pictures, then those of its folders."""
  found = [(path, "") for path in _pictures(root)]
  folders = (each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
  for folder in sorted(folders):
    found += [(path, folder.name) for path in _pictures(folder)]
  return found


def _pictures(folder: pathlib.Path) -> list[str]:
  return sorted(
    str(path)
    for path in folder.iterdir()
    if not path.name.startswith(".") and path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
  )


def _named(found: list[tuple[str, str]]) -> list[File]:
  """With names that differ: a file's own, its whole name, or that with a number.

  They differ from what else lies beside them, too: the job's own files, and folders of classes.
  """
  taken = collections.defaultdict(lambda: set(_RESERVED))

  def first_free(folder: str, *names: str) -> str:
    numbered = (f"{names[-1]}-{i}" for i in itertools.count(2))
    name = next(n for n in itertools.chain(names, numbered) if _plain(n) not in taken[folder])
    taken[folder].add(_plain(name))
    return name

  groups = {name: name and first_free("", name) for name in dict.fromkeys(g for _, g in found)}
  files = []
  for path, group in found:
    base = os.path.basename(path)
    name = first_free(groups[group], os.path.splitext(base)[0], base)
    files.append(File(path, groups[group], name))
  return files


def _plain(name: str) -> str:
  """One for all names that some disk doesn't tell apart: Cat and cat, é in one character or two."""
  return unicodedata.normalize("NFC", name).casefold()
