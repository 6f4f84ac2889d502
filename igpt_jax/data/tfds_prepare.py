"""Prepares a TFDS data set, once, in the format that is read in any order without TensorFlow.

Only this module's work may import TensorFlow, through the builders of TFDS.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Iterator

from igpt_jax import errors, extras
from igpt_jax.data import tfds_source
from igpt_jax.parallel.locking import locked

# Archives that must be fetched by hand, and who has them. TFDS's builder would notice only later that one
# is missing, or ask a server that no longer has it; it verifies the checksums of the second kind.
_REGISTERED = "as image-net.org gives them to registered users"
_GONE = (
  "of van den Oord et al. 2016, which image-net.org no longer has (see tensorflow/datasets#4662)"
)
_ARCHIVES = {
  "imagenet2012": (("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"), _REGISTERED),
  "downsampled_imagenet": (("train_32x32.tar", "valid_32x32.tar"), _GONE),
  "downsampled_imagenet/32x32": (("train_32x32.tar", "valid_32x32.tar"), _GONE),
  "downsampled_imagenet/64x64": (("train_64x64.tar", "valid_64x64.tar"), _GONE),
}


def prepare(name: str, data_dir: str = "", manual_dir: str = "") -> str:
  """Downloads and generates a data set as ArrayRecord, with TFDS's progress bars.

  After an interruption, call it again: finished downloads aren't repeated, a finished data set is left
  alone, and an unfinished generation is removed. Needs the `prepare` extra, except for `digits`.

  Args:
    name: a TFDS name, or `digits`.
    data_dir: folder of prepared data; "" as in `DataConfig`.
    manual_dir: folder of archives fetched by hand; default data_dir/downloads/manual.

  Returns:
    The folder of the prepared data set, .../NAME/[CONFIG/]VERSION.

  Raises:
    UserError: not a TFDS image data set, an archive is missing, TensorFlow is missing, the
      download failed, or another process is at work on the same data set.
  """
  if name in ("folder", "tokens"):
    raise errors.UserError(f"data.name: {name}; needs no preparation; fix: use it as it is")
  directory = tfds_source.resolve_data_dir(data_dir)
  if name in tfds_source.OWN:
    return tfds_source.make_own(name, directory)
  prepared = tfds_source.find(name, directory)
  if prepared is not None:
    return prepared
  if importlib.util.find_spec("tensorflow") is None:
    raise errors.UserError(
      f"data set {name}: its TFDS builder needs TensorFlow, which isn't installed; "
      f"fix: {extras.install('prepare')} (once; training does without it)"
    )
  manual = pathlib.Path(manual_dir or os.path.join(directory, "downloads", "manual")).expanduser()
  _check_archives(name, manual)
  with lock(directory, name):
    return _generate(name, directory, manual)


def _generate(name: str, directory: str, manual: pathlib.Path) -> str:
  import requests
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

  try:
    builder = tfds.builder(name, data_dir=directory, file_format="array_record")
  except tfds.core.DatasetNotFoundError:
    known = tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(name, known, 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise errors.UserError(
      f"data.name: {name}; expected the name of a TFDS data set{hint}"
    ) from None
  tfds_source.choose_features(builder.info)
  _remove_leftovers(pathlib.Path(builder.data_dir))
  config = tfds.download.DownloadConfig(manual_dir=os.fspath(manual))
  tfds.enable_progress_bar()
  try:
    builder.download_and_prepare(download_config=config)
  except AssertionError as error:  # raised by TFDS if manual_dir lacks something
    raise errors.UserError(f"data set {name}: {error}; fix: put it into {manual}") from error
  except NonMatchingChecksumError as error:
    raise errors.UserError(
      f"data set {name}: {str(error).splitlines()[0].rstrip(':')}; expected the file that TFDS knows; fix: fetch it anew"
    ) from error
  except (requests.exceptions.RequestException, tfds.download.DownloadError) as error:
    raise errors.UserError(
      f"data set {name}: download failed ({error}); fix: run again, what is there is kept; or fetch the file "
      f"by other means, and put it into {manual}"
    ) from error
  return str(builder.data_dir)


def _check_archives(name: str, manual: pathlib.Path) -> None:
  wanted, whose = _ARCHIVES.get(name.split(":")[0], ((), ""))
  missing = [archive for archive in wanted if not (manual / archive).is_file()]
  if missing:
    raise errors.UserError(
      f"data set {name}: {' and '.join(missing)} not in {manual}; expected the archives {whose}; "
      "fix: put them there, or say where they are with data.manual_dir"
    )


def _remove_leftovers(final: pathlib.Path) -> None:
  """Deletes what a killed generation left beside the folder `final`; call it under the lock."""
  if final.parent.is_dir():
    for folder in final.parent.glob("incomplete.*"):
      if folder.name.endswith(f"_{final.name}"):
        shutil.rmtree(folder)


@contextlib.contextmanager
def lock(directory: str, name: str) -> Iterator[None]:
  """Lets only one process at a time prepare a data set."""
  path = pathlib.Path(directory) / f".{name.replace('/', '_').replace(':', '_')}.lock"
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      what = f"data set: {name} in {directory}"
      stack.enter_context(locked(os.fspath(path), what, "another data.data_dir"))
    except OSError as error:
      raise errors.UserError(
        f"data_dir {directory}: {error.strerror}; expected a writable folder"
      ) from error
    yield
