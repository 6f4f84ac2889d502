"""Smaller copies of prepared data sets, which a run reads several times faster.

Training images are stored again with a shorter side that the crops of training need no more than, and
everything else of the data set as it is: a copy is a TFDS data set like any other, in a folder of its own
for `data.data_dir`. The paper's augmentation draws its crops relative to the image's size, so that it
draws the same ones from a copy. Images of the other splits keep every byte: what is measured on them
compares with what others measure.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import simplejpeg
from PIL import Image

from igpt_jax import errors, files, units
from igpt_jax.data import image_decoding, tfds_prepare, tfds_source, transforms
from igpt_jax.parallel import hardware
from igpt_jax.reporting.progress import Countdown

VERSION = 1  # of what a copy holds; increase it whenever its pixels or bytes change
_SHRUNK = "train"  # the split that is; the others are measured on
_RECIPE = "smaller.json"
_INFO = "dataset_info.json"
_FEATURES = "features.json"  # TFDS finds a data set by it, so it is written last
# What array_record needs for reading in any order, and TFDS writes.
_OPTIONS = "group_size:1"


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All that decides a copy's contents.

  Attributes:
    short_side: of the images, in pixels; smaller ones stay as they are.
    quality: of JPEG, 1 to 100, with colours at full resolution; 0: PNG, which loses nothing more.
  """

  short_side: int
  quality: int


def copy_of(data_dir: str, recipe: Recipe) -> str:
  """Returns the default folder of a copy: beside that of the data set, with the shorter side in its name."""
  return f"{tfds_source.resolve_data_dir(data_dir)}-short{recipe.short_side}"


def make(
  source: str, data_dir: str, target: str, recipe: Recipe, say: Callable[[str], None]
) -> str:
  """Makes a smaller copy of a prepared data set, with a process for each core.

  After an interruption, call it again: shards that are there aren't made again.

  Args:
    source: the prepared data set, as `tfds_prepare.prepare` returns it.
    data_dir: the folder that it was prepared in; "" as in `DataConfig`.
    target: the copy's, likewise.
    recipe: what to make.
    say: prints a line.

  Returns:
    The copy's folder, below `target` as the data set is below `data_dir`.

  Raises:
    UserError: `target` holds another copy, or can't be written, or another process is at work there.
  """
  directory = tfds_source.resolve_data_dir(data_dir)
  target = files.local("config.prepare.target", target)
  if os.path.realpath(target) == os.path.realpath(directory):
    raise errors.UserError(
      f"config.prepare.target: {target} is data.data_dir, with the images as they are; expected another"
    )
  name, whole = os.path.relpath(source, directory), pathlib.Path(source)
  folder = pathlib.Path(target) / name
  with tfds_prepare.lock(target, name):
    _claim(folder, whole, recipe)
    if not (folder / _FEATURES).is_file():
      _fill(folder, whole, recipe, say)
  return str(folder)


def _claim(folder: pathlib.Path, source: pathlib.Path, recipe: Recipe) -> None:
  """Writes into `folder` what it is made of and how, or checks that it is this."""
  info = files.read_json(source / _INFO)
  wanted = dataclasses.asdict(recipe) | {
    "version": VERSION,
    "splits": {
      split["name"]: tfds_source.TfdsRecords(str(source), split["name"]).identity
      for split in info["splits"]
    },
  }
  path = folder / _RECIPE
  if path.exists():
    what = f"{folder} was made otherwise"
    fix = "another folder, or remove this one"
    files.check_same("config.prepare.target", what, files.read_json(path), wanted, fix)
    return
  if folder.is_dir() and any(folder.iterdir()):
    raise errors.UserError(
      f"config.prepare.target: {folder} holds another data set; expected an empty or a new folder"
    )
  folder.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as partial:
    pathlib.Path(partial).write_text(json.dumps(wanted, indent=2), encoding="utf-8")


