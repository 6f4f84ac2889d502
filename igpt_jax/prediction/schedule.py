"""Prediction of the seconds that a compiled TPU program takes.

The program is scheduled: its operations run one after the other, in the order of its text. An operation
takes the cycles that the compiler estimated, times the iterations of its loops. A collective occupies
the links for its bytes over their bandwidth; an asynchronous one is hidden as far as there is other
work before it is awaited, and so are copies to and from the host's memory. What crosses the network
between slices, which the compiler writes as a send and a receipt by the host, takes its bytes over a
bandwidth and no latency. Prefetches between HBM and VMEM are taken to be hidden. Kernels carry no estimate;
the caller provides it.

Between versions of one program this is good to a few percent. The absolute time is only good to 25-30%
either way; it includes no input, launch overhead or stragglers.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable

from igpt_jax.prediction.hlo import Operation, Program, size_of

COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_LATENCY = 1e-6  # seconds a hop
_HOST_BANDWIDTH = 16e9  # bytes a second between a chip and its host's memory, either way

KernelCycles = Callable[[Operation], float]


@dataclasses.dataclass(frozen=True)
class Links:
  """A slice's interconnect.

  Attributes:
    bandwidth: bytes a second and direction of one link.
    coordinates: coordinates of the devices, in the order of the mesh.
    wrapped: for every dimension of the topology, True if it is a ring, else a line.
  """

  bandwidth: float
  coordinates: tuple[tuple[int, ...], ...]
  wrapped: tuple[bool, ...]

  def seconds(self, kind: str, bytes_whole: float, group: tuple[int, ...]) -> float:
    """Seconds of one collective over a group of devices.

    Args:
      kind: one of COLLECTIVES.
      bytes_whole: bytes of the whole array that is gathered, reduced or permuted.
      group: devices, as indices into `coordinates`.
    """
    if len(group) < 2 or not bytes_whole:
      return 0.0
    spots = [self.coordinates[device] for device in group]
    spans = [len({spot[axis] for spot in spots}) for axis in range(len(self.wrapped))]
    # A ring uses both directions for every byte; on a line half of them idle on average.
    dimensions = zip(spans, self.wrapped, strict=True)
    directions = sum(2 if wrapped and n > 2 else 1 for n, wrapped in dimensions if n > 1)
    speed = self.bandwidth * max(directions, 1)
    hops = sum(span - 1 for span in spans)
    if kind == "collective-permute":
      return bytes_whole / self.bandwidth + _LATENCY
    times = 2 if kind == "all-reduce" else 1
    return times * (bytes_whole * (len(group) - 1) / len(group) / speed + hops * _LATENCY)


@dataclasses.dataclass(frozen=True)
class Network:
  """What joins slices.

  Attributes:
    slices: their number.
    bandwidth: bytes a second that a device sends, while it receives as many.
  """

  slices: int = 1
  bandwidth: float = math.inf

  def sent(self, kind: str, held: float) -> float:
    """Bytes that a device sends to those of other slices.

    Args:
      kind: a collective's name, such as "all-reduce".
      held: bytes that the device hands to it.
    """
    others = self.slices - 1
    shares = {"all-reduce": 2 * others / self.slices, "all-gather": others, "collective-permute": 1}
    return held * shares.get(kind, others / self.slices)


@dataclasses.dataclass
class Crossing:
  """All that a device sends over the network in a step.

  Attributes:
    count: number of transfers.
    bytes: bytes that it sends.
    seconds: the time that takes.
    exposed: seconds of waiting that nothing hides.
  """

  count: int = 0
  bytes: float = 0.0
  seconds: float = 0.0
  exposed: float = 0.0


@dataclasses.dataclass
class Collective:
  """All collectives of a kind: how many run in a step, their bytes per device and their seconds."""

  count: int = 0
  bytes: float = 0.0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Predicted times of a step, in seconds.

  Attributes:
    seconds: the whole step.
    compute: operations with an estimate of the compiler, and kernels.
    kernels: the kernels' part of `compute`.
    exposed: waiting for collectives, host transfers and the network that nothing hides.
    collectives: totals by kind, within a slice.
    by_origin: seconds of compute by the JAX operation that they come from, largest first.
    network: total of what crosses the network between slices.
  """

  seconds: float
  compute: float
  kernels: float
  exposed: float
  collectives: dict[str, Collective]
  by_origin: dict[str, float]
  network: Crossing


