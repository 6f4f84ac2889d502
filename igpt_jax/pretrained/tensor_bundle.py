"""Reads and writes TensorFlow's V2 checkpoint files ("tensor bundles") without TensorFlow.

A bundle `PREFIX` is one `PREFIX.index`, a LevelDB table from variable name to (dtype, shape, shard,
offset, size, CRC), and `PREFIX.data-00000-of-0000N`, the bytes. TensorFlow's tensor_bundle.proto
describes it. No library but TensorFlow reads it (tensorstore has no driver for it).

Only the file format belongs here; `openai` lists a model's variables. Files are untrusted: every
length is compared with the file's size before memory is allocated, every block's and tensor's
CRC-32C is checked, and violations raise a UserError that names the file and the place.
"""

import contextlib
import itertools
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import google_crc32c
import ml_dtypes
import numpy as np

from igpt_jax.errors import UserError
from igpt_jax.pretrained.leveldb_table import (
  BLOCK_BYTES,
  MAX_KEY_BYTES,
  Malformed,
  mask_crc,
  pack_table,
  read_varint,
  table_entries,
  varint,
)

# From tensorflow/core/framework/types.proto. Variables of other types are listed, but not read.
_DTYPES = {
  1: np.dtype(np.float32),
  2: np.dtype(np.float64),
  3: np.dtype(np.int32),
  9: np.dtype(np.int64),
  14: np.dtype(ml_dtypes.bfloat16),
  19: np.dtype(np.float16),
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_DTYPE_NAMES = ", ".join(dtype.name for dtype in _DTYPE_CODES)

# Generous limits: an L-size model's index has 389 entries in 15 kB.
_MAX_INDEX_BYTES = 4 << 20
_MAX_ENTRIES = 100_000
_MAX_SHARDS = 512
_MAX_RANK = 16
_CHUNK_BYTES = 1 << 20


class Entry(NamedTuple):
  """One variable; `dtype` is None if this module can't read it, and `kind` says why."""

  dtype: np.dtype | None
  kind: str
  shape: tuple[int, ...]
  shard: int
  offset: int
  size: int
  crc: int


# --- protocol buffer wire format: the three messages of tensor_bundle.proto ---


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Yields (field number, value) of a message; fixed-width values are unsigned integers."""
  at = 0
  while at < len(data):
    tag, at = read_varint(data, at)
    number, wire = tag >> 3, tag & 7
    if wire == 0:
      value, at = read_varint(data, at)
    elif wire in (1, 5):
      width = 8 if wire == 1 else 4
      if at + width > len(data):
        raise Malformed("a field runs past the end")
      value, at = int.from_bytes(data[at : at + width], "little"), at + width
    elif wire == 2:
      length, at = read_varint(data, at)
      if length > len(data) - at:
        raise Malformed("a field runs past the end")
      value, at = data[at : at + length], at + length
    else:
      raise Malformed(f"wire type {wire}")
    yield number, value


def _message(data: bytes, scalars: dict[int, str], messages: dict[int, str]) -> dict:
  """Returns fields by name: a scalar's last value, a list of bytes for the submessages."""
  out: dict = {name: 0 for name in scalars.values()} | {name: [] for name in messages.values()}
  for number, value in _fields(data):
    name = scalars.get(number) or messages.get(number)
    if name is None:
      continue
    if isinstance(value, bytes) != (number in messages):
      raise Malformed(f"field {name} has the wrong wire type")
    if number in messages:
      out[name].append(value)
    else:
      out[name] = value
  return out


def _parse_header(data: bytes) -> int:
  """Returns the number of shards."""
  header = _message(data, {1: "num_shards", 2: "endianness"}, {3: "version"})
  if header["endianness"]:
    raise Malformed("it is big-endian")
  for version in header["version"]:
    needs = _message(version, {2: "min_consumer"}, {})["min_consumer"]
    if needs > 1:
      raise Malformed(f"it needs a reader of version {needs}")
  if not 1 <= header["num_shards"] <= _MAX_SHARDS:
    raise Malformed(f"num_shards is {header['num_shards']}")
  return header["num_shards"]


def _parse_entry(data: bytes) -> Entry:
  scalars = {1: "dtype", 3: "shard", 4: "offset", 5: "size", 6: "crc"}
  entry = _message(data, scalars, {2: "shape", 7: "slices"})
  dims = []
  for shape in entry["shape"]:
    for dim in _message(shape, {3: "unknown_rank"}, {2: "dims"})["dims"]:
      dims.append(_message(dim, {1: "size"}, {})["size"])
      if len(dims) > _MAX_RANK:
        raise Malformed(f"a shape has more than {_MAX_RANK} dimensions")
  dtype = None if entry["slices"] else _DTYPES.get(entry["dtype"])
  kind = "stored in slices" if entry["slices"] else f"of TensorFlow type {entry['dtype']}"
  extent = (entry[name] for name in ("shard", "offset", "size", "crc"))
  return Entry(dtype, kind, tuple(dims), *extent)


# --- bundles ---


def data_path(prefix: str, shard: int, num_shards: int) -> str:
  """Returns the path of one data file."""
  return f"{prefix}.data-{shard:05d}-of-{num_shards:05d}"


def _open_regular(path: str) -> BinaryIO:
  """Opens a file that must be regular, since a pipe or device could block or never end."""
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  except OSError as error:
    raise UserError(
      f"checkpoint file: {path}: {error.strerror}; expected a readable file; fix: bring the "
      "checkpoint's .index and all its .data-*-of-* files into one directory"
    ) from error
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise UserError(f"checkpoint file: {path}; expected a regular file")
  return os.fdopen(descriptor, "rb", buffering=0)


class Bundle:
  """An opened tensor bundle: the index is read and checked at once, tensors on demand.

  Use as a context manager. `entries` maps every variable's name to its `Entry`; `specs` and `read` are
  those of `leaves.Source`.

  Args:
    prefix: path without `.index`, for example `model.ckpt-1000000`.

  Raises:
    UserError: a file is missing, truncated or damaged, or an entry points outside its data.
  """

  def __init__(self, prefix: str | os.PathLike[str]):
    self.prefix = os.fspath(prefix)
    self.entries: dict[str, Entry] = {}
    self._files: list[BinaryIO] = []
    self._paths: list[str] = []
    try:
      self._read_index()
      self._check_extents()
      self.specs = {name: (entry.shape, entry.dtype) for name, entry in self.entries.items()}
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "Bundle":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    for file in self._files:
      file.close()
    self._files = []

  def _read_index(self) -> None:
    path = self.prefix + ".index"
    with _open_regular(path) as file:
      size = os.fstat(file.fileno()).st_size
      if size > _MAX_INDEX_BYTES:
        raise UserError(f"checkpoint index: {path}: {size} bytes; expected at most 4 MiB")
      table = file.read(size)
    shards = None
    try:
      for key, value in table_entries(table):
        if shards is None:
          if key:
            raise Malformed("it has no header")
          shards = _parse_header(value)
        elif len(self.entries) >= _MAX_ENTRIES:
          raise Malformed(f"it lists more than {_MAX_ENTRIES} variables")
        else:
          name = key.decode("utf-8")
          if not name.isprintable():
            raise Malformed("a name isn't printable")
          self.entries[name] = _parse_entry(value)
      if shards is None:
        raise Malformed("it is empty")
    except (Malformed, UnicodeDecodeError) as error:
      raise UserError(
        f"checkpoint index: {path}: {error}; expected the index of a TensorFlow V2 checkpoint; "
        "fix: copy or download the file again"
      ) from error
    for shard in range(shards):
      self._paths.append(data_path(self.prefix, shard, shards))
      self._files.append(_open_regular(self._paths[-1]))

  def _check_extents(self) -> None:
    """Raises UserError for entries that exceed their shard, overlap, or don't fit their shape.

    Together these checks bound the memory of reading all variables by the size of the data files.
    """
    sizes = [os.fstat(file.fileno()).st_size for file in self._files]
    spans = []
    for name, entry in self.entries.items():
      where = f"checkpoint variable: {name} in {self.prefix}.index"
      if entry.shard >= len(sizes):
        raise UserError(f"{where}: shard {entry.shard}; expected one of {len(sizes)}")
      if entry.offset + entry.size > sizes[entry.shard]:
        raise UserError(
          f"{where}: bytes {entry.offset} to {entry.offset + entry.size} of "
          f"{self._paths[entry.shard]}, which has {sizes[entry.shard]}; "
          "fix: the data file is cut short or of another checkpoint; copy or download it again"
        )
      if entry.dtype is not None and entry.size != math.prod(entry.shape) * entry.dtype.itemsize:
        raise UserError(
          f"{where}: {entry.size} bytes; expected {entry.dtype.name}{list(entry.shape)} to have "
          f"{math.prod(entry.shape) * entry.dtype.itemsize}"
        )
      if entry.size:
        spans.append((entry.shard, entry.offset, entry.size, name))
    spans.sort()
    for before, after in itertools.pairwise(spans):
      if before[0] == after[0] and before[1] + before[2] > after[1]:
        raise UserError(
          f"checkpoint variables: {before[3]} and {after[3]} in {self.prefix}.index; "
          "expected them not to share bytes"
        )

  def read(self, name: str) -> np.ndarray:
    """Reads one variable and checks its CRC. The array owns its memory.

    Raises:
      UserError: the dtype is unsupported, the file is too short, or the CRC doesn't match.
    """
    entry = self.entries[name]
    if entry.dtype is None:
      raise UserError(
        f"checkpoint variable: {name} in {self.prefix}.index is {entry.kind}; "
        f"expected a whole array of one of {_DTYPE_NAMES}"
      )
    file = self._files[entry.shard]
    array = np.empty(entry.shape, entry.dtype)
    view = array.reshape(-1).view(np.uint8).data
    file.seek(entry.offset)
    done, crc = 0, 0
    while done < entry.size:
      # google_crc32c accepts only bytes; chunks avoid a second copy of the tensor.
      chunk = file.read(min(_CHUNK_BYTES, entry.size - done))
      if not chunk:
        raise UserError(
          f"checkpoint file: {self._paths[entry.shard]} ends while {name} is read; fix: copy it again"
        )
      view[done : done + len(chunk)] = chunk
      crc = google_crc32c.extend(crc, chunk)
      done += len(chunk)
    if mask_crc(crc) != entry.crc:
      raise UserError(
        f"checkpoint variable: {name} in {self._paths[entry.shard]} doesn't match its CRC; "
        "fix: the file is damaged; copy or download it again"
      )
    return array


def write_bundle(
  prefix: str | os.PathLike[str],
  tensors: Iterable[tuple[str, np.ndarray]],
  *,
  num_shards: int = 1,
  block_bytes: int = BLOCK_BYTES,
) -> None:
  """Writes, all or nothing, a bundle that TensorFlow can restore.

  Args:
    prefix: path without `.index`; its files must not exist.
    tensors: (name, array) in any order; consumed one at a time, so that a generator over a large
      model never holds more than one.
    num_shards: number of data files; a tensor goes to the smallest one so far.
    block_bytes: size of the index's LevelDB blocks; the default is TensorFlow's.

  Raises:
    UserError: the target exists, its directory doesn't, or a name or dtype can't be stored.
  """
  prefix = os.fspath(prefix)
  if not 1 <= num_shards <= _MAX_SHARDS:
    raise UserError(f"number of shards: {num_shards}; expected 1 to {_MAX_SHARDS}")
  targets = [data_path(prefix, shard, num_shards) for shard in range(num_shards)]
  targets.append(prefix + ".index")
  for target in targets:
    if os.path.exists(target):
      raise UserError(f"checkpoint to write: {target} exists; fix: name another target")
  parts = [f"{target}.part-{os.getpid()}" for target in targets]
  entries: dict[bytes, bytes] = {}
  sizes = [0] * num_shards
  try:
    with contextlib.ExitStack() as stack:
      files = [stack.enter_context(open(part, "xb")) for part in parts[:-1]]
      for name, array in tensors:
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = name.encode("utf-8")
        if not key or len(key) > MAX_KEY_BYTES or key in entries:
          limit = f"1 to {MAX_KEY_BYTES} bytes"
          raise UserError(f"variable name: {name!r}; expected a new one of {limit}")
        if array.dtype not in _DTYPE_CODES:
          raise UserError(f"dtype of {name}: {array.dtype.name}; expected one of {_DTYPE_NAMES}")
        shard = sizes.index(min(sizes))
        data, crc = array.reshape(-1).view(np.uint8).data, 0
        for at in range(0, array.nbytes, _CHUNK_BYTES):
          chunk = bytes(data[at : at + _CHUNK_BYTES])
          files[shard].write(chunk)
          crc = google_crc32c.extend(crc, chunk)
        entries[key] = _pack_entry(array, shard, sizes[shard], mask_crc(crc))
        sizes[shard] += array.nbytes
      header = b"\x08" + varint(num_shards) + b"\x1a\x02\x08\x01"  # little-endian, producer 1
      index = stack.enter_context(open(parts[-1], "xb"))
      index.write(pack_table([(b"", header), *sorted(entries.items())], block_bytes))
      for file in [*files, index]:
        file.flush()
        os.fsync(file.fileno())
    for part, target in zip(parts, targets, strict=True):
      os.rename(part, target)
  except OSError as error:
    raise UserError(
      f"checkpoint to write: {prefix}: {error.strerror}; expected a place to write to"
    ) from error
  finally:
    for part in parts:
      with contextlib.suppress(FileNotFoundError):
        os.remove(part)


def _pack_entry(array: np.ndarray, shard: int, offset: int, crc: int) -> bytes:
  def scalar(number: int, value: int) -> bytes:
    return bytes([number << 3]) + varint(value) if value else b""

  dims = b""
  for size in array.shape:
    dim = scalar(1, size)
    dims += b"\x12" + varint(len(dim)) + dim
  return (
    scalar(1, _DTYPE_CODES[array.dtype])
    + (b"\x12" + varint(len(dims)) + dims)
    + scalar(3, shard)
    + scalar(4, offset)
    + scalar(5, array.nbytes)
    + b"\x35"
    + struct.pack("<I", crc)
  )
