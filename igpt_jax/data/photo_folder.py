"""A folder of photos without splits: training, validation and test images are drawn from it by contents.

Images lie in it in any way: side by side, in albums at any depth, or in one folder for each class. Every
image is read once, the first time that the folder is opened: damaged ones are left out, and those of
nearly one colour, and copies, are told. What was found is cached by contents.
"""

from __future__ import annotations

import bisect
import os
import pathlib
from collections.abc import Sequence, Set

import numpy as np

from igpt_jax import errors, units
from igpt_jax.data import digests, image_decoding, image_files, own_images
from igpt_jax.data.folder import FolderRecords, say_once
from igpt_jax.files import printable

MIN_IMAGES = 20  # different ones
TEST_FOLDERS = ("test", "val", "validation")  # the first that exists is the stored test split
SPLIT_FOLDERS = ("train", *TEST_FOLDERS)

_TEST_SHARE = 0.1
_MIN_HELD_OUT = 3  # different images, in validation and in test

_FINE, _PLAIN = "fine", "plain"  # what `_look` finds of an image that can be read
_LOOKED_AT = 64  # shorter side at which a JPEG is looked at, in pixels
_SAME_LEVELS, _SAME_SHARE = 12, 0.99  # an image is plain if this share of it is within these levels


def has_splits(root: pathlib.Path, validation_split: str = "", also: str = "") -> bool:
  """Returns True if a folder holds stored splits: `validation_split` says so, or its folders' names do.

  Args:
    root: the folder.
    validation_split: the setting of that name.
    also: a folder in it that counts as if it held images.
  """
  if validation_split:
    return True
  names = _holding(root) | ({also} if also else set())
  return _are_splits(names) and not _misnamed(names)


def tell_left_out(root: pathlib.Path, validation_split: str) -> None:
  """Tells, once, what lies beside the stored splits and isn't read."""
  splits = {*SPLIT_FOLDERS, validation_split} - {""}
  names = _holding(root)
  if others := names - splits:
    say_once(
      f"{root}: stored splits {_in_words(names & splits)}; left out {_in_words(others)} beside them"
    )


def open_photos(
  root: pathlib.Path, validation: float, verify: bool = False
) -> tuple[FolderRecords, dict[str, np.ndarray]]:
  """Opens a folder without splits.

  Args:
    root: the folder.
    validation: share of the images outside of test that is held out of training.
    verify: read every file, even if it hasn't changed since it was read.

  Returns:
    All images that can be read, and the indices of each split's, int32 [n], from `draw`. Labels are the
    first folders in which images differ, if every image lies in one and there are two or more.

  Raises:
    UserError: no such folder, stored splits deeper in it, or fewer than MIN_IMAGES different images.
  """
  paths, left_out = _find(root)
  _check_no_splits(root, paths)  # before they are read
  absolute = os.path.abspath(root)
  files = [os.path.join(absolute, path) for path in paths]
  contents = digests.of_files(files, absolute, verify)
  found = digests.of_contents(_look, files, contents, f"{absolute}: images looked at")
  kept, plain = [], []
  for path, content, finding in zip(paths, contents, found, strict=True):
    is_readable = finding in (_FINE, _PLAIN)
    if not is_readable or content == digests.UNREADABLE:
      left_out[path] = "unreadable once" if is_readable else finding
      continue
    kept.append((path, content))
    if finding == _PLAIN:
      plain.append(path)
  first: dict[str, str] = {}  # path of the first image with each contents
  copies = [path for path, content in kept if first.setdefault(content, path) != path]
  said = f"; left out {image_files.in_words(left_out)}" if left_out else ""
  if len(first) < MIN_IMAGES:
    same = f" ({len(copies):,} more are copies)" if copies else ""
    raise errors.UserError(
      f"data.path {root}: holds {len(first)} different images{same}; expected {MIN_IMAGES} or more to "
      f"divide into train, validation and test; fix: more images, or {root / 'test'} to evaluate on "
      f"these{said}"
    )
  class_names, labels = _classes([path for path, _ in kept])
  records = FolderRecords(
    root,
    [(path, label) for (path, _), label in zip(kept, labels, strict=True)],
    class_names,
    [content for _, content in kept],
  )
  by_path = dict(kept)
  parts = draw([by_path[path] for path in records.paths], validation)
  _tell(root, records, parts, left_out, copies, plain)
  return records, parts


