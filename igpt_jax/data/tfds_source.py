"""Reads the records of any prepared TFDS image data set without TensorFlow.

The project's own data sets (`datasets`) are prepared on first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
import os
import pathlib
import shutil
import tempfile
from typing import Any

from igpt_jax import errors, extras, files
from igpt_jax.data import digests, image_decoding
from igpt_jax.reporting.progress import Countdown

_LOG = logging.getLogger(__name__)

# The project's own data sets, whose builders need neither TensorFlow nor a network.
OWN = {"digits": "igpt_jax.data.datasets.digits"}

# Data sets whose test split has no labels, so that the literature tests on validation.
_TEST_SPLIT = {"imagenet2012": ("validation",)}

_PNG = b"\x89PNG\r\n\x1a\n"

# Largest split whose records are read to identify it, since every host reads them.
_READ_WHOLE_BYTES = 2**30


def resolve_data_dir(data_dir: str) -> str:
  """Returns the folder of prepared data: `data_dir`, else $TFDS_DATA_DIR, else TFDS's own default."""
  data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return files.local("data.data_dir", data_dir)


def prepare_command(name: str, data_dir: str) -> str:
  """Returns the command that prepares a TFDS data set, once, for reading in any order."""
  prepare = "bash launch/prepare_data.sh --"  # makes an environment with the extra
  if not extras.in_checkout():
    prepare = f"{extras.install('prepare')} && igpt_jax --config.job=prepare"
  return (
    f"{prepare} --config=quickstart --workdir=runs/prepare "
    f"--config.data.name={name} --config.data.data_dir={resolve_data_dir(data_dir)}"
  )


