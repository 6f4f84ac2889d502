"""Parser of a compiled program's text: computations, operations in scheduled order, sizes."""

import dataclasses
import functools
import math
import re

_BYTES = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|async_computation|branch_computations)="
  r"(?:\{([^}]*)\}|%?([\w.-]+))"
)


@dataclasses.dataclass(frozen=True)
class Operation:
  """One line of a computation.

  Attributes:
    name: its name without the percent sign.
    shape: its type as printed.
    opcode: "fusion", "while", "all-gather", "custom-call", …
    operands: names of its operands.
    attributes: the rest of the line.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  @functools.cached_property
  def bytes(self) -> int:
    """Bytes of the result; the sum over a tuple's arrays."""
    return size_of(self.shape)

  @functools.cached_property
  def called(self) -> dict[str, list[str]]:
    """Names of the computations that this one runs, by their role."""
    called: dict[str, list[str]] = {}
    for role, several, one in _CALLED.findall(self.attributes):
      names = [name.strip().lstrip("%") for name in several.split(",")] if several else [one]
      called.setdefault(role, []).extend(names)
    return called

  def _attribute(self, pattern: str) -> str:
    match = re.search(pattern, self.attributes)
    return match[1] if match else ""

  @functools.cached_property
  def cycles(self) -> int:
    """The compiler's estimate of the cycles it takes; 0 if there is none."""
    return int(self._attribute(r'"estimated_cycles":"(\d+)"') or 0)

  @property
  def moved(self) -> int:
    """Bytes between memory and cores that a kernel declares (`pl.CostEstimate.bytes_accessed`).

    Raises:
      ValueError: it declares none.
    """
    declared = self._attribute(r'"bytes_accessed":"(\d+)"')
    if not declared:
      raise ValueError(f"{self.name}: a kernel without a cost_estimate: its memory has no time")
    return int(declared)

  @property
  def target(self) -> str:
    """The target of a custom call; "" for other operations."""
    return self._attribute(r'custom_call_target="([^"]*)"')

  @property
  def origin(self) -> str:
    """The JAX operation that it came from, as the tracer named it."""
    return self._attribute(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled module.

  Attributes:
    computations: name -> operations, in scheduled order.
    entry: name of the entry computation.
  """

  computations: dict[str, list[Operation]]
  entry: str

  def trips(self, loop: Operation) -> int:
    """Number of iterations of a `lax.scan` loop: up to the constant that its condition compares with.

    They count from zero, unless the compiler has peeled the first ones off the loop.

    Raises:
      ValueError: its condition has no constant.
    """
    (condition,) = loop.called["condition"]
    inside = list(self._all(condition))
    constants = [value for value in map(_constant, inside) if value is not None]
    if not constants:
      raise ValueError(f"{loop.name}: no constant in its condition {condition}")
    return max(constants) - self._begin(loop, inside)

  def _begin(self, loop: Operation, condition: list[Operation]) -> int:
    """A loop's counter before its first iteration; zero if that isn't a constant."""
    read = [o.attributes for o in condition if o.opcode == "get-tuple-element"]
    counter = re.search(r"index=(\d+)", read[0]) if len(read) == 1 else None
    carry = self._named.get(loop.operands[0])
    if counter is None or carry is None or carry.opcode != "tuple":
      return 0
    value = self._named.get(carry.operands[int(counter[1])])
    while value is not None and value.opcode in ("copy", "bitcast", "convert"):
      value = self._named.get(value.operands[0])
    return (_constant(value) or 0) if value is not None else 0

  @functools.cached_property
  def _named(self) -> dict[str, Operation]:
    return {o.name: o for operations in self.computations.values() for o in operations}

  def _all(self, computation: str):
    """The operations of a computation and of those it calls."""
    for operation in self.computations[computation]:
      yield operation
      for names in operation.called.values():
        for name in names:
          yield from self._all(name)


def _constant(operation: Operation) -> int | None:
  """The value of an integer constant."""
  match = re.match(r"(-?\d+)\)", operation.attributes) if operation.opcode == "constant" else None
  return int(match[1]) if match else None


def size_of(shape: str) -> int:
  """Returns the bytes of all arrays in a printed shape."""

  def array_bytes(dtype: str, dims: str) -> float:
    return _BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)

  return round(sum(array_bytes(*array) for array in _ARRAY.findall(shape)))


def dims_of(shape: str) -> tuple[str, tuple[int, ...]]:
  """Returns the dtype (numpy's name) and dimensions of the first array in a printed shape."""
  dtype, dims = _ARRAY.findall(shape)[0]
  names = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "s32": "int32"}
  return names.get(dtype) or dtype, tuple(int(n) for n in dims.split(",") if n)


def parse(text: str) -> Program:
  """Parses `compiled.as_text()`.

  Raises:
    ValueError: it has no entry computation.
  """
  computations: dict[str, list[Operation]] = {}
  current, entry = None, None
  for line in text.splitlines():
    if current is None:
      head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
      if head:
        current = head[2]
        computations[current] = []
        entry = current if head[1] else entry
    elif line.startswith("}"):
      current = None
    else:
      operation = _operation(line)
      if operation is not None:
        computations[current].append(operation)
  if entry is None:
    raise ValueError("no entry computation in the compiled program's text")
  return Program(computations, entry)


def _operation(line: str) -> Operation | None:
  head = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
  if not head:
    return None
  rest = line[head.end() :]
  end = _closing(rest) if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  if opcode in ("constant", "parameter"):
    return Operation(head[1], shape, opcode, (), rest)
  end = _closing("(" + rest) - 1
  operands = tuple(re.findall(r"%([\w.-]+)", rest[: end - 1]))
  return Operation(head[1], shape, opcode, operands, rest[end:])


def _closing(text: str) -> int:
  """The index after the parenthesis that closes the one at the start of `text`."""
  depth = 0
  for at, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if not depth:
      return at + 1
  raise ValueError(f"unbalanced: {text[:80]}")