def draw(contents: Sequence[str], validation: float) -> dict[str, np.ndarray]:
  """Draws splits by the digests of images' contents; returns the indices of each split's, int32 [n].

  A digest is a place between 0 and 1 that nothing but the image decides: those below 0.1 are test, the
  next, up to a share of `validation` of the rest, are validation, the others train. So copies of an
  image are in one split, whatever they are called, and an image that is added or removed moves no other.
  The one exception is a small folder: the 3 different images with the lowest places are test, and the
  next 3 validation (if it is wanted), wherever they are. There an added image may move others, but only
  away from test, towards train: what a model was trained on is never held out later.
  """
  distinct = sorted(set(contents))  # in the order of their places: digests have equal lengths
  places = [int(content, 16) / 16 ** len(content) for content in distinct]
  n_test = max(_MIN_HELD_OUT, bisect.bisect_left(places, _TEST_SHARE))
  n_held_out = n_test
  if validation:
    below = bisect.bisect_left(places, _TEST_SHARE + (1 - _TEST_SHARE) * validation)
    n_held_out = max(n_test + _MIN_HELD_OUT, below)
  ranks = {content: rank for rank, content in enumerate(distinct)}
  numbers = np.digitize([ranks[content] for content in contents], [n_test, n_held_out])
  return {
    name: np.flatnonzero(numbers == number).astype(np.int32)
    for number, name in enumerate(("test", "validation", "train"))
  }


def _find(root: pathlib.Path) -> tuple[list[str], dict[str, str]]:
  """Returns `image_files.find` of a folder that can be read and holds an image."""
  if not os.path.isdir(root):  # unlike pathlib's, no error where it may not be asked
    why = "is a file" if os.path.exists(root) else "no such folder"
    raise errors.UserError(f"data.path {root}: {why}; expected a folder of images")
  paths, left_out = image_files.find(os.fspath(root))
  if "." in left_out:
    raise errors.UserError(
      f"data.path {root}: {left_out['.']}; expected a folder of images that can be read"
    )
  if not paths:
    said = f"; left out {image_files.in_words(left_out)}" if left_out else ""
    raise errors.UserError(f"data.path {root}: holds no images; expected a folder of images{said}")
  return paths, left_out


# --- classes ---------------------------------------------------------------------------------------


def _first_folders(paths: Sequence[str]) -> tuple[str, list[str]]:
  """Returns the deepest folder that all images lie in, and below it each one's first folder, "" if none."""
  common = os.path.commonpath([os.path.dirname(path) for path in paths])
  above = os.path.join(common, "") if common else ""
  return above, [path[len(above) :].rpartition(os.sep)[0].split(os.sep)[0] for path in paths]


def _holding(root: pathlib.Path) -> set[str]:
  """Returns the folders in `root` that hold an image, and "" if one lies beside them.

  They are looked at only if one is called as a split is. A train/ counts without an image, too: opening
  it says what it holds instead.
  """
  try:
    folders, images, _ = image_files.scan(os.fspath(root))
  except OSError:  # whoever opens it says why
    return set()
  if not any(name.lower() in SPLIT_FOLDERS for name in folders):
    return set()
  beside = {""} if images else set()
  return beside | {
    name for name in folders if name == "train" or image_files.holds_image(os.path.join(root, name))
  }


def _are_splits(names: Set[str]) -> bool:
  """Returns True if folders that lie side by side are splits, in whichever case their names are written.

  A train/ beside cats/, or a Test/ beside photos, is a class or an album like any other; but where train/
  and test/ are both there, they are splits, whatever lies beside them.

  Args:
    names: those that hold images; "" stands for images beside them.
  """
  splits = {name for name in names if name.lower() in SPLIT_FOLDERS}
  if splits == names:
    return bool(splits)
  kinds = {name.lower() for name in splits}
  return "train" in kinds and (len(kinds) > 1 or names == {"train", ""})


