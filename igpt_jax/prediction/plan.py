"""Search for the mesh, batch and remat that train fastest on a slice.

Candidates are ordered by arithmetic (FLOPs, bytes of state and activations), which costs nothing; the
best of them are compiled, and the compiler's figures decide.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.parallel import hardware, sharding
from igpt_jax.prediction import forecast as forecasting
from igpt_jax.prediction.forecast import Forecast, Training
from igpt_jax.prediction.topology import Topology
from igpt_jax.training import arrangement
from igpt_jax.training.compilation import flops_per_image

COMPILED = 5  # candidates that are compiled
_BATCHES_TRIED = 3
LARGEST_BATCH = 4  # times the config's; one image per device is considered in any case
_TENSOR = (1, 2, 4)

# FLOPs recomputed, as a share of the step's.
_AGAIN = {"none": 0.0, "names": 0.03, "full": 0.3}
_EFFICIENCY = 0.7  # share of the matrix units' peak that a step reaches


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to train."""

  training: Training
  mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Compiled(Candidate):
  """One way to train, and its forecast."""

  forecast: Forecast

  @property
  def images_per_second(self) -> float:
    """Predicted images per second; 0 if unknown or if the step doesn't fit."""
    predicted = self.forecast.prediction
    if not predicted or not self.forecast.memory.fits:
      return 0.0
    return self.training.batch_size / predicted.seconds


def search(
  training: Training, topology: Topology, report: Callable[[str], None]
) -> tuple[Compiled, list[Compiled]]:
  """Returns the fastest of the compiled candidates that fit, and all that were compiled.

  Args:
    training: the run; its batch is the smallest considered.
    topology: the slice to train on.
    report: called with a line on every candidate.

  Raises:
    UserError: nothing fits; it says the least memory that was needed.
  """
  # What is chosen where nobody plans comes first: the others are to beat it.
  ordered = sorted(
    candidates(training, topology), key=lambda c: (not _by_rule(c, topology), estimate(c, topology))
  )
  report(f"plan: {len(ordered)} candidates on {topology.title}, compiling up to {COMPILED}")
  tried: list[Compiled] = []

  def compile_first(left: list[Candidate]) -> None:
    training, mesh = left[0].training, left[0].mesh
    forecast = forecasting.training_step(training, topology, mesh)
    tried.append(Compiled(training, mesh, forecast))
    report(line(tried[-1], topology))
    ordered.remove(left[0])

  # Arithmetic doesn't show how a batch per device affects the compiler's use of fast memory: so first
  # compile the most promising candidate of every batch, then more of the best batch.
  for batch in sorted({candidate.training.batch_size for candidate in ordered})[:_BATCHES_TRIED]:
    compile_first([c for c in ordered if c.training.batch_size == batch])
  while ordered and len(tried) < COMPILED:
    best = max(tried, key=lambda candidate: candidate.images_per_second).training.batch_size
    compile_first([c for c in ordered if c.training.batch_size == best] or ordered)
  fitting = [candidate for candidate in tried if candidate.images_per_second]
  if not fitting:
    least = min((c.forecast.memory.needed for c in tried), default=0)
    raise UserError(
      f"config.compile.plan: nothing tried fits {topology.title}"
      + (f"; the least needed {least / 2**30:.1f} GiB a device" if least else "")
      + f" of {topology.chip.hbm_bytes / 2**30:.1f}; fix: a larger slice, or a smaller train.batch_size"
    )
  return max(fitting, key=lambda candidate: candidate.images_per_second), tried


