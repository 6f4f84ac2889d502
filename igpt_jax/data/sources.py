"""Opens data sets by name: splits of records that can be read in any order.

Folders of images (`folder`) and files of tokens need no library; `tfds_source` reads everything else.
Records aren't decoded here; order, augmentation and batches belong to `pipeline`.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from igpt_jax import errors, files, scratch, units
from igpt_jax.config.run_fields import DataConfig
from igpt_jax.data import bucket_folders, digests, photo_folder
from igpt_jax.data.folder import FolderRecords, class_folders, open_stored, say_once
from igpt_jax.data.photo_folder import TEST_FOLDERS

SPLITS = ("train", "validation", "test")


class Records(Protocol):
  """All records of one stored split. Picklable, for worker processes."""

  name: str  # data set and version, for messages
  identity: str  # digest of contents and labels, the same wherever they are stored
  former_name: str  # what 0.1.0 put into a fingerprint in place of both
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Split:
  """A random-access view of records.

  `split[i]` is a dict of `label` (int, -1 if none), `id` (str, the record's name in messages), and
  either `image` (encoded bytes, or a uint8 array) or `tokens` (integer [T]).

  Attributes:
    name: train, validation or test.
    n_classes: number of labels, 0 if there are none.
    class_names: n_classes names.
    indices: int32 [n], indices of the split's records among all stored ones.
    fingerprint: data set, split, number of records, and a digest of their indices and contents. It
      identifies the data in checkpoints, features and results; the same on every host.
    former_fingerprint: fingerprint in checkpoints of 0.1.0, without contents.
  """

  def __init__(self, records: Records, indices: np.ndarray, name: str):
    self.records = records
    self.name = name
    self.class_names = tuple(records.class_names)
    self.n_classes = len(self.class_names)
    part = f"{name}[{len(indices)} of {len(records)}]"
    chosen = hashlib.sha256(np.asarray(indices, "<i4").tobytes()).hexdigest()
    digest = digests.combined([(records.identity, chosen)])
    self.fingerprint = f"{records.name} {part} {digest}"
    self.former_fingerprint = f"{records.former_name} {part}"
    self.indices = indices

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f"{index} is not in 0..{len(self) - 1}")
    return self.records[int(self.indices[index])]

  def label(self, index: int) -> int:
    """Returns a record's label; raises BadRecord if it can't be read."""
    records, stored = self.records, int(self.indices[index])
    return records.label(stored) if isinstance(records, FolderRecords) else records[stored]["label"]

  def select(self, indices: np.ndarray) -> Split:
    """Returns a split of the records at these indices of this one, in this order."""
    return Split(self.records, self.indices[np.asarray(indices)], self.name)

  @property
  def is_tokens(self) -> bool:
    """True if records are tokens, which need neither decoding nor a palette."""
    return isinstance(self.records, TokenRecords)

  @property
  def max_token(self) -> int:
    """The largest token of all stored records; -1 if records are images."""
    return self.records.max_token if isinstance(self.records, TokenRecords) else -1

  @property
  def is_folder(self) -> bool:
    """True if records are a user's own files, which `own_images` reads."""
    return isinstance(self.records, FolderRecords)

  def __repr__(self):
    return f"Split({self.fingerprint})"


def open_split(config: DataConfig, split: str) -> Split:
  """Opens one split of the configured data set.

  Validation is the tail of one fixed permutation of train, the same images for every seed; or a stored
  split (`validation_split`, or validation.npy of a folder of tokens). Test is the stored test split; or
  the stored validation split, if there is no test split (ImageNet) and validation is a share of train.
  A folder without splits is divided by `photo_folder.draw`; in one with train alone, validation stands in
  for test, under its own name.

  Raises:
    UserError: the data set doesn't exist; the message explains how to get it.
    NoSuchSplit: it has no such split, or nothing is held out.
  """
  if split not in SPLITS:
    raise errors.UserError(f"split: {split!r}; expected one of {', '.join(SPLITS)}")
  stored_validation = _stored_validation(config)
  if split == "validation" and not has_validation(config):
    raise errors.NoSuchSplit(
      "data.validation: 0 holds nothing out, and this job chooses by what is held out; fix: "
      "--config.data.validation=0.1, or data.validation_split"
    )
  if config.name == "folder":
    return _folder_split(config, split)
  stored = {"train": "train", "validation": stored_validation or "train", "test": "test"}[split]
  held_out = stored_validation if split == "test" else ""
  if config.name == "tokens":
    records = _token_records(config, stored, held_out)
  else:
    from igpt_jax.data import tfds_source

    records = tfds_source.open_records(
      config.name, config.data_dir, stored, held_out, config.verify
    )
  share = 0 if stored_validation or split == "test" else config.validation
  return _view(records, share, split)


def has_validation(config: DataConfig) -> bool:
  """Returns True if validation images are held out of training."""
  return bool(config.validation or _stored_validation(config))


def _stored_validation(config: DataConfig) -> str:
  """Returns the stored split that is validation; "" if validation is a share of train."""
  if not config.validation_split and config.name == "tokens":
    path = _given(config)
    return "validation" if files.is_file(os.path.join(path, "validation.npy")) else ""
  return config.validation_split


def _view(records: Records, share: float, split: str) -> Split:
  """Returns the records of `split`, of which a share is validation; 0: all of them."""
  n = len(records)
  if not share:
    return Split(records, np.arange(n, dtype=np.int32), split)
  n_held_out = round(n * share)
  order = np.random.default_rng(0).permutation(n).astype(np.int32)
  chosen = order[n - n_held_out :] if split == "validation" else order[: n - n_held_out]
  if not len(chosen):
    raise errors.UserError(
      f"data.validation: {share} of {n} records leaves nothing for {split}; "
      "fix: another share" + (", or evaluate on test" if split == "validation" else "")
    )
  return Split(records, np.sort(chosen), split)


# --- a folder of images -----------------------------------------------------------------------------


def _given(config: DataConfig) -> str:
  """Returns `data.path`, with ~ expanded."""
  given = config.path
  return given.rstrip("/") if files.is_remote(given) else os.path.expanduser(given)


def _folder_split(config: DataConfig, split: str) -> Split:
  given = _given(config)
  if not files.is_remote(given):
    return _local_folder_split(config, split, pathlib.Path(given))
  root = bucket_folders.copied(given)
  try:
    return _local_folder_split(config, split, root)
  except errors.UserError as error:  # of the copy, whose place says nothing
    raise type(error)(str(error).replace(str(root), given)) from None


def _local_folder_split(config: DataConfig, split: str, root: pathlib.Path) -> Split:
  if not photo_folder.has_splits(root, config.validation_split):
    records, parts = photo_folder.open_photos(root, config.validation, config.verify)
    if not len(parts[split]):
      raise errors.UserError(
        f"data.validation: {config.validation} of {len(records)} images leaves nothing for {split}; "
        "fix: a smaller share"
      )
    return Split(records, parts[split], split)
  held_out = config.validation_split
  photo_folder.tell_left_out(root, held_out)
  names = {"train": ["train"], "validation": [held_out or "train"]}.get(
    split, [name for name in TEST_FOLDERS if name != held_out]
  )
  folder = next((root / name for name in names if (root / name).is_dir()), None)
  if folder is None and split == "test" and has_validation(config) and root.is_dir():
    validation = open_split(config, "validation")
    say_once(
      f"data.path {root}: no {names[0]}/: the {len(validation):,} validation images stand in for it, by "
      "which a job may choose, too"
    )
    return validation
  if folder is None:
    folders = sorted(p.name for p in root.iterdir() if p.is_dir())[:5] if root.is_dir() else None
    kind, why = errors.NoSuchSplit, f"holds folders {folders}" if folders else "no folders"
    if folders is None:
      kind, why = errors.UserError, "no such folder"
    fix = (
      f"; fix: --config.data.path={root / folders[0]} divides the images there" if folders else ""
    )
    raise kind(f"data.path {root}: {why}; expected {root / names[0]}/CLASS/*.jpg{fix}")
  train = root / "train"
  classes = class_folders(train) if folder != train and train.is_dir() else None
  records = open_stored(folder, classes, config.verify)
  return _view(records, 0 if held_out or split == "test" else config.validation, split)


# --- files of tokens -------------------------------------------------------------------------------


class TokenRecords:
  """Rows of a .npy file of tokens, integer [N, T], mapped rather than read."""

  name = "tokens"
  class_names: tuple[str, ...] = ()

  def __init__(self, path: str, n_positions: int, verify: bool = False):
    """Opens `path`; `n_positions` is the model's T, and `verify` as in `DataConfig`."""
    try:
      self._path = scratch.local_copy(path)
      self._rows = np.load(self._path, mmap_mode="r", allow_pickle=False)
    except errors.UserError:  # a bucket's
      raise
    except FileNotFoundError:
      raise errors.NoSuchSplit(
        f"data.path {path}: no such file; expected tokens [N, T] in .npy; fix: data.path, or "
        "--config.job=download, which fetches the released test splits (config.download)"
      ) from None
    except (OSError, ValueError, EOFError) as error:
      raise errors.UserError(
        f"data.path {path}: {error}; expected a .npy of integers [N, T]"
      ) from None
    rows = self._rows
    is_array = isinstance(rows, np.ndarray)
    if not (is_array and rows.ndim == 2 and rows.dtype.kind in "iu" and len(rows)):
      stored = f"{rows.dtype} {list(rows.shape)}" if is_array else "an archive"
      raise errors.UserError(f"data.path {path}: {stored}; expected integers [N, T], N at least 1")
    if rows.shape[1] != n_positions:
      raise errors.UserError(
        f"data.path {path}: {rows.shape[1]} tokens a row; expected resolution² = {n_positions}; "
        "fix: data.resolution"
      )
    min_token, self.max_token = int(rows.min()), int(rows.max())
    if min_token < 0 or self.max_token > 65535:
      raise errors.UserError(
        f"data.path {path}: tokens from {min_token} to {self.max_token}; expected 0 to 65535"
      )
    edges = np.ascontiguousarray(rows[[0, -1]]).tobytes()
    self.former_name = f"tokens:{hashlib.sha256(edges).hexdigest()[:12]}"
    absolute = os.path.abspath(self._path)
    self.identity = digests.combined([digests.of_files([absolute], absolute, verify)])

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    tokens = np.asarray(self._rows[index], np.uint16)
    return {"tokens": tokens, "label": -1, "id": f"{self._path}[{index}]"}

  def __getstate__(self):
    # Pickling the memory map would copy the whole file.
    return {**self.__dict__, "_rows": None}

  def __setstate__(self, state):
    self.__dict__.update(state, _rows=np.load(state["_path"], mmap_mode="r", allow_pickle=False))


def _token_records(config: DataConfig, stored: str, held_out: str) -> TokenRecords:
  path = _given(config)
  if stored == held_out:
    raise errors.NoSuchSplit(
      f"data.validation_split: {held_out!r} is held out, which leaves no {stored} split; expected another"
    )
  if files.is_folder(path):
    path = os.path.join(path, f"{stored}.npy")
  elif stored != "test":
    raise errors.NoSuchSplit(
      f"data.path {path}: a file of tokens is a test split; expected a folder with {stored}.npy"
    )
  return TokenRecords(path, config.resolution**2, config.verify)


def subset(split: Split, images: int, seed: int) -> Split:
  """Returns a random choice of the split's images, drawn by `seed`, not by class; 0: all of them."""
  if not images or images >= len(split):
    return split
  return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:images]))


def check_labels(splits: Mapping[str, Split]) -> None:
  """Raises UserError unless all splits have the same classes, two or more, and test isn't validation."""
  train = splits["train"]
  for split in splits.values():
    if split.n_classes < 2:
      few = f"one class alone, {split.class_names[0]}" if split.n_classes else "no labels"
      raise errors.UserError(
        f"data.name: {split.fingerprint} has {few}; a classifier needs at least two classes; "
        "fix: a labelled data set, or a folder with one sub-folder per class"
      )
    if split.class_names != train.class_names:
      raise errors.UserError(
        f"data: {split.fingerprint} has {split.n_classes} classes ({units.some_of(split.class_names)}), "
        f"{train.fingerprint} has {train.n_classes} ({units.some_of(train.class_names)}); expected the same"
      )
  if "test" in splits and splits["test"].name == "validation":
    raise errors.UserError(
      f"data: validation stands in for a test split, and a classifier is chosen by it; expected a test "
      f"split besides {splits['test'].fingerprint}; fix: a folder test/ beside train/"
    )