class TfdsRecords:
  """Records of one stored split, which is opened anew in every process that unpickles them."""

  def __init__(self, builder_dir: str, split: str, verify: bool = False):
    """Opens the stored split of `builder_dir`, .../NAME/[CONFIG/]VERSION; `verify` as in `DataConfig`."""
    self._builder_dir = builder_dir
    self._split = split
    split_info = self._open()
    self.former_name = self.name
    self.identity = self._identity(split_info, verify)

  def _identity(self, split_info, verify: bool) -> str:
    """Returns a digest of the records, or of a large split's size and shard lengths in TFDS' metadata.

    The shards' bytes would be no identity: they differ every time that the same records are written.
    """
    shards = [os.path.abspath(path) for path in split_info.filepaths]
    for path in shards:
      try:
        os.stat(path)
      except OSError as error:
        raise errors.UserError(
          f"data set {self.name}: {path}: {error.strerror}; expected all shards of the split; "
          "fix: remove its folder and prepare it again"
        ) from None
    if split_info.num_bytes <= _READ_WHOLE_BYTES:
      records = [digests.of_reading(self._read_all, shards, shards[0], verify)]
    else:
      if verify:
        _LOG.warning("data.verify: %s is known by TFDS' own record of it, and not read", self.name)
      records = [split_info.num_bytes, *split_info.shard_lengths]
    return digests.combined([records, self.class_names])

  def _read_all(self) -> str:
    """Returns a digest of all images and labels.

    PNGs count by their pixels: the project's own sets are prepared where they are used, and the same
    pixels may be compressed to other bytes on another machine.
    """
    whole = hashlib.sha256()
    work = f"{self.name}: records read, to know them by their contents"
    clock = Countdown(work, len(self), _LOG.warning)
    for i in range(len(self)):
      try:
        record = self[i]
        image = record["image"]
        shape = (len(image),)
        if image.startswith(_PNG):
          pixels = image_decoding.decode(image, record["id"])
          image, shape = pixels.tobytes(), pixels.shape
        whole.update(f"{record['label']} {shape}\n".encode())
        whole.update(image)
      except image_decoding.BadRecord:
        whole.update(b"unreadable\n")
      clock.tick(i)
      digests.beat()
    return whole.hexdigest()

  def _open(self):
    """Opens the split in this process; returns TFDS' metadata of it."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    builder: Any = tfds.builder_from_directory(self._builder_dir)
    info = builder.info
    self.name = info.full_name
    self._image, self._label, self._name = choose_features(info)
    self.class_names = tuple(info.features[self._label].names) if self._label else ()
    # TFDS's deserialisation takes as long as reading, and `__getitem__` needs only three features.
    try:
      self._source = builder.as_data_source(
        split=self._split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
      )
    except (NotImplementedError, ValueError) as error:
      raise errors.UserError(
        f"data set {info.full_name}: stored as {info.file_format.value} in {self._builder_dir}; "
        "expected array_record; fix: prepare it into another data_dir: "
        + prepare_command(info.name, "DIR")
      ) from error
    self._parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
    return info.splits[self._split]

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    name = f"{self._split}[{index}]"
    try:
      stored = self._source[index]
    except RuntimeError as error:  # array_record raises it for a damaged file
      raise image_decoding.BadRecord(f"{self.name} {name}: {error}") from error
    features = self._parse(stored).features.feature
    if self._name:
      name = features[self._name].bytes_list.value[0].decode(errors="replace")
    return {
      "image": features[self._image].bytes_list.value[0],
      "label": features[self._label].int64_list.value[0] if self._label else -1,
      "id": f"{self.name} {name}",
    }

  def __getstate__(self):
    kept = ("_builder_dir", "_split", "former_name", "identity")
    return {name: self.__dict__[name] for name in kept}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()


def open_records(
  name: str, data_dir: str, stored: str, held_out: str = "", verify: bool = False
) -> TfdsRecords:
  """Opens a stored split; for `test`, ImageNet's validation, which is its test.

  Args:
    name: name of the data set.
    data_dir: folder of prepared data.
    stored: name of the split.
    held_out: a stored split that must not be used as test.
    verify: read all records, even if the files haven't changed since they were read.

  Raises:
    UserError: the data set isn't prepared.
    NoSuchSplit: it has no such split.
  """
  import tensorflow_datasets as tfds

  directory = resolve_data_dir(data_dir)
  builder_dir = make_own(name, directory) if name in OWN else find(name, directory)
  if builder_dir is None:
    raise errors.UserError(
      f"data set {name}: not prepared in {directory}; expected one of our own "
      f"({', '.join(sorted(OWN))}), folder, tokens, or a prepared TFDS data set; "
      f"fix: {prepare_command(name, data_dir)}"
    )
  splits = tfds.builder_from_directory(builder_dir).info.splits
  tests = _TEST_SPLIT.get(name.split("/")[0].split(":")[0], ("test", "validation"))
  names = [n for n in (tests if stored == "test" else (stored,)) if n != held_out]
  name_stored = next((n for n in names if n in splits and splits[n].num_examples), None)
  if name_stored is None:
    raise errors.NoSuchSplit(
      f"data set {name}: has splits {', '.join(sorted(splits)) or 'none'}; expected {stored}"
      + (f" beside {held_out}, which data.validation_split holds out" if held_out else "")
    )
  return TfdsRecords(builder_dir, name_stored, verify)


def find(name: str, directory: str) -> str | None:
  """Returns the folder of a prepared data set, its newest version unless the name has one; or None."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  try:
    builder = read_only_builder.builder_from_files(name, data_dir=directory)
  except (tfds.core.DatasetNotFoundError, ValueError):
    return None
  return str(builder.data_path)


def choose_features(info) -> tuple[str, str | None, str | None]:
  """Returns the names of the features with the image, the label and the record's name; None: no such."""
  import tensorflow_datasets as tfds

  features = info.features
  images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
  labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  image, label = (info.supervised_keys or ("", ""))[:2]
  if image not in images:
    image = "image" if "image" in images or len(images) != 1 else images[0]
  if image not in images:
    raise errors.UserError(
      f"data set {info.full_name}: has features {', '.join(features)}; expected one image"
    )
  if label not in labels:
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
  texts = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
  return image, label, next((k for k in texts if k in ("file_name", "id")), None)


def make_own(name: str, directory: str) -> str:
  """Prepares one of the project's own data sets if necessary; returns its .../NAME/VERSION folder.

  It is prepared beside that folder and renamed to it, so that several processes may do so at once.
  """
  import tensorflow_datasets as tfds

  builder_class = importlib.import_module(OWN[name]).Builder
  final = pathlib.Path(directory) / name / str(builder_class.VERSION)
  if final.is_dir():
    return str(final)
  try:
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".making-", dir=final.parent)
  except OSError as error:
    raise errors.UserError(
      f"data_dir {directory}: {error.strerror}; expected a folder that can be written; fix: data.data_dir"
    ) from error
  try:
    builder = builder_class(data_dir=scratch, file_format="array_record")
    # TFDS would print the scratch folder, and draw progress bars for a second's work.
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
    try:
      os.rename(builder.data_dir, final)
    except OSError:
      if not final.is_dir():
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return str(final)
