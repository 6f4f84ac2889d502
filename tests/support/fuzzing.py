"""Damage to files of checkpoints, byte by byte and in what they mean, and bounds on reading them."""

import contextlib
import json
import os
import pickle
import signal
import struct
import tracemalloc

import jax
import numpy as np

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import abstract_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained import formats
from igpt_jax.pretrained.leveldb_table import Malformed, pack_table, table_entries, varint
from igpt_jax.pretrained.tensor_bundle import _fields

CONFIG = ImageGPTConfig(n_layer=2, n_head=2, n_embd=8, n_vocab=16, n_positions=9)


MUTATIONS = 100


# The checkpoint has 10 kB; what is refused must not have cost more than parsing it.
MAX_PYTHON_BYTES = 16 << 20


MAX_PROCESS_BYTES = 300 << 20


HANG_S = 30  # ends a loop that would never end; no judgement of speed


NUMBERS = [
  0,
  1,
  2,
  7,
  255,
  2**15,
  2**31 - 1,
  2**31,
  2**32,
  2**40,
  2**62,
  2**63 - 1,
  2**63,
  2**64 - 1,
]


STRINGS = [
  "",
  ".",
  "..",
  "../../x",
  "/etc/passwd",
  "a\0b",
  "x" * 5000,
  "\u202e",
  "model/wte",
  "%s{0}",
]


VALUES = [
  *(None, True, -1, -(2**70), 10**30, 0.5, 1e308, float("nan"), float("inf"), [], {}, [[]]),
  *([[1, 2, 3]] * 3, [[0.0] * 3] * 16, {"a": {"b": [1]}}, *NUMBERS, *STRINGS),
]


DISGUISES = [
  b"",
  b"\0",
  pickle.dumps({"a": np.zeros(3)}),
  b"PK\x03\x04" + bytes(100),
  b"\x7fELF" + bytes(64),
  b"\x93NUMPY\x01\x00\xff\xff",
  b"[" * 100_000,
  b'{"a":' * 50_000,
  b"9" * 100_000,
  bytes(1000),
  b"\xff" * 1000,
]


def pick(rng, options):
  return options[int(rng.integers(len(options)))]


def mutate_bytes(rng, data):
  """One to three mutations that know nothing of the format."""
  for _ in range(int(rng.integers(1, 4))):
    at, length = (int(rng.integers(len(data) + 1)) for _ in range(2))
    end = min(len(data), at + int(rng.integers(1, 64)))
    operation = rng.integers(8)
    if operation == 0:
      data = data[:at]
    elif operation == 1:
      data = data[at:] if rng.integers(2) else data + bytes(length)
    elif operation == 2 and data:
      at = min(at, len(data) - 1)
      data = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    elif operation == 3:
      data = data[:at] + rng.bytes(end - at) + data[end:]
    elif operation == 4:
      data = data[:at] + pick(rng, [b"\0", b"\xff"]) * (end - at) + data[end:]
    elif operation == 5:
      data = data[:at] + data[end:]
    elif operation == 6:
      data = data[:at] + data[at:end] * int(rng.integers(2, 9)) + data[end:]
    elif rng.integers(4) == 0:
      data = pick(rng, DISGUISES)
  return data


def mutate_value(rng, value):
  """One change somewhere inside JSON-like data: replaced, removed, added or renamed."""
  if isinstance(value, dict) and value and rng.integers(5):
    key = pick(rng, sorted(value))
    operation = rng.integers(6)
    rest = {name: item for name, item in value.items() if name != key}
    if operation == 0:
      return rest
    if operation == 1:
      return rest | {pick(rng, STRINGS): value[key]}
    return value | {key: mutate_value(rng, value[key])}
  if isinstance(value, list) and value and rng.integers(3):
    at = int(rng.integers(len(value)))
    if rng.integers(4) == 0:
      return value[:at] + value[at + 1 :]
    return [*value[:at], mutate_value(rng, value[at]), *value[at + 1 :]]
  return pick(rng, VALUES)


def mutate_json(rng, data):
  if rng.integers(2):
    return mutate_bytes(rng, data)
  value = json.loads(data)
  for _ in range(int(rng.integers(1, 4))):
    value = mutate_value(rng, value)
  return json.dumps(value).encode()


def mutate_safetensors(rng, data):
  """The header's JSON, put back with a right length or a wrong one."""
  if rng.integers(3) == 0:
    return mutate_bytes(rng, data)
  (length,) = struct.unpack("<Q", data[:8])
  header = json.dumps(mutate_value(rng, json.loads(data[8 : 8 + length]))).encode()
  stated = len(header) if rng.integers(5) else pick(rng, NUMBERS)
  return struct.pack("<Q", stated) + header + data[8 + length :]


