"""A folder of images as records, and the folder of a stored split: CLASS/**/*.jpg, or *.jpg without labels.

`photos` opens folders without splits.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from igpt_jax import errors
from igpt_jax.data import digests, image_decoding, image_files
from igpt_jax.files import printable
from igpt_jax.reporting.progress import Countdown

_LOG = logging.getLogger(__name__)
_opened: dict[
  pathlib.Path, np.ndarray
] = {}  # the digests' first 64 bits of every split opened, sorted


@functools.cache  # a folder is opened once for each of its splits, and by every job
def say_once(message: str) -> None:
  """Prints a message, the first time that it is called with it, in the main process alone."""
  from igpt_jax.parallel import hosts  # imports jax, which reading records doesn't need

  hosts.say(message)


class FolderRecords:
  """Image files of one folder, in an order that doesn't depend on the folder's path.

  Attributes:
    class_names: names of the classes in the order of labels; empty if images have no class folders.
    name, identity, former_name: as in `sources.Records`; from names, labels and contents alone.
  """

  name = "folder"

  def __init__(
    self,
    root: str | os.PathLike[str],
    files: Sequence[tuple[str, int]],
    class_names: Sequence[str],
    contents: Sequence[str],
  ):
    """Puts files into the records' order.

    Args:
      root: the folder.
      files: path below the folder and label (-1 if none) of every image, sorted by path.
      class_names: names of the classes in the order of labels.
      contents: digests of the files, from `digests.of_files`.
    """
    self._root = os.fspath(root)
    self.class_names = tuple(class_names)
    # Sorted by name, records would come class after class; shuffled, any stretch of them is a mixture.
    order = np.random.default_rng(0).permutation(len(files))
    self._files = [files[i] for i in order]
    self.identity = digests.combined(
      (image_files.canonical(name), label, content)
      for (name, label), content in zip(files, contents, strict=True)
    )
    names = "\n".join(name for name, _ in files).encode("utf-8", "surrogateescape")
    self.former_name = f"folder:{hashlib.sha256(names).hexdigest()[:12]}"

  @property
  def paths(self) -> list[str]:
    """Paths of the images below the folder, in the order of the records."""
    return [name for name, _ in self._files]

  def label(self, index: int) -> int:
    """Returns a record's label without reading its file."""
    return self._files[index][1]

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    name, label = self._files[index]
    path = os.path.join(self._root, name)
    shown = printable(path)
    try:
      return {"image": pathlib.Path(path).read_bytes(), "label": label, "id": shown}
    except OSError as error:
      raise image_decoding.BadRecord(f"{shown}: {error.strerror}") from error


def open_stored(
  root: pathlib.Path, class_names: Sequence[str] | None = None, verify: bool = False
) -> FolderRecords:
  """Opens the folder of a stored split: CLASS/**/*.jpg, or *.jpg without labels.

  Args:
    root: the split's folder.
    class_names: names in the order of labels, from `class_folders`; None: the folder's own.
    verify: read every file, even if it hasn't changed since it was read.

  Raises:
    UserError: no images, a class that isn't in `class_names`, or images beside class folders.
  """
  folders, loose, left_out = _scan(root)
  if folders and loose:
    raise errors.UserError(
      f"data.path {root}: has both class folders ({next(iter(folders))}, …) and loose images "
      f"({printable(loose[0])}, …); expected one kind; fix: move the loose ones into a "
      "class folder"
    )
  class_names = tuple(folders if class_names is None else class_names)
  strangers = [name for name in folders if name not in class_names]
  if strangers:
    raise errors.UserError(
      f"data.path {root}: class {strangers[0]!r} is not among train's; expected its "
      f"{len(class_names)} classes"
    )
  labels = {name: label for label, name in enumerate(class_names)}
  files = [(name, -1) for name in loose]
  clock = Countdown(f"{root}: class folders listed", len(folders), _LOG.warning)
  for n_listed, (name, folder) in enumerate(folders.items(), 1):
    images, others = image_files.find(os.path.join(root, folder))
    files += [(os.path.join(folder, image), labels[name]) for image in images]
    left_out |= {os.path.join(folder, other): why for other, why in others.items()}
    if not images and not others:
      left_out[folder] = "a class without an image"
    clock.tick(n_listed)
    digests.beat()
  if not files:
    raise errors.UserError(
      f"data.path {root}: holds no images; expected CLASS/*.jpg or *.jpg"
      + (f"; left out {image_files.in_words(left_out)}" if left_out else "")
    )
  if left_out:
    say_once(f"{root}: left out {image_files.in_words(left_out)}")
  path = os.path.abspath(root)
  contents = digests.of_files([os.path.join(path, name) for name, _ in files], path, verify)
  _tell_images_in_both(pathlib.Path(path), contents)
  return FolderRecords(root, files, class_names, contents)


def _tell_images_in_both(folder: pathlib.Path, contents: Sequence[str]) -> None:
  """Says how many images are also in another split of the data, if this process has opened both."""
  ours = [int(content[:16], 16) for content in contents if content != digests.UNREADABLE]
  _opened[folder] = np.unique(np.array(ours, np.uint64))
  for other in _opened:
    if other != folder and other.parent == folder.parent:
      n_same = len(np.intersect1d(_opened[folder], _opened[other], assume_unique=True))
      one, two = sorted((folder.name, other.name))
      if n_same:
        say_once(
          f"{folder.parent}: {n_same:,} images of {one}/ are in {two}/, too; fix: remove them from one"
        )


def class_folders(root: pathlib.Path) -> list[str]:
  """Returns the names of the classes in the order of their labels.

  Raises:
    UserError: two folders have the same name, or the root can't be read.
  """
  return list(_scan(root)[0])


def _scan(root: pathlib.Path) -> tuple[dict[str, str], list[str], dict[str, str]]:
  """Returns the folder of every class, the images beside them, and the reason for every file left out."""
  try:
    folders, loose, left_out = image_files.scan(os.fspath(root))
  except OSError as error:
    raise errors.UserError(
      f"data.path {root}: {error.strerror}; expected a folder of images that can be read"
    ) from None
  classes: dict[str, str] = {}
  for folder in folders:
    name = printable(image_files.canonical(folder))
    if name in classes:
      raise errors.UserError(
        f"data.path {root}: two folders are called {name!r} ({classes[name]!a} and {folder!a}: one "
        "accent, written in two ways); expected one for each class; fix: put them together"
      )
    classes[name] = folder
  return classes, loose, left_out
