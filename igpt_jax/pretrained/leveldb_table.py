"""Reads and writes LevelDB's table format, the container of a checkpoint's index.

LevelDB bindings open a database directory, not one bare table, so this follows the description in
LevelDB's table_format.md. Only the container belongs here. Input is untrusted: bounds are checked
before slicing, every block's CRC-32C is checked, and violations raise `Malformed`, to which the
caller adds the file's name.
"""

import struct
from collections.abc import Iterator

import google_crc32c

MAX_KEY_BYTES = 512  # keys share prefixes, so a small file could decode into a large one
BLOCK_BYTES = 262144  # TensorFlow's block size
_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # compression type and masked CRC-32C after every block
_RESTART_INTERVAL = 16


class Malformed(Exception):
  """Bytes that violate the format."""


def mask_crc(crc: int) -> int:
  """Rotates and offsets a CRC as LevelDB stores it: data may itself hold CRCs."""
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_varint(data: bytes, at: int) -> tuple[int, int]:
  """Returns the unsigned varint at position `at` and the position after it."""
  value = 0
  for shift in range(0, 70, 7):
    if at >= len(data):
      raise Malformed("a number runs past the end")
    byte = data[at]
    at += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      if value >= 1 << 64:
        break
      return value, at
  raise Malformed("a number is longer than 64 bits")


def varint(value: int) -> bytes:
  """Encodes an unsigned integer as a varint."""
  out = bytearray()
  while value >= 0x80:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  out.append(value)
  return bytes(out)


def _read_block(table: bytes, offset: int, size: int) -> bytes:
  if offset + size + _TRAILER_BYTES > len(table):
    raise Malformed(f"a block at byte {offset} of {size} bytes runs past the end of the file")
  body = table[offset : offset + size + 1]
  (stored,) = struct.unpack_from("<I", table, offset + size + 1)
  if mask_crc(google_crc32c.value(body)) != stored:
    raise Malformed(f"the block at byte {offset} doesn't match its CRC")
  if body[-1]:
    raise Malformed(f"the block at byte {offset} is compressed, which TensorFlow never does")
  return body[:-1]


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
  """Yields a block's keys and values; a key is stored as a prefix of the last one and a suffix."""
  if len(block) < 4:
    raise Malformed("a block is too short")
  (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
  end = len(block) - 4 * (restarts + 1)
  if end < 0:
    raise Malformed("a block's restart points exceed it")
  at, key = 0, b""
  while at < end:
    shared, at = read_varint(block, at)
    unshared, at = read_varint(block, at)
    length, at = read_varint(block, at)
    if shared > len(key) or unshared + length > end - at:
      raise Malformed("an entry runs past the end of its block")
    if shared + unshared > MAX_KEY_BYTES:
      raise Malformed(f"a name is longer than {MAX_KEY_BYTES} bytes")
    key = key[:shared] + block[at : at + unshared]
    at += unshared
    yield key, block[at : at + length]
    at += length


def table_entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
  """Yields every (key, value) of a LevelDB table; keys are strictly increasing."""
  if len(table) < _FOOTER_BYTES:
    raise Malformed(f"it has {len(table)} bytes, fewer than a footer")
  footer = table[-_FOOTER_BYTES:]
  if int.from_bytes(footer[-8:], "little") != _MAGIC:
    raise Malformed("it doesn't end in the magic number of a LevelDB table")
  handle = []
  at = 0
  for _ in range(4):  # offset and size of the (empty) meta-index, then of the index of blocks
    value, at = read_varint(footer[:-8], at)
    handle.append(value)
  _read_block(table, *handle[:2])
  last = None
  budget = len(table)
  for _, value in _block_entries(_read_block(table, *handle[2:])):
    offset, at = read_varint(value, 0)
    size, at = read_varint(value, at)
    budget -= size + _TRAILER_BYTES
    if budget < 0:
      raise Malformed("its blocks overlap")
    for key, data in _block_entries(_read_block(table, offset, size)):
      if last is not None and key <= last:
        raise Malformed("its names aren't in order")
      last = key
      yield key, data


def _pack_block(entries: list[tuple[bytes, bytes]]) -> bytes:
  out, restarts, last = bytearray(), [0], b""
  for i, (key, value) in enumerate(entries):
    shared = 0
    if i % _RESTART_INTERVAL:
      pairs = enumerate(zip(last, key, strict=False))
      shared = next((at for at, (a, b) in pairs if a != b), min(len(last), len(key)))
    elif i:
      restarts.append(len(out))
    out += varint(shared) + varint(len(key) - shared) + varint(len(value))
    out += key[shared:] + value
    last = key
  out += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
  return bytes(out)


def pack_table(entries: list[tuple[bytes, bytes]], block_bytes: int) -> bytes:
  """Encodes sorted entries as a LevelDB table; one of a single block equals TensorFlow's bytes."""
  out = bytearray()

  def add(block_entries) -> bytes:
    block = _pack_block(block_entries) + b"\0"
    handle = varint(len(out)) + varint(len(block) - 1)
    out.extend(block + struct.pack("<I", mask_crc(google_crc32c.value(block))))
    return handle

  index, group, size = [], [], 0
  for i, (key, value) in enumerate(entries):
    group.append((key, value))
    size += len(key) + len(value)
    is_last = i + 1 == len(entries)
    if size >= block_bytes or is_last:
      # Any key from this one up to the next block's first is valid; LevelDB shortens the last one.
      short = key[:1] and key[0] < 0xFF
      separator = bytes([key[0] + 1]) if is_last and short else key
      index.append((separator, add(group)))
      group, size = [], 0
  handles = add([]) + add(index)
  return bytes(out) + handles.ljust(40, b"\0") + struct.pack("<Q", _MAGIC)
