"""Opens data sets by name: splits of records that can be read in any order.

Holds the splits that every source shares, and the sources that
need no library: folders of images (`folder`) and files of tokens. `tfds_source` reads everything else.
Records are undecoded; order, augmentation and batches belong to `pipeline`.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from igpt_jax import errors
from igpt_jax.config.run_fields import DataConfig
from igpt_jax.data import digests
from igpt_jax.data.folder import FolderRecords, class_folders
from igpt_jax.errors import UserError

SPLITS = ("train", "validation", "test")
TEST_FOLDERS = ("test", "val", "validation")  # the first that is there is the test split


class Records(Protocol):
  """All records of one stored split. Picklable, for worker processes."""

  name: str  # for a person: data set and version
  identity: str  # a digest of contents and labels, the same wherever they lie
  former_name: str  # what stood for both in a fingerprint of 0.1.0
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Split:
  """A random-access view of records.

  `split[i]` is a dict of `label` (int, -1 if none), `id` (str, names the record to a person), and
  either `image` (encoded bytes, or a uint8 array) or `tokens` (integer [T]).

  Attributes:
    name: train, validation or test.
    n_classes: number of labels, 0 if there are none.
    class_names: n_classes names.
    indices: int32 [n], the places of the split's records among all that are stored.
    fingerprint: names data set, split, number of records, and a digest of which they are and what is in
      them: what checkpoints, features and results are known by. The same on every host.
    former_fingerprint: what a checkpoint holds in its place that didn't know contents yet.
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

  def select(self, indices: np.ndarray) -> Split:
    """The records at these places of this split, in this order."""
    return Split(self.records, self.indices[np.asarray(indices)], self.name)

  @property
  def is_tokens(self) -> bool:
    """True if records are tokens, which need neither decoding nor a palette."""
    return isinstance(self.records, TokenRecords)

  @property
  def max_token(self) -> int:
    """The largest token of all that are stored; -1 where records are images."""
    return self.records.max_token if isinstance(self.records, TokenRecords) else -1

  @property
  def is_folder(self) -> bool:
    """True if records are a person's files, which `own_images` reads; those of TFDS are decoded as stored."""
    return isinstance(self.records, FolderRecords)

  def __repr__(self):
    return f"Split({self.fingerprint})"


def open_split(config: DataConfig, split: str) -> Split:
  """Opens one split of the configured data set.

  Validation is the tail of one fixed permutation of train: the same images whatever the seed of
  the run; or a stored split of its own (`validation_split`, or a folder of tokens' validation.npy).
  Test is the stored test split, or the stored validation split where there is no test (ImageNet)
  and nobody chooses by it; only evaluation opens it.

  Raises:
    UserError: the data set isn't there; the message says how to get it.
    NoSuchSplit: this split of it isn't, or nothing is held out.
  """
  if split not in SPLITS:
    raise errors.UserError(f"split: {split!r}; expected one of {', '.join(SPLITS)}")
  own = _own_validation(config)
  if split == "validation" and not has_validation(config):
    raise errors.NoSuchSplit(
      "data.validation: 0 holds nothing out, and this job chooses by what is held out; fix: "
      "--config.data.validation=0.1, or data.validation_split"
    )
  stored = own if own and split == "validation" else "test" if split == "test" else "train"
  held_out = own if split == "test" else ""
  if config.name == "folder":
    records = _folder_records(config, stored, held_out)
  elif config.name == "tokens":
    records = _token_records(config, stored, held_out)
  else:
    from igpt_jax.data import tfds_source

    records = tfds_source.open_records(
      config.name, config.data_dir, stored, held_out, config.verify
    )
  return _view(records, 0 if own or split == "test" else config.validation, split)


def has_validation(config: DataConfig) -> bool:
  """Returns True if validation images are held out of training."""
  return bool(config.validation or _own_validation(config))


def _own_validation(config: DataConfig) -> str:
  """The stored split that is held out; "": a share of train is."""
  if not config.validation_split and config.name == "tokens":
    path = pathlib.Path(config.path).expanduser()
    return "validation" if (path / "validation.npy").is_file() else ""
  return config.validation_split


def _view(records: Records, share: float, split: str) -> Split:
  """The records that `split` names, where a share of them is validation; 0: all of them."""
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