def _misnamed(names: Set[str]) -> list[str]:
  """Returns splits whose names are in another case; [] where train/ and a test split are named well."""
  exact = names & set(SPLIT_FOLDERS)
  if "train" in exact and len(exact) > 1:
    return []
  return sorted(name for name in names - exact if name.lower() in SPLIT_FOLDERS)


def _check_no_splits(root: pathlib.Path, paths: Sequence[str]) -> None:
  """Raises UserError if folders are splits, which lie deeper than `root` or are written in another way.

  Folders that are called like splits, and are none, are told.
  """
  above, folders = _first_folders(paths)
  names, where = set(folders), root / above
  splits = {name for name in names if name.lower() in SPLIT_FOLDERS}
  if not _are_splits(names):
    if splits:
      say_once(
        f"{where}: no stored splits, though there is {_in_words(splits)}: {_in_words(names - splits)} beside "
        "(splits would be train/ and test/)"
      )
    return
  misnamed = _misnamed(names)
  name = next(iter(misnamed), min(splits))
  raise errors.UserError(
    f"data.path {root}: its images lie in {printable(where / name)}; expected splits in "
    f"{root / name.lower()}; fix: "
    + (f"rename it to {name.lower()}" if misnamed else f"--config.data.path={where}")
  )


def _classes(paths: Sequence[str]) -> tuple[list[str], list[int]]:
  """Returns the classes' names in the order of labels, and every image's label; [] and -1 if there are none."""
  # The name of an é that is written in two ways is one.
  folders = [printable(image_files.canonical(name)) for name in _first_folders(paths)[1]]
  names = sorted(set(folders))
  if "" in names or len(names) < 2:
    return [], [-1] * len(paths)
  numbers = {name: label for label, name in enumerate(names)}
  return names, [numbers[name] for name in folders]


# --- what is found ---------------------------------------------------------------------------------


def _look(path: str) -> str:
  """Returns _FINE or _PLAIN for an image that can be read, else the reason why it can't."""
  try:
    image = own_images.read(pathlib.Path(path).read_bytes(), path, _LOOKED_AT)
  except OSError as error:
    return f"unreadable: {error.strerror}"
  except image_decoding.BadRecord as error:
    return str(error).removeprefix(f"{path}: ")
  step = max(1, min(image.shape[:2]) // _LOOKED_AT)
  pixels = image[::step, ::step].reshape(-1, 3).astype(np.int16)
  same = np.abs(pixels - np.median(pixels, axis=0)).max(axis=1) <= _SAME_LEVELS
  return _PLAIN if same.mean() >= _SAME_SHARE else _FINE


def _tell(
  root: pathlib.Path,
  records: FolderRecords,
  parts: dict[str, np.ndarray],
  left_out: dict[str, str],
  copies: Sequence[str],
  plain: Sequence[str],
) -> None:
  """Tells, once, how many images there are of every kind."""
  classes = f"{len(records.class_names)} classes" if records.class_names else "no classes"
  sizes = ", ".join(f"{len(parts[name]):,} {name}" for name in ("train", "validation", "test"))
  say_once(f"{root}: {len(records):,} images, {classes}, divided by contents: {sizes}")
  if left_out:
    say_once(f"{root}: left out {image_files.in_words(left_out)}")
  if copies:
    say_once(
      f"{root}: {_counted(copies)} equal to another ({_some(copies)}): in the same split, and counted "
      "twice; fix: remove the copies"
    )
  if plain:
    say_once(f"{root}: {_counted(plain)} nearly one colour ({_some(plain)})")


def _in_words(names: Set[str]) -> str:
  """Returns folders in words; "" stands for images that lie beside them."""
  return units.some_of([f"{printable(name)}/" if name else "images" for name in sorted(names)])


def _counted(paths: Sequence[str]) -> str:
  return f"{units.counted(len(paths), 'image')} {'are' if len(paths) > 1 else 'is'}"


def _some(paths: Sequence[str]) -> str:
  return units.some_of([printable(path) for path in paths])
