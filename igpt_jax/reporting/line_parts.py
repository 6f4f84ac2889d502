"""A file of lines in a bucket, where nothing can be appended to: the file, and parts that follow it.

  metrics.jsonl                       the lines of a run that has ended, or that it resumed with
  metrics.jsonl.parts/
    DIGEST-TIME-000001                the lines after those, while it goes on

Every object is written whole; the newest part is written again, with more lines, until it is large.
DIGEST is that of the file's contents which the parts follow. Parts that follow other contents aren't
read: to write the file anew, with the lines of its parts, is one write, whatever ends it before they
are removed. TIME is when the writer began: of several, as when a process that was given up lives on,
the newest one's parts are read. A copy of the folder on a disk is read alike.
"""

import concurrent.futures
import hashlib
import os
import time

from igpt_jax import files

_SECONDS = 15.0  # between two uploads that nothing waits for
_LARGE = 1 << 18  # bytes of a part that isn't written again
_TRIES = 3  # of reading parts that are joined meanwhile


def read(path: str) -> bytes | None:
  """Returns the contents of the file and of the parts that follow it; None: there is no file.

  Raises:
    OSError: it can't be read.
  """
  for attempt in range(_TRIES):
    try:
      contents = _read_object(path)
    except FileNotFoundError:
      return None
    try:
      return contents + b"".join(map(_read_object, _parts(path, contents)))
    except FileNotFoundError:
      if attempt + 1 == _TRIES:
        raise
  return None


def rewrite(path: str, contents: bytes) -> None:
  """Writes the file anew, without parts: a reader sees what was there, or less of its end, or this.

  Raises:
    OSError: it can't be written.
  """
  # Removed from the end, so that no part that is left follows one that isn't.
  folder, own = _folder(path), _start_of(path, contents)
  for part in reversed(_paths(folder)):
    if part.startswith(own):
      files.remove(part, missing_ok=True)
  try:
    same = _read_object(path) == contents
  except FileNotFoundError:
    same = False
  if not same:
    with files.replacing(path) as partial, open(partial, "wb") as file:
      file.write(contents)
  for part in reversed(_paths(folder)):
    files.remove(part, missing_ok=True)
  if not files.is_remote(path) and os.path.isdir(folder):
    os.rmdir(folder)


class Parts:
  """Writes lines after those of a file, which `rewrite` has written.

  They are uploaded now and then by a thread, and all of them by `sync`. What can't be uploaded is kept in
  memory, and tried again with the lines after it.
  """

  def __init__(self, path: str):
    self._path = path
    self._start = f"{_start_of(path, _read_object(path))}{time.time_ns():020d}-"
    self._number, self._part, self._uploaded = 1, b"", 0  # of the part's bytes
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._under_way: tuple[concurrent.futures.Future[None], int] | None = None
    self._last = time.monotonic()

  def write(self, lines: bytes) -> None:
    """Adds whole lines; doesn't wait for the bucket."""
    self._part += lines
    if self._under_way is not None and self._under_way[0].done():
      self._settle()
    if self._under_way is None and time.monotonic() - self._last > _SECONDS:
      self._begin()

  def sync(self) -> None:
    """Uploads all lines.

    Raises:
      OSError: they can't be uploaded; they are kept in memory.
    """
    self._settle()
    if self._uploaded < len(self._part):
      self._begin()
      if (error := self._settle()) is not None:
        raise error

  def close(self) -> None:
    """Uploads all lines, and joins them to the file, unless another writer has begun since."""
    try:
      self.sync()
      contents = _read_object(self._path)
      parts = _parts(self._path, contents)
      mine = self._start.startswith(_start_of(self._path, contents))
      if mine and all(part.startswith(self._start) for part in parts):
        rewrite(self._path, contents + b"".join(map(_read_object, parts)))
    finally:
      self._thread.shutdown()

  def _begin(self) -> None:
    self._last = time.monotonic()
    path, lines = f"{self._start}{self._number:06d}", self._part
    self._under_way = self._thread.submit(_upload, path, lines), len(lines)

  def _settle(self) -> OSError | None:
    """Waits for the upload under way, if there is one; returns its error."""
    if self._under_way is None:
      return None
    (upload, size), self._under_way = self._under_way, None
    try:
      upload.result()
    except OSError as error:
      return error
    self._uploaded = size
    if size >= _LARGE:
      self._number, self._part, self._uploaded = self._number + 1, self._part[size:], 0
    return None


def _upload(path: str, lines: bytes) -> None:
  with files.replacing(path) as partial, open(partial, "wb") as file:
    file.write(lines)


def _folder(path: str) -> str:
  return f"{path}.parts"


def _start_of(path: str, contents: bytes) -> str:
  """Returns what the paths of the parts that follow these contents begin with."""
  return os.path.join(_folder(path), f"{hashlib.sha256(contents).hexdigest()[:16]}-")


def _paths(folder: str) -> list[str]:
  return [os.path.join(folder, name) for name in files.names(folder)]


def _parts(path: str, contents: bytes) -> list[str]:
  """Returns the paths of the parts that follow these contents, of the newest writer, in order."""
  start = _start_of(path, contents)
  parts = [part for part in _paths(_folder(path)) if part.startswith(start)]
  newest = max(part.rpartition("-")[0] for part in parts) if parts else ""
  return [part for part in parts if part.startswith(f"{newest}-")]


def _read_object(path: str) -> bytes:
  with files.opened(path) as file:
    return file.read()