def pack_fields(fields):
  out = b""
  for number, value in fields:
    if isinstance(value, bytes):
      out += varint(number << 3 | 2) + varint(len(value)) + value
    elif number == 6:  # the CRC
      out += varint(number << 3 | 5) + struct.pack("<I", value & 0xFFFFFFFF)
    else:
      out += varint(number << 3) + varint(value % 2**64)
  return out


def mutate_message(rng, data, depth=0):
  """A protocol buffer with one field changed, or a nested one in it."""
  fields = list(_fields(data))
  if not fields:
    return pack_fields([(int(rng.integers(1, 9)), pick(rng, NUMBERS))])
  at = int(rng.integers(len(fields)))
  number, value = fields[at]
  operation = rng.integers(6)
  if operation == 0:
    del fields[at]
  elif operation == 1:
    fields.insert(at, fields[at])
  elif operation == 2:
    fields[at] = (int(rng.integers(1, 9)), value)
  elif isinstance(value, bytes):
    with contextlib.suppress(Malformed):  # bytes that aren't a message stay as they are
      fields[at] = (number, mutate_message(rng, value, depth + 1) if depth < 3 else rng.bytes(5))
  else:
    near = [value + 1, max(value - 1, 0), value * 2, value // 2]
    fields[at] = (number, pick(rng, near + NUMBERS))
  return pack_fields(fields)


def mutate_index(rng, data):
  """The entries' meaning, with the table's checksums right again."""
  entries = list(table_entries(data))
  for _ in range(int(rng.integers(1, 4))):
    at, other = (int(rng.integers(len(entries))) for _ in range(2))
    key, value = entries[at]
    operation = rng.integers(10)
    if operation == 0 and len(entries) > 1:
      del entries[at]
    elif operation == 1:
      entries[at] = (pick(rng, STRINGS).encode(), value)
    elif operation == 2:
      entries[at] = (key, entries[other][1])
    elif operation == 3:
      entries[at] = (key, mutate_bytes(rng, value))
    elif operation == 4:
      entries.append((pick(rng, [key, b"\xff\xfe", key + b"x", b"z" * 600]), value))
    elif operation == 5:
      entries += [(key + b"%05d" % i, value) for i in range(200)]
    else:
      with contextlib.suppress(Malformed):  # an earlier mutation's work
        entries[at] = (key, mutate_message(rng, value))
  if rng.integers(4):
    entries.sort()
  return pack_table(entries, pick(rng, [1, 100, 1 << 18]))


def mutate_npy(rng, data):
  """The header's Python literal, or bytes."""
  if rng.integers(2):
    return mutate_bytes(rng, data)
  shape = pick(
    rng,
    [
      "(16, 3)",
      "(2**60, 3)",
      "(1152921504606846976, 3)",
      "(-1, 3)",
      "16",
      "(16,)",
      "(0, 3)",
      "(16, 3, 1)",
      "__import__('os')",
      "(" * 2000,
      "(1e9, 3)",
    ],
  )
  kind = pick(
    rng, ["'<f4'", "'|O'", "'|S99999999'", "'<f8'", "'V12'", "[('a', '<f4')]", "'<c8'", "1"]
  )
  header = (
    f"{{'descr': {kind}, 'fortran_order': {pick(rng, ['False', 'True', '3'])}, 'shape': {shape}, }}"
  )
  header = header.encode() + b"\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data[128:]


def hang(*_):
  raise AssertionError(f"still reading after {HANG_S} s")


@contextlib.contextmanager
def bounded():
  """Fails if what runs inside hangs or allocates much."""
  handler = signal.signal(signal.SIGALRM, hang)
  signal.alarm(HANG_S)
  tracemalloc.reset_peak()
  before = tracemalloc.get_traced_memory()[0]
  try:
    yield
    peak = tracemalloc.get_traced_memory()[1] - before
    assert peak < MAX_PYTHON_BYTES, f"{peak} bytes allocated"
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def outcome(path, params, exact):
  """None if refused, else the parameters, whose shapes must be a model's."""
  try:
    loaded = formats.load(path)
  except UserError as error:
    assert 20 < len(str(error)) < 2000 and "\n" not in str(error).strip(), str(error)[:500]
    return None
  shapes = jax.tree.map(lambda leaf: leaf.shape, loaded.params)
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract_params(loaded.config))
  if exact:
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    for found, expected in zip(
      jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True
    ):
      np.testing.assert_array_equal(found, expected)
  return loaded


class Canary:
  """Pickled, it makes a directory when it is loaded."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@contextlib.contextmanager
def bounded_tracing():
  tracemalloc.start()
  try:
    with bounded():
      yield
  finally:
    tracemalloc.stop()
