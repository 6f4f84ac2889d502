"""Compiles a training or a sampling step for a slice and reads off what it needs and costs."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from igpt_jax.model.decoding import autoregressive
from igpt_jax.model.image_gpt import ImageGPTConfig, abstract_params, compute_dtypes
from igpt_jax.parallel import sharding
from igpt_jax.prediction import bundles, hlo, schedule
from igpt_jax.prediction.topology import Topology
from igpt_jax.training import compilation, optimizer, state, step
from igpt_jax.training.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    arguments: the state and the batch; the state is updated in place.
    temporaries: activations, gathered weights, gradients on their way.
    code: the program itself.
    outputs: that don't lie where an argument was.
    hbm: that a program may use.
    needed: all of them; where compiling failed for want of memory, what the compiler said it needs.
    largest: (bytes, shape, origin) of the largest arrays the program makes.
  """

  arguments: int
  temporaries: int
  code: int
  outputs: int
  hbm: int
  needed: int
  largest: list[tuple[int, str, str]]

  @property
  def fits(self) -> bool:
    return self.needed <= self.hbm


@dataclasses.dataclass(frozen=True)
class Forecast:
  """A program on a slice.

  Attributes:
    memory: of a device.
    prediction: of one run; None if it doesn't fit.
    compile_seconds: on this machine.
  """

  memory: Memory
  prediction: schedule.Prediction | None
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Training:
  """What is trained, and how.

  Attributes:
    model, objective, optimizer: of the run.
    batch_size: global.
    accumulate: parts that a batch is worked through in.
  """

  model: ImageGPTConfig
  objective: Objective
  optimizer: optimizer.OptimizerConfig
  batch_size: int
  accumulate: int = 1


def training_step(training: Training, topology: Topology, mesh: Mesh) -> Forecast:
  """The full step: forward, backward, update; state and batch sharded over the mesh."""
  model = training.model
  tx = optimizer.make_optimizer(training.optimizer)
  train_step = step.make_train_step(
    model, training.objective, tx, optimizer.make_schedule(training.optimizer), training.accumulate
  )
  abstract = state.abstract_state(model, tx)
  shardings = state.state_shardings(model, tx, mesh)
  tokens = jax.ShapeDtypeStruct(
    (training.batch_size, model.n_positions), jnp.uint16, sharding=sharding.sharding(mesh, "batch")
  )
  return _forecast(
    lambda: compilation.compile_step(train_step, abstract, shardings, {"tokens": tokens}),
    model,
    topology,
    mesh,
  )


def sampling(
  model: ImageGPTConfig,
  settings: autoregressive.SamplingConfig,
  n_images: int,
  topology: Topology,
  mesh: Mesh,
  cache_dtype: str = "",
) -> Forecast:
  """Drawing whole images from nothing, pixel by pixel; `cache_dtype` as of `decoding.begin`."""
  lower = sampling_program(model, settings, n_images, mesh, cache_dtype)

  def compiled():
    return compilation.timed(lambda: lower().compile())

  return _forecast(compiled, model, topology, mesh)


def sampling_program(
  model: ImageGPTConfig,
  settings: autoregressive.SamplingConfig,
  n_images: int,
  mesh: Mesh,
  cache_dtype: str = "",
) -> Callable[[], jax.stages.Lowered]:
  """What lowers the program that `sampling` is about, to be called under the mesh."""
  params = jax.tree.map(
    lambda leaf, dtype, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
    abstract_params(model),
    compute_dtypes(model),
    state.param_shardings(model, mesh),
  )
  batch = sharding.round_up_batch(mesh, n_images)
  given = jax.ShapeDtypeStruct((batch, 0), jnp.int32, sharding=sharding.sharding(mesh, "batch"))
  key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  keys = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
  draw = jax.jit(
    functools.partial(autoregressive.complete, model, sampling=settings, cache_dtype=cache_dtype),
    out_shardings=sharding.replicated(mesh),
  )
  return functools.partial(draw.lower, params, given, keys)


def _forecast(compile_it, model: ImageGPTConfig, topology: Topology, mesh: Mesh) -> Forecast:
  topology.dump.clear()
  hbm = round(topology.chip.hbm_bytes)
  with jax.set_mesh(mesh):
    try:
      compiled = compile_it()
    except jax.errors.JaxRuntimeError as error:
      memory = _refused(str(error), hbm)
      if memory is None:
        raise
      return Forecast(memory, None, 0.0)
    program = hlo.parse(compiled.executable.as_text())
    cycles = bundles.attention_cycles(
      topology.dump, head_dim=model.head_dim, causal=model.causal, narrow=topology.generation.narrow
    )
    prediction = schedule.predict(
      program,
      clock=topology.generation.clock,
      links=topology.links(list(mesh.devices.flat)),
      kernel_cycles=cycles,
    )
  return Forecast(_memory(compiled.executable, program, hbm), prediction, compiled.seconds)


def _memory(executable: Any, program: hlo.Program, hbm: int) -> Memory:
  found = executable.memory_analysis()
  outputs = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
  parts = (
    found.argument_size_in_bytes, found.temp_size_in_bytes, found.generated_code_size_in_bytes, outputs,
  )  # fmt: skip
  return Memory(*parts, hbm, sum(parts), largest_arrays(program))


def largest_arrays(program: hlo.Program, n: int = 8) -> list[tuple[int, str, str]]:
  """The largest arrays in HBM that operations make, one of each shape and origin."""
  found: dict[tuple[str, str], int] = {}
  skipped = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional")

  def visit(computation: str) -> None:
    for operation in program.computations[computation]:
      for name in operation.called.get("body", []):
        visit(name)
      in_vmem = operation.shape.endswith("S(1)}")
      if operation.opcode in skipped or operation.shape.startswith("(") or in_vmem:
        continue
      shape = re.sub(r"\{.*", "", operation.shape)
      found[shape, schedule.origin(operation)] = operation.bytes

  visit(program.entry)
  ordered = sorted(found.items(), key=lambda item: -item[1])[:n]
  return [(size, shape, origin) for (shape, origin), size in ordered]


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _refused(message: str, hbm: int) -> Memory | None:
  """What the compiler says when a program doesn't fit, or None if it says something else."""
  # Before it schedules a program, from its sizes alone; or at the end.
  needed = re.search(
    r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM", message
  ) or re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
  if needed is None:
    return None

  def size(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])

  largest = [
    (size(*amount), shape.strip(), (origin or "").strip())
    for *amount, origin, shape in re.findall(
      r"Size: ([\d.]+)([KMGT]?)\S*\n(?:\s+Operator: op_name=\"([^\"]*)\"[^\n]*\n)?\s+Shape: ([^{\n]*)",
      message,
    )
  ]
  return Memory(0, 0, 0, 0, hbm, size(needed[1], needed[2]), largest[:8])