def candidates(training: Training, topology: Topology) -> Iterator[Candidate]:
  """Yields the candidates that divide evenly and fit according to arithmetic."""
  devices, slices = list(topology.devices), topology.slices
  n = len(devices) // slices
  for tensor, remat in itertools.product(_TENSOR, _AGAIN):
    if n % tensor:
      continue
    shards = n // tensor
    fsdp_sizes = [size for size in range(1, shards + 1) if shards % size == 0]
    for batch, fsdp in itertools.product(
      _batches(training.batch_size, slices * shards), fsdp_sizes
    ):
      model = dataclasses.replace(training.model, remat=remat)
      mesh = sharding.make_mesh(shards // fsdp, fsdp, tensor, slices, devices)
      try:
        sharding.check_model_fits(mesh, n_head=model.n_head, n_embd=model.n_embd)
      except UserError:
        continue
      changed = dataclasses.replace(training, model=model, batch_size=batch, accumulate=1)
      if memory(changed, mesh) < topology.chip.hbm_bytes:
        yield Candidate(changed, mesh)


def _by_rule(candidate: Candidate, topology: Topology) -> bool:
  """True for the arrangement that training/arrangement.py chooses for the candidate's batch."""
  model, mesh, batch = candidate.training.model, candidate.mesh, candidate.training.batch_size
  in_slice, kind = mesh.size // topology.slices, mesh.devices.flat[0].device_kind
  fsdp = arrangement.fsdp(model, batch, in_slice, kind, slices=topology.slices)
  if sharding.weight_shards(mesh) != fsdp or sharding.batch_shards(mesh) != mesh.size:
    return False
  return model.remat == arrangement.remat(model, batch // mesh.size, mesh)


def _batches(smallest: int, shards: int) -> list[int]:
  """Multiples of the shards by powers of two, from the config's batch up."""
  largest = max(LARGEST_BATCH * smallest, shards)
  multiples = [shards * 2**power for power in range(12)]
  return [batch for batch in multiples if smallest <= batch <= largest]


def memory(training: Training, mesh: Mesh) -> float:
  """Bytes per device, by arithmetic: within about a fifth of the compiler's figure."""
  images = sharding.batch_size_per_shard(mesh, training.batch_size, accumulate=training.accumulate)
  tensor = mesh.size // sharding.batch_shards(mesh)
  kind = mesh.devices.flat[0].device_kind
  return arrangement.step_bytes(training.model, images, kind, sharding.weight_shards(mesh), tensor)


def estimate(candidate: Candidate, topology: Topology) -> tuple[float, float]:
  """Key to order candidates by: seconds per image, by arithmetic; of equals the smaller batch."""
  training, mesh = candidate.training, candidate.mesh
  model = training.model
  everyone = tuple(range(mesh.size // topology.slices))
  links = topology.links(list(mesh.devices.flat))
  tensor = mesh.size // sharding.batch_shards(mesh)
  parameters = count_params(model)

  flops = flops_per_image(model) * training.batch_size / mesh.size * (1 + _AGAIN[model.remat])
  if model.remat == "none":
    flops *= 1.3  # writing and reading all activations costs more than a little recomputing
  seconds = flops / topology.chip.peak_flops / _EFFICIENCY
  # Nothing hides the sum of gradients, which the compiler scatters if weights are split over a part of a
  # slice, over all of a few chips, or of one of several slices; else it sums them whole on every chip. Rows
  # that don't fill the tiles of memory are gathered by an all-reduce, which nothing hides either.
  split = sharding.weight_shards(mesh) // tensor
  few = len(everyone) <= arrangement.FEW or topology.slices > 1
  sums = 1.0 if split == 1 or (split == len(everyone) and not few) else 0.6
  if model.n_embd // sharding.weight_shards(mesh) % 32:
    sums = 3.0
  seconds += sums * links.seconds("all-reduce", 2 * parameters / tensor, everyone[::tensor])
  if tensor > 1:
    positions = training.batch_size / sharding.batch_shards(mesh) * model.n_positions
    summed = links.seconds("all-reduce", 2 * positions * model.n_embd, everyone[:tensor])
    seconds += 4 * model.n_layer * summed
  if topology.slices > 1:  # nothing is taken to hide the network
    network, held = topology.between_slices, 4 * parameters / len(everyone)
    seconds += network.sent("all-reduce", held) / network.bandwidth
  # Adam reads and writes 28 bytes a parameter; a chip does some 250 FLOPs in the time of a byte.
  seconds += 28 * parameters / sharding.weight_shards(mesh) * 250 / topology.chip.peak_flops
  return seconds / training.batch_size, training.batch_size


def row(candidate: Compiled) -> dict:
  """Returns the candidate's entry in compile.json."""
  forecast = candidate.forecast
  values = {
    "mesh": dict(candidate.mesh.shape),
    "batch_size": candidate.training.batch_size,
    "remat": candidate.training.model.remat,
    "fits": forecast.memory.fits,
    "bytes_per_device": forecast.memory.needed,
  }
  if forecast.prediction is not None:
    values["step_seconds"] = forecast.prediction.seconds
    values["images_per_second"] = candidate.images_per_second
  return values


def line(candidate: Compiled, topology: Topology) -> str:
  """Returns the candidate's line of the report."""
  forecast, training = candidate.forecast, candidate.training
  text = (
    f"  {hardware.describe_mesh(candidate.mesh)}, batch {training.batch_size}, remat {training.model.remat}: "
    f"{forecast.memory.needed / 2**30:.1f} GiB"
  )
  if not forecast.memory.fits or forecast.prediction is None:
    return f"{text}, doesn't fit"
  peak = topology.chip.peak_flops * candidate.mesh.size
  mfu = flops_per_image(training.model) * candidate.images_per_second / peak
  return f"{text}, {1e3 * forecast.prediction.seconds:.1f} ms, MFU {mfu:.1%}"


def remedies(training: Training, mesh: Mesh) -> list[str]:
  """Returns fixes for a step that doesn't fit, the cheapest first."""
  model = training.model
  fixes = []
  if model.remat != "full":
    fixes.append(f"--config.model.remat={'names' if model.remat == 'none' else 'full'}")
  weights, most = sharding.weight_shards(mesh), sharding.slice_size(mesh)
  if weights < most and model.n_embd % most == 0:
    held = arrangement.state_bytes(model, weights) / 2**30
    fixes.append(
      f"--config.mesh.data=1 --config.mesh.fsdp=-1 (the state takes about {held:.1f} GiB a device "
      f"now, {held * weights / most:.1f} then)"
    )
  shards = sharding.batch_shards(mesh)
  if training.batch_size // shards // training.accumulate > 1:
    fixes.append(f"--config.train.accumulate={2 * training.accumulate}")
  return [*fixes, "a larger slice", "--config.compile.plan=True, which looks for what fits"]