def _folder_records(config: DataConfig, stored: str, held_out: str) -> FolderRecords:
  root = pathlib.Path(config.path).expanduser()
  names = [name for name in (TEST_FOLDERS if stored == "test" else (stored,)) if name != held_out]
  folder = next((root / name for name in names if (root / name).is_dir()), None)
  if folder is None:
    folders = sorted(p.name for p in root.iterdir() if p.is_dir())[:5] if root.is_dir() else None
    there = (
      "no such folder"
      if folders is None
      else f"holds folders {folders}"
      if folders
      else "no folders"
    )
    kind = errors.UserError if folders is None else errors.NoSuchSplit
    raise kind(f"data.path {root}: {there}; expected {root / names[0]}/CLASS/*.jpg")
  train = root / "train"
  classes = class_folders(train) if stored != "train" and train.is_dir() else None
  return FolderRecords(folder, classes, config.verify)


# --- files of tokens -------------------------------------------------------------------------------


class TokenRecords:
  """Rows of a .npy file of tokens, integer [N, T], mapped rather than read."""

  name = "tokens"
  class_names: tuple[str, ...] = ()

  def __init__(self, path: pathlib.Path, n_positions: int, verify: bool = False):
    """`n_positions` is the T that the model expects; `verify` as in `DataConfig`."""
    self._path = path
    try:
      self._rows = np.load(path, mmap_mode="r", allow_pickle=False)
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
    if (
      not isinstance(rows, np.ndarray)
      or rows.ndim != 2
      or rows.dtype.kind not in "iu"
      or not len(rows)
    ):
      stored = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else "an archive"
      raise errors.UserError(f"data.path {path}: {stored}; expected integers [N, T], N at least 1")
    if rows.shape[1] != n_positions:
      raise errors.UserError(
        f"data.path {path}: {rows.shape[1]} tokens a row; expected resolution² = {n_positions}; "
        "fix: data.resolution"
      )
    self.min_token, self.max_token = int(rows.min()), int(rows.max())
    if self.min_token < 0 or self.max_token > 65535:
      raise errors.UserError(
        f"data.path {path}: tokens from {self.min_token} to {self.max_token}; expected 0 to 65535"
      )
    edges = np.ascontiguousarray(rows[[0, -1]]).tobytes()
    self.former_name = f"tokens:{hashlib.sha256(edges).hexdigest()[:12]}"
    place = str(path.absolute())
    self.identity = digests.combined([digests.of_files([place], place, verify)])

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    tokens = np.asarray(self._rows[index], np.uint16)
    return {"tokens": tokens, "label": -1, "id": f"{self._path}[{index}]"}

  def __getstate__(self):
    # A pickled map would carry the whole file.
    return {**self.__dict__, "_rows": None}

  def __setstate__(self, state):
    self.__dict__.update(state, _rows=np.load(state["_path"], mmap_mode="r", allow_pickle=False))


def _token_records(config: DataConfig, stored: str, held_out: str) -> TokenRecords:
  path = pathlib.Path(config.path).expanduser()

  def records_of(file: pathlib.Path) -> TokenRecords:
    return TokenRecords(file, config.resolution**2, config.verify)

  if stored == held_out:
    raise errors.NoSuchSplit(
      f"data.validation_split: {held_out!r} is held out, which leaves no {stored} split; expected another"
    )
  if path.is_dir():
    return records_of(path / f"{stored}.npy")
  if stored != "test":
    raise errors.NoSuchSplit(
      f"data.path {path}: a file of tokens is a test split; expected a folder with {stored}.npy"
    )
  return records_of(path)


def some_of(names: tuple[str, ...]) -> str:
  return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def subset(split: Split, images: int, seed: int) -> Split:
  """A random choice of the split's images, drawn by `seed`, classes as they fall; 0: all."""
  if not images or images >= len(split):
    return split
  return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:images]))


def check_labels(splits: Mapping[str, Split]) -> None:
  """Raises UserError unless all splits have the same classes, two or more."""
  train = splits["train"]
  for split in splits.values():
    if split.n_classes < 2:
      few = f"one class alone, {split.class_names[0]}" if split.n_classes else "no labels"
      raise UserError(
        f"data.name: {split.fingerprint} has {few}; a classifier needs at least two classes; "
        "fix: a labelled data set, or a folder with one sub-folder per class"
      )
    if split.class_names != train.class_names:
      raise UserError(
        f"data: {split.fingerprint} has {split.n_classes} classes ({some_of(split.class_names)}), "
        f"{train.fingerprint} has {train.n_classes} ({some_of(train.class_names)}); expected the same"
      )
