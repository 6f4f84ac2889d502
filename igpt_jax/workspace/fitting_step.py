"""A training step in as few parts of its batch as fit the devices' memory, by the compiler's own account."""

import dataclasses
import math
import time

import jax
from jax.sharding import Mesh

from igpt_jax import units
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings, with_values
from igpt_jax.errors import DoesNotFit
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.training import compilation
from igpt_jax.training.optimizer import make_optimizer
from igpt_jax.workspace import measurements, memory
from igpt_jax.workspace.forecast_apart import OutOfTime

_ROOM = 0.95  # share of what the state leaves that activations are planned to take


@dataclasses.dataclass(frozen=True)
class FittingStep:
  """A compiled step that fits.

  Attributes:
    settings: the config's, with the number of parts in `train.accumulate`.
    compiled: the step.
    notes: why there are more parts than the config has, in words.
  """

  settings: Settings
  compiled: compilation.CompiledStep
  notes: list[str]


def compile_fitting(
  settings: Settings, model: ImageGPTConfig, mesh: Mesh, until: float = math.inf
) -> FittingStep:
  """Compiles the step; if it doesn't fit, in more parts. Collective: every process must call it.

  Raises:
    DoesNotFit: the state, or the step in the smallest parts, needs more memory than a device has.
    OutOfTime: it is later than `until` (`time.monotonic`), by the main process' clock, before a compile.
  """
  optimizer = make_optimizer(choices.optimizer_config(settings))
  memory.check_state(model, optimizer, mesh)
  held = round(memory.training_bytes(model, optimizer, mesh))
  available = hardware.memory_bytes(mesh)
  notes: list[str] = []
  while True:
    if hosts.from_main(time.monotonic() > until, "a look at the clock"):
      raise OutOfTime
    found, failure = (None, 0), None
    try:
      found = _compiled(settings, model, mesh)
    except Exception as error:  # agreed on below: one host alone would leave the others waiting
      failure = error
    if hosts.on_any(failure is not None, "whether the step compiles"):
      raise failure or RuntimeError("the step doesn't compile on another host; its log says why")
    compiled, needed = found
    lacks = compiled is None or (available is not None and needed > available)
    if not hosts.on_any(lacks, "whether the step fits") and compiled is not None:
      return FittingStep(settings, compiled, notes)
    parts = settings.train.accumulate
    need = (
      f"{_in_parts(settings)} a step needs {units.memory(needed)} of a device's "
      f"{units.memory(available or 0)}"
    )
    more = 0 if available is None else more_parts(settings, mesh, needed, held, available)
    more = hosts.from_main(more, "the number of a batch's parts")
    if not more:
      raise DoesNotFit(
        f"training: {need}; expected to fit, in no more parts than a device has images; fix: more devices, "
        "mesh.fsdp=-1 with mesh.data=1, or model.remat=full"
      )
    say(f"training: {need}: {more} parts instead of {parts}")
    notes.append(need)
    settings = with_values(settings, {"train.accumulate": more})


def _in_parts(settings: Settings) -> str:
  parts = settings.train.accumulate
  return f"batch {settings.train.batch_size}{f' in {parts} parts' if parts > 1 else ''}:"


def _compiled(
  settings: Settings, model: ImageGPTConfig, mesh: Mesh
) -> tuple[compilation.CompiledStep | None, int]:
  """Returns the step, and the bytes that it needs on a device.

  None in the step's place: the compiler refused it for its size.
  """
  try:
    compiled = measurements.compiled_step(settings, model, mesh)
  except jax.errors.JaxRuntimeError as error:
    if (needed := compilation.refused_bytes(str(error))) is None:
      raise
    return None, needed
  return compiled, compiled.needed_bytes


def more_parts(settings: Settings, mesh: Mesh, needed: int, held: int, available: float) -> int:
  """Returns the number of parts in which the step should fit; 0: in none.

  Args:
    settings: the config's, with the number of parts in which the step needs `needed` bytes.
    mesh: the mesh that the batch is divided over.
    needed: bytes of a device that the step needs.
    held: those of them that don't depend on the number of parts.
    available: bytes that a device has.
  """
  parts, batch_size = settings.train.accumulate, settings.train.batch_size
  room = _ROOM * (available - held)
  images = batch_size // sharding.batch_shards(mesh)  # of a device
  possible = [n for n in range(parts + 1, images + 1) if images % n == 0]
  return next((n for n in possible if parts * (needed - held) / n <= room), 0)