def _fill(
  folder: pathlib.Path, source: pathlib.Path, recipe: Recipe, say: Callable[[str], None]
) -> None:
  """Makes all shards that aren't there, then TFDS' metadata."""
  import tensorflow_datasets as tfds

  builder: Any = tfds.builder_from_directory(str(source))
  info, (image, _, _) = builder.info, tfds_source.choose_features(builder.info)
  train = info.splits[_SHRUNK]
  paths = [pathlib.Path(path) for path in train.filepaths]
  lengths = dict(zip((path.name for path in paths), train.shard_lengths, strict=True))
  others = [path for path in source.iterdir() if path.is_file() and path.name not in lengths]
  for path in others:
    if path.name not in (_INFO, _FEATURES) and not (folder / path.name).is_file():
      with files.replacing(folder / path.name) as partial:
        shutil.copyfile(path, partial)
  missing = [path for path in paths if not (folder / path.name).is_file()]
  total, left = sum(lengths.values()), sum(lengths[path.name] for path in missing)
  cores = min(hardware.usable_cores(), max(len(missing), 1))
  say(
    f"{info.full_name}: {left:,} of {total:,} training images to a shorter side of {recipe.short_side}, "
    f"into {folder}, on {units.counted(cores, 'core')}"
  )
  clock, done = Countdown("images", total, say), total - left
  context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
  with concurrent.futures.ProcessPoolExecutor(cores, mp_context=context) as pool:
    work = {
      pool.submit(shrink_shard, str(path), str(folder / path.name), image, recipe): path.name
      for path in missing
    }
    try:
      for future in concurrent.futures.as_completed(work):
        for line in future.result():
          say(line)
        done += lengths[work[future]]
        clock.tick(done)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  _finish(folder, source, lengths)


def _finish(folder: pathlib.Path, source: pathlib.Path, lengths: dict[str, int]) -> None:
  """Checks the copy's shards, and writes the metadata by which TFDS finds it."""
  size = 0
  for name, length in lengths.items():
    count, n_bytes = _records_of(folder / name)
    if count != length:
      raise errors.UserError(
        f"{folder / name}: {count} records; expected {length}; fix: remove it, and run again"
      )
    size += n_bytes
  info = files.read_json(source / _INFO)
  for stored in info["splits"]:
    if stored["name"] == _SHRUNK:
      stored["numBytes"] = str(size)
  with files.replacing(folder / _INFO) as partial:
    pathlib.Path(partial).write_text(json.dumps(info, indent=2), encoding="utf-8")
  with files.replacing(folder / _FEATURES) as partial:
    shutil.copyfile(source / _FEATURES, partial)


def shrink_shard(source: str, target: str, image: str, recipe: Recipe) -> list[str]:
  """Writes a shard's records with smaller images, whole or not at all; returns what to say of it.

  Args:
    source, target: files of ArrayRecord.
    image: name of the feature with the image.
    recipe: what to make.
  """
  from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
  from tensorflow_datasets.proto import tf_example_pb2

  parse: Callable[[bytes], Any] = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
  messages = []
  with files.replacing(target) as partial:
    reader = array_record_module.ArrayRecordReader(source)
    writer = array_record_module.ArrayRecordWriter(partial, _OPTIONS)
    try:
      for index in range(reader.num_records()):
        (stored,) = reader.read([index])
        example = parse(stored)
        values = example.features.feature[image].bytes_list.value
        try:
          values[0] = smaller(values[0], recipe, f"{os.path.basename(source)}[{index}]")
        except image_decoding.BadRecord as error:  # reading it says so, too
          messages.append(f"{error}: stays as it is")
        writer.write(example.SerializeToString())
    finally:
      writer.close()
      reader.close()
  return messages


def smaller(data: bytes, recipe: Recipe, record_id: str = "image") -> bytes:
  """Returns an encoded image with its shorter side at the recipe's; a smaller one as it is.

  Raises:
    BadRecord: it can't be decoded.
  """
  image = image_decoding.decode(data, record_id)
  if min(image.shape[:2]) <= recipe.short_side:
    return data
  height, width = transforms.scaled_to_short_side(image.shape[0], image.shape[1], recipe.short_side)
  image = transforms.resize_area(image, height, width)
  if recipe.quality:
    return simplejpeg.encode_jpeg(
      image, quality=recipe.quality, colorspace="RGB", colorsubsampling="444"
    )
  file = io.BytesIO()
  Image.fromarray(image).save(file, "png")
  return file.getvalue()


def _records_of(path: pathlib.Path) -> tuple[int, int]:
  """Returns the number of records of a shard and their bytes."""
  from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    count = reader.num_records()
    return count, sum(len(record) for i in range(count) for record in reader.read([i]))
  finally:
    reader.close()
