"""TPU slices as they are rented: types, topologies, chips and hosts. Imports no jax, which launchers may lack."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable

from igpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
  """A generation of TPUs; from Google Cloud's pages on each TPU version, and GKE's on TPUs.

  Attributes:
    name: in topologies' names, "v5e:4x4".
    type: in types' names, "v5litepod-16".
    label: GKE's accelerator label; "": it isn't offered there.
    counted: what the number of a type's name counts for each chip: 1, or 2 cores.
    devices: JAX' devices for each chip.
    alone: most chips of a slice that is one host; others have 4 chips a host.
    vcpus: virtual CPUs of a host of 4 chips.
    shapes: topologies, small to large, the most compact first of those of one size.
    vcpus_alone: virtual CPUs of a host that has more chips than 4; 0: there is none.
  """

  name: str
  type: str
  label: str
  counted: int
  devices: int
  alone: int
  vcpus: int
  shapes: tuple[str, ...]
  vcpus_alone: int = 0


def _cubic(most: int) -> tuple[str, ...]:
  """Returns shapes A ≤ B ≤ C of at most `most` chips: a few small ones, then multiples of 4."""
  larger = []
  for a in range(4, round(most ** (1 / 3)) + 1, 4):
    for b in range(a, math.isqrt(most // a) + 1, 4):
      larger += [(a, b, c) for c in range(b, most // (a * b) + 1, 4)]
  larger.sort(key=lambda shape: (math.prod(shape), shape[2]))
  return "2x2x1", "2x2x2", "2x2x4", "2x4x4", *("x".join(map(str, shape)) for shape in larger)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_V2 = ("2x2", "4x4", "8x8", "8x16", "16x16")
_V3 = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")
KINDS = {
  kind.name: kind
  for kind in (
    Kind("v2", "v2", "", 2, 2, 4, 96, _V2),
    Kind("v3", "v3", "", 2, 2, 4, 96, _V3),
    Kind("v4", "v4", "tpu-v4-podslice", 2, 1, 4, 240, _cubic(4_096)),
    Kind("v5e", "v5litepod", "tpu-v5-lite-podslice", 1, 1, 8, 112, _FLAT, 224),
    Kind("v5p", "v5p", "tpu-v5p-slice", 2, 1, 4, 208, _cubic(6_144)),
    Kind("v6e", "v6e", "tpu-v6e-slice", 1, 1, 8, 180, _FLAT, 180),
    Kind("tpu7x", "tpu7x", "tpu7x", 2, 2, 4, 224, _cubic(9_216)),
  )
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """One or several slices of a shape.

  Attributes:
    kind: the generation.
    shape: its topology, such as "4x4".
    count: number of slices.
  """

  kind: Kind
  shape: str
  count: int = 1

  @property
  def topology(self) -> str:
    """Name of one slice's topology: "v5e:4x4"."""
    return f"{self.kind.name}:{self.shape}"

  @property
  def title(self) -> str:
    """The topology's name, with the number of slices if there are several: "2×v5e:4x4"."""
    return self.topology if self.count == 1 else f"{self.count}×{self.topology}"

  @property
  def type(self) -> str:
    """Name of one slice's type: "v5litepod-16"."""
    return f"{self.kind.type}-{chips_of(self.shape) * self.kind.counted}"

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return chips_of(self.shape) * self.count

  @property
  def hosts(self) -> int:
    """Hosts of all slices."""
    chips = chips_of(self.shape)
    return self.count * (1 if chips <= self.kind.alone else chips // 4)

  @property
  def vcpus(self) -> int:
    """Virtual CPUs of each host; of one with fewer than 4 chips about."""
    if 4 * self.hosts < self.chips:
      return self.kind.vcpus_alone
    return self.kind.vcpus * min(chips_of(self.shape), 4) // 4

  @property
  def devices(self) -> int:
    """JAX' devices of one slice."""
    return chips_of(self.shape) * self.kind.devices

  def __str__(self) -> str:
    several = f"{self.count} × " if self.count > 1 else ""
    return f"{several}{self.type} ({self.topology})"


def chips_of(shape: str) -> int:
  return math.prod(int(n) for n in shape.split("x"))


def find(name: str, what: str) -> Slice:
  """Returns what a launcher asks for: TYPE or KIND:TOPOLOGY, after "Nx" if there are N slices.

  Args:
    name: such as "v5litepod-16", "v5p:4x4x4", "tpu-v5p-slice:4x4x4" (GKE's label) or "2xv5p-128".
    what: the option, for errors.

  Raises:
    UserError: there is no such slice; it names the nearest.
  """
  match = re.fullmatch(r"(?:(\d+)x)?([a-z][\w-]*?)(?:([-:])([\dx]+))?", name)
  count, word, mark, rest = match.groups(default="") if match else ("", name, "", "")
  kind = _kind(word, mark)
  if kind is None or (count and not int(count)):
    words = [kind.type for kind in KINDS.values()]
    near = [KINDS[word].type] if word in KINDS else difflib.get_close_matches(word, words, 1)
    meant = [f"{word}-{rest or '…'}" for word in near]
    raise UserError(
      f"{what}: {name!r}: no such TPU; expected a type, {', '.join(f'{w}-…' for w in words)}, or a "
      f"topology, such as v5p:4x4x4{''.join(f'; did you mean {word}' for word in meant)}"
    )
  if mark == ":":
    check_shape(kind, rest, name, what)
    return Slice(kind, rest, int(count or 1))
  shape = _types(kind).get(int(rest) if rest.isdigit() else 0)
  if shape is None:
    wanted = int(rest) if rest.isdigit() else 0
    near = ", ".join(f"{kind.type}-{number}" for number in _nearest(_types(kind), wanted))
    raise UserError(
      f"{what}: {name!r}: there is no such slice; expected a type that exists; nearest: {near}"
    )
  return Slice(kind, shape, int(count or 1))


def check_shape(kind: Kind, shape: str, name: str, what: str) -> None:
  """Raises UserError, naming the nearest, unless a generation has slices of a shape."""
  if shape in kind.shapes:
    return
  chips = chips_of(shape) if re.fullmatch(r"\d+(x\d+)*", shape) else 16
  compact = {chips_of(s): s for s in reversed(kind.shapes)}
  near = ", ".join(f"{kind.name}:{compact[size]}" for size in _nearest(compact, chips))
  cubic = kind.shapes[-1].count("x") == 2
  every = ", ".join(s for s in kind.shapes if not cubic or chips_of(s) <= 64)
  if cubic:
    every += f", and multiples of 4 in rising order, to {chips_of(kind.shapes[-1]):,} chips"
  raise UserError(
    f"{what}: {name!r}; {kind.name} has no slice {shape!r}; expected one that it has; nearest: {near}; "
    f"all: {every}"
  )


def _kind(word: str, mark: str) -> Kind | None:
  """Returns the generation that a type's or a topology's name begins with."""
  for kind in KINDS.values():
    if word in ((kind.name, kind.label) if mark == ":" else (kind.type,)):
      return kind
  return None


@functools.cache
def _types(kind: Kind) -> dict[int, str]:
  """Returns the numbers in a generation's types -> the topology that each type has."""
  return {chips_of(shape) * kind.counted: shape for shape in reversed(kind.shapes)}


def _nearest(sizes: Iterable[int], wanted: int) -> list[int]:
  """Returns the three of the sizes that are nearest to a wanted one by their ratio, in order."""
  return sorted(sorted(sizes, key=lambda size: abs(math.log(size / max(wanted, 1))))[:3])