class _Timeline:
  """Walk through a program in order, with clocks for the core, the links, host transfers and network."""

  def __init__(
    self,
    program: Program,
    clock: float,
    links: Links,
    network: Network,
    kernel_cycles: KernelCycles,
  ):
    self.program, self.clock, self.links, self.kernel_cycles = program, clock, links, kernel_cycles
    self.network = network
    self.now = self.compute = self.kernels = self.exposed = 0.0
    self.links_free = self.host_free = self.network_free = 0.0
    self.crossing = Crossing()
    self.received: dict[str, str] = {}  # a receipt -> the name that it shares with its send
    self.collectives: dict[str, Collective] = collections.defaultdict(Collective)
    self.by_origin: dict[str, float] = collections.defaultdict(float)
    self.begun_apart = _begun_apart(program)

  def run(self, computation: str, times: int = 1) -> None:
    arrival: dict[str, float] = {}
    for operation in self.program.computations[computation]:
      self._step(operation, arrival, times)

  def _step(self, operation: Operation, arrival: dict[str, float], times: int) -> None:
    opcode = operation.opcode
    if opcode == "while":
      (body,) = operation.called["body"]
      trips = self.program.trips(operation)
      began = self.now
      self.run(body, times * trips)
      # One iteration was walked; the others take as long.
      extra = (self.now - began) * (trips - 1)
      self.now += extra
      self.links_free += extra
      self.host_free += extra
      self.network_free += extra
      return
    if opcode in ("call", "conditional"):
      for name in itertools.chain.from_iterable(operation.called.values()):
        self.run(name, times)
      return
    if opcode.removesuffix("-start") in COLLECTIVES:
      done = self._transfer(operation, opcode.removesuffix("-start"), times)
      if opcode.endswith("-start"):
        arrival[operation.name] = done
      else:
        self._wait(done, times)
      return
    if opcode.removesuffix("-done") in COLLECTIVES:
      self._wait(arrival[operation.operands[0]], times)
      return
    if opcode in ("call-start", "async-start"):  # runs on a SparseCore
      collective = self._within(operation)
      if collective is not None:
        arrival[operation.name] = self._transfer(collective, collective.opcode, times)
        return
    if opcode in ("send", "recv") and "megascale" in operation.attributes:
      name = _attribute(operation, "_xla_host_transfer_rendezvous")
      if opcode == "send":
        arrival[name] = self._cross(operation, times)
      else:
        self.received[operation.name] = name
      return
    if opcode == "recv-done" and operation.operands[0] in self.received:
      before = self.exposed
      self._wait(arrival.pop(self.received[operation.operands[0]]), times)
      self.crossing.exposed += self.exposed - before
      return
    if opcode.endswith("-start") and "S(5)" in operation.shape:
      arrival[operation.name] = self._to_or_from_host(operation)
      return
    if opcode.endswith("-done") and operation.operands and operation.operands[0] in arrival:
      self._wait(arrival.pop(operation.operands[0]), times)
      return
    started = None
    collective = self._within(operation) if opcode == "fusion" else None
    if collective is not None:
      (name,) = operation.called["calls"]
      inner = self.program.computations[name]
      targets = {o.target for o in inner}
      if "AsyncCollectiveStart" in targets:
        started = collective
      elif "AsyncCollectiveDone" in targets:
        self._wait(arrival.pop(_channel(collective), 0.0), times)
      elif _channel(collective) not in self.begun_apart:
        # Of the sum a device only takes its own part, so no more than that is sent.
        kind = collective.opcode
        if kind == "all-reduce" and any(o.opcode == "dynamic-slice" for o in inner):
          kind = "reduce-scatter"
        self._wait(self._transfer(collective, kind, times, collective.bytes), times)
    if operation.target == "tpu_custom_call":
      seconds = self.kernel_cycles(operation) / self.clock
      self.kernels += seconds * times
    else:
      seconds = operation.cycles / self.clock
    self.now += seconds
    self.compute += seconds * times
    if seconds:
      self.by_origin[origin(operation)] += seconds * times
    if started is not None:
      arrival[_channel(started)] = self._transfer(started, started.opcode, times)

  def _within(self, operation: Operation) -> Operation | None:
    """The first collective in the computations that an operation calls, if any."""
    called = itertools.chain.from_iterable(operation.called.values())
    inner = (o for name in called for o in self.program.computations[name])
    return next((o for o in inner if o.opcode in COLLECTIVES), None)

  def _transfer(
    self, operation: Operation, kind: str, times: int, whole: float | None = None
  ) -> float:
    """Puts a collective on the links; returns the time at which it ends."""
    whole = _bytes_whole(operation, kind) if whole is None else whole
    group = replica_group(operation.attributes, len(self.links.coordinates))
    seconds = self.links.seconds(kind, whole, group)
    self.links_free = max(self.now, self.links_free) + seconds
    total = self.collectives[kind]
    total.count += times
    total.bytes += whole * times
    total.seconds += seconds * times
    return self.links_free

  def _to_or_from_host(self, operation: Operation) -> float:
    """Starts a copy between the chip and its host's memory (space 5); returns the time at which it ends."""
    moved = max(size_of(array) for array in _arrays(operation.shape) if "S(5)" not in array)
    self.host_free = max(self.now, self.host_free) + moved / _HOST_BANDWIDTH
    return self.host_free

  def _cross(self, operation: Operation, times: int) -> float:
    """Puts a send on the network; returns the time at which its sum, or the like, has arrived."""
    kind = _attribute(operation, "_xla_megascale_transfer_type").lower().replace("_", "-")
    sent = self.network.sent(kind, size_of(_arrays(operation.shape)[0]))
    seconds = sent / self.network.bandwidth
    self.network_free = max(self.now, self.network_free) + seconds
    self.crossing.count += times
    self.crossing.bytes += sent * times
    self.crossing.seconds += seconds * times
    return self.network_free

  def _wait(self, until: float, times: int) -> None:
    waited = max(until - self.now, 0.0)
    self.now += waited
    self.exposed += waited * times


