"""Forecasts of a training step or of sampling, compiled for a slice: memory and seconds."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from igpt_jax.model.decoding import autoregressive
from igpt_jax.model.image_gpt import abstract_params, compute_dtypes
from igpt_jax.model.model_config import ImageGPTConfig
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
    outputs: results that don't reuse an argument's memory.
    hbm: the memory that a program may use.
    needed: the sum of the first four; if compiling ran out of memory, the need that the compiler reports.
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
  """Forecast of a program on a slice.

  Attributes:
    memory: memory of one device.
    prediction: the time of one run; None if it doesn't fit.
    compile_seconds: seconds of compiling on this machine.
  """

  memory: Memory
  prediction: schedule.Prediction | None
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Training:
  """Training run to forecast.

  Attributes:
    model, objective, optimizer: the run's.
    batch_size: global.
    accumulate: number of parts that a batch is split into.
  """

  model: ImageGPTConfig
  objective: Objective
  optimizer: optimizer.OptimizerConfig
  batch_size: int
  accumulate: int = 1


def training_step(training: Training, topology: Topology, mesh: Mesh) -> Forecast:
  """Forecasts the full step: forward, backward, update; state and batch sharded over the mesh."""
  model = training.model
  tx = optimizer.make_optimizer(training.optimizer)
  schedule = optimizer.make_schedule(training.optimizer)
  train_step = step.make_train_step(model, training.objective, tx, schedule, training.accumulate)
  abstract = state.abstract_state(model, tx)
  shardings = state.state_shardings(model, tx, mesh)
  shape = (training.batch_size, *model.tokens.shape(model.n_positions))
  tokens = jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=sharding.sharding(mesh, "batch"))

  def compile_it() -> compilation.CompiledStep:
    return compilation.compile_step(train_step, abstract, shardings, {"tokens": tokens})

  return _forecast(compile_it, model, topology, mesh)


def sampling(
  model: ImageGPTConfig,
  settings: autoregressive.SamplingConfig,
  n_images: int,
  topology: Topology,
  mesh: Mesh,
  cache_dtype: str = "",
) -> Forecast:
  """Forecasts the drawing of whole images, pixel by pixel; `cache_dtype` as in `autoregressive.begin`."""
  lower = sampling_program(model, settings, n_images, mesh, cache_dtype)
  compile_it = functools.partial(compilation.timed, lambda: lower().compile())
  return _forecast(compile_it, model, topology, mesh)


def sampling_program(
  model: ImageGPTConfig,
  settings: autoregressive.SamplingConfig,
  n_images: int,
  mesh: Mesh,
  cache_dtype: str = "",
) -> Callable[[], jax.stages.Lowered]:
  """Returns a function that lowers the program of `sampling`; call it under the mesh."""
  params = jax.tree.map(
    lambda leaf, dtype, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
    abstract_params(model),
    compute_dtypes(model),
    state.param_shardings(model, mesh),
  )
  batch = sharding.round_up_batch(mesh, n_images)
  nothing = (batch, *model.tokens.shape(0))
  prompt = jax.ShapeDtypeStruct(nothing, jnp.int32, sharding=sharding.sharding(mesh, "batch"))
  key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  keys = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
  draw = jax.jit(
    functools.partial(autoregressive.complete, model, sampling=settings, cache_dtype=cache_dtype),
    out_shardings=sharding.replicated(mesh),
  )
  return functools.partial(draw.lower, params, prompt, keys)


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
    program, generation = hlo.parse(compiled.executable.as_text()), topology.generation
    cycles = bundles.kernel_cycles(
      topology.dump, topology.limits, head_dim=model.head_dim, causal=model.causal,
      narrow=generation.narrow,
    )  # fmt: skip
    links = topology.links(list(mesh.devices.flat))
    prediction = schedule.predict(
      program,
      clock=generation.clock,
      links=links,
      kernel_cycles=cycles,
      network=topology.between_slices,
    )
  return Forecast(_memory(compiled.executable, program, hbm), prediction, compiled.seconds)


def _memory(executable: Any, program: hlo.Program, hbm: int) -> Memory:
  sizes = executable.memory_analysis()
  outputs = max(sizes.output_size_in_bytes - sizes.alias_size_in_bytes, 0)
  parts = (
    sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes, outputs,
  )  # fmt: skip
  return Memory(*parts, hbm, sum(parts), largest_arrays(program))


def largest_arrays(program: hlo.Program, n: int = 8) -> list[tuple[int, str, str]]:
  """Returns the largest arrays in HBM that operations make, one for each shape and origin."""
  sizes: dict[tuple[str, str], int] = {}
  skipped = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional")

  def visit(computation: str) -> None:
    for operation in program.computations[computation]:
      for name in operation.called.get("body", []):
        visit(name)
      in_vmem = operation.shape.endswith("S(1)}")
      if operation.opcode in skipped or operation.shape.startswith("(") or in_vmem:
        continue
      shape = re.sub(r"\{.*", "", operation.shape)
      sizes[shape, schedule.origin(operation)] = operation.bytes

  visit(program.entry)
  ordered = sorted(sizes.items(), key=lambda item: -item[1])[:n]
  return [(size, shape, origin) for (shape, origin), size in ordered]


def _refused(message: str, hbm: int) -> Memory | None:
  """Reads the compiler's error that a program doesn't fit; None if it is another error."""
  if (needed := compilation.refused_bytes(message)) is None:
    return None
  largest = [
    (compilation.bytes_of(*amount), shape.strip(), (origin or "").strip())
    for *amount, origin, shape in re.findall(
      r"Size: ([\d.]+)([KMGT]?)\S*\n(?:\s+Operator: op_name=\"([^\"]*)\"[^\n]*\n)?\s+Shape: ([^{\n]*)",
      message,
    )
  ]
  return Memory(0, 0, 0, 0, hbm, needed, largest[:8])