def predict(
  program: Program,
  *,
  clock: float,
  links: Links,
  kernel_cycles: KernelCycles,
  network: Network = Network(),
) -> Prediction:
  """Predicts the time of one run of a program.

  Args:
    program: a compiled, scheduled module for TPUs.
    clock: cycles a second.
    links: the interconnect of the slice that it was compiled for.
    kernel_cycles: returns the cycles of a Pallas kernel (a custom call).
    network: what joins its slices, if there are several.
  """
  timeline = _Timeline(program, clock, links, network, kernel_cycles)
  timeline.run(program.entry)
  ordered = sorted(timeline.by_origin.items(), key=lambda item: -item[1])
  return Prediction(
    seconds=timeline.now,
    compute=timeline.compute,
    kernels=timeline.kernels,
    exposed=timeline.exposed,
    collectives=dict(timeline.collectives),
    by_origin=dict(ordered),
    network=timeline.crossing,
  )


def replica_group(attributes: str, n_devices: int) -> tuple[int, ...]:
  """Returns the first group of devices that a collective runs in, from its attributes."""
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\S+\s*)?\{([^}]*)\}", attributes
  )
  if named:
    sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
    chosen = set(re.findall(r"'([^']+)'", named[2]))
    group, stride = [0], 1
    for axis, size in reversed(sizes.items()):
      if axis in chosen:
        group = [base + stride * i for i in range(size) for base in group]
      stride *= size
    return tuple(sorted(device for device in group if device < max(n_devices, stride)))
  tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if tiled:
    dims = [int(n) for n in tiled[3].split(",")]
    order = [int(n) for n in tiled[4].split(",")] if tiled[4] else list(range(len(dims)))
    strides = [1] * len(dims)
    for axis in range(len(dims) - 2, -1, -1):
      strides[axis] = strides[axis + 1] * dims[axis + 1]
    flat = [0]
    for axis in order:
      flat = [base + strides[axis] * i for base in flat for i in range(dims[axis])]
    return tuple(flat[: int(tiled[2])])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  if listed:
    return tuple(int(n) for n in listed[1].split(","))
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
  if pairs:
    return int(pairs[1]), int(pairs[2])
  return tuple(range(n_devices))


def _bytes_whole(operation: Operation, kind: str) -> float:
  """Bytes of the whole array: after a gather, or before a scatter."""
  shape = operation.shape
  if operation.opcode.endswith("-start") and shape.startswith("("):
    return float(max(size_of(array) for array in _arrays(shape)))
  parts = len(replica_group(operation.attributes, 1)) if kind == "reduce-scatter" else 1
  return float(size_of(shape)) * max(parts, 1)


def _arrays(shape: str) -> list[str]:
  """The array types, with layouts, in a tuple's type."""
  return re.findall(r"\b[a-z][a-z0-9]*\[[0-9,]*\](?:\{[^}]*\})?", shape)


def _attribute(operation: Operation, name: str) -> str:
  """The text of a frontend attribute; "" if there is none."""
  match = re.search(rf'{name}="([^"]*)"', operation.attributes)
  return match[1] if match else ""


def _begun_apart(program: Program) -> set[str]:
  """Channels of collectives that one fusion starts and another ends; fusions in between repeat them."""
  return {
    _channel(operation)
    for inner in program.computations.values()
    if any(operation.target == "AsyncCollectiveStart" for operation in inner)
    for operation in inner
    if operation.opcode in COLLECTIVES
  }


def _channel(operation: Operation) -> str:
  match = re.search(r"channel_id=(\d+)", operation.attributes)
  return f"channel {match[1]}" if match else operation.name


def origin(operation: Operation) -> str:
  """Returns the JAX operation that an operation comes from, without the tracer's wrapping."""
  if operation.target == "tpu_custom_call":
    return operation.name.split(".")[0]
  return re.sub(r"(closed_call|checkpoint|while|body|jit\(train_step\))/", "", operation.origin)
