"""Timings of a training step, of attention alone and of sampling on the devices that are here.

Every measurement has one to compare it with, and both take turns, so that whatever else the machine
does affects both. Calls are timed until their results are ready.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from igpt_jax.model.attention import dispatch as attention_lib
from igpt_jax.model.decoding import autoregressive
from igpt_jax.model.image_gpt import init_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hosts, sharding
from igpt_jax.training import compilation, state, step

_GROUP_SECONDS = 0.2  # shorter calls are repeated until a timing takes about this long
_GROUP_CALLS = 100  # most repetitions
_SCORES_BYTES = (
  2**30
)  # most float32 scores in attention alone; plain attention keeps several copies

Call = Callable[[], Any]
Ticker = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per call: median, fastest and slowest of `repeats` groups of `calls` calls."""

  seconds: float
  fastest: float
  slowest: float
  repeats: int
  calls: int


def timing(seconds: list[float], calls: int = 1) -> Timing:
  """Returns the statistics of seconds per call."""
  return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), calls)


def take_turns(
  sides: Mapping[str, Call], repeats: int, tick: Ticker, until: float = math.inf
) -> dict[str, Timing]:
  """Times several sides, which take turns after a warm-up, until their results are ready.

  Args:
    sides: functions that start some work and return its arrays.
    repeats: number of timings per side.
    tick: called with the number of rounds done.
    until: time (`time.monotonic`) after which no round but the first begins, by the main process' clock.
  """
  calls: dict[str, int] = {}
  taken: dict[str, list[float]] = {}
  for name, call in sides.items():
    jax.block_until_ready(call())
    once = _timed(call, 1)
    of_main = min(max(math.ceil(_GROUP_SECONDS / once), 1), _GROUP_CALLS)
    calls[name] = hosts.from_main(of_main, "the number of calls to time")
    taken[name] = [once] if calls[name] == 1 else []  # a long call already counts
  for done in range(1, repeats + 1):
    late = until < math.inf and hosts.from_main(time.monotonic() > until, "a look at the clock")
    if late and done > 1:
      break
    for name, call in sides.items():
      if len(taken[name]) < done:
        taken[name].append(_timed(call, calls[name]))
    tick(done)
  return {name: timing(seconds, calls[name]) for name, seconds in taken.items()}


def _timed(call: Call, times: int) -> float:
  # Virtual CPU devices that are sent several programs at once can deadlock.
  one_by_one = jax.default_backend() == "cpu"
  began, result = time.perf_counter(), None
  for _ in range(times):
    result = call()
    if one_by_one:
      jax.block_until_ready(result)
  jax.block_until_ready(result)
  return (time.perf_counter() - began) / times


@dataclasses.dataclass(frozen=True)
class Training:
  """Timing of a training step, and that of a large matmul on every device at once.

  Attributes:
    step, matmul: seconds.
    matmul_flops: FLOPs of one matmul call, all devices together.
    peak_bytes: most memory in use so far on a device of this process; None if unknown.
  """

  step: Timing
  matmul: Timing
  matmul_flops: float
  peak_bytes: int | None


def measure_training(
  config: ImageGPTConfig,
  compiled: compilation.CompiledStep,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  batch_size: int,
  repeats: int,
  tick: Ticker,
  until: float = math.inf,
) -> Training:
  """Measures a step of `compile_training_step` as pretraining runs it, on random tokens."""
  run_step = step_call(config, compiled, optimizer, mesh, batch_size)
  jax.block_until_ready(run_step())
  peak = peak_bytes(mesh)  # before the matmul's arrays are made
  matmul, flops = large_matmul(config.dtype, mesh)
  timings = take_turns({"step": run_step, "matmul": matmul}, repeats, tick, until)
  return Training(timings["step"], timings["matmul"], flops, peak)


def compile_training_step(
  config: ImageGPTConfig,
  train_step: Callable,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  batch_size: int,
) -> compilation.CompiledStep:
  """Compiles the step as pretraining does, under its mesh; allocates nothing."""
  target = sharding.sharding(mesh, "batch")
  shape = (batch_size, *config.tokens.shape(config.n_positions))
  tokens = jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=target)
  abstract = state.abstract_state(config, optimizer)
  shardings = state.state_shardings(config, optimizer, mesh)
  with jax.set_mesh(mesh):
    return compilation.compile_step(train_step, abstract, shardings, {"tokens": tokens})


def step_call(
  config: ImageGPTConfig,
  compiled: compilation.CompiledStep,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  batch_size: int,
) -> Call:
  """Returns a call that makes the compiled step, on a new state and random tokens."""
  shape = (batch_size, *config.tokens.shape(config.n_positions))
  tokens = np.random.default_rng(0).integers(config.n_vocab, size=shape, dtype=np.uint16)
  batch = {"tokens": sharding.put_global(tokens, mesh)}
  train_state = state.make_state(config, optimizer, 0, mesh)

  def run_step() -> step.Metrics:
    nonlocal train_state
    train_state, metrics = compiled(train_state, batch)
    return metrics

  return run_step


def large_matmul(dtype: str, mesh: Mesh) -> tuple[Call, float]:
  """Returns a call of a square matmul on every device at once, and the FLOPs of all of them."""
  side = 1024 if mesh.devices.flat[0].platform == "cpu" else 8192
  target = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  shape = (mesh.size, side, side)
  make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.dtype(dtype)), out_shardings=target)
  factors = make(jax.random.key(0)), make(jax.random.key(1))
  compiled = jax.jit(jnp.matmul, out_shardings=target).lower(*factors).compile()
  return functools.partial(compiled, *factors), 2.0 * mesh.size * side**3


def peak_bytes(mesh: Mesh) -> int | None:
  """Most memory in use so far on a device of this process; None if unknown."""
  local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in local]
  return max((peak for peak in peaks if peak is not None), default=None)


@dataclasses.dataclass(frozen=True)
class AttentionAlone:
  """Timings of attention on one device, without the rest of the model.

  Attributes:
    images, n_head: a device's share of the batch (less where scores wouldn't fit) and of the heads.
    auto: the implementation that model.attention "auto" stands for here.
    forward, both: seconds of the forward pass, and of forward and backward, by implementation.
    not_run: implementations that don't run here -> reason.
  """

  images: int
  n_head: int
  auto: str
  forward: dict[str, Timing]
  both: dict[str, Timing]
  not_run: dict[str, str]


def measure_attention(
  config: ImageGPTConfig, mesh: Mesh, *, batch_size: int, repeats: int, tick: Ticker
) -> AttentionAlone:
  """Measures plain and fused attention at the shape that a device of the mesh sees."""
  with jax.set_mesh(mesh):
    n_head = sharding.axis_share("heads", config.n_head) or config.n_head
    n_images = sharding.axis_share("batch", batch_size) or batch_size
  length, causal = config.n_positions, config.causal
  n_images = max(1, min(n_images, _SCORES_BYTES // (4 * n_head * length**2)))
  shape = (3, n_images, length, n_head * config.head_dim)
  qkv = jax.random.normal(jax.random.key(0), shape, jnp.dtype(config.dtype))
  dout = jax.random.normal(jax.random.key(1), shape[1:], qkv.dtype)

  def forward_and_backward(function, qkv, dout):
    out, pull = jax.vjp(function, qkv)
    return out, *pull(dout)

  forward, both, not_run = {}, {}, {}
  fused = {"cpu": "blocked", "gpu": "cudnn", "tpu": "tpu"}.get(jax.default_backend())
  for name in filter(None, ("xla", fused)):
    function = functools.partial(
      attention_lib.attention, n_head=n_head, causal=causal, implementation=name
    )
    run_forward = functools.partial(jax.jit(function), qkv)
    with_gradient = functools.partial(forward_and_backward, function)
    run_both = functools.partial(jax.jit(with_gradient), qkv, dout)
    try:
      jax.block_until_ready(run_forward())
      jax.block_until_ready(run_both())
    except Exception as error:  # a library or a compiler may refuse the shape: report why
      not_run[name] = str(error).strip().partition("\n")[0][:200] or type(error).__name__
      continue
    forward[f"{name} forward"], both[f"{name} both"] = run_forward, run_both
  timings = take_turns(forward | both, repeats, tick)

  def timed(sides: Mapping[str, Call]) -> dict[str, Timing]:
    return {side.rpartition(" ")[0]: timings[side] for side in sides}

  auto = attention_lib.choose(qkv, n_head)
  return AttentionAlone(n_images, n_head, auto, timed(forward), timed(both), not_run)


def measure_sampling(
  config: ImageGPTConfig,
  mesh: Mesh,
  *,
  samples: int,
  sampling: autoregressive.SamplingConfig,
  repeats: int,
  tick: Ticker,
  until: float = math.inf,
) -> tuple[Timing, int]:
  """Measures unconditional sampling from random weights.

  Returns:
    Seconds of all images, and their number: the least from `samples` on that divides over the mesh.
  """
  n = sharding.round_up_batch(mesh, samples)
  shardings = state.param_shardings(config, mesh)
  with jax.set_mesh(mesh):
    make = jax.jit(functools.partial(init_params, config), out_shardings=shardings)
    params = make(jax.random.key(0))
    prompt = sharding.put_global(np.zeros((n, *config.tokens.shape(0)), np.int32), mesh)
    keys = jax.random.split(jax.random.key(1), n)
    compiled = jax.jit(
      functools.partial(autoregressive.complete, config, sampling=sampling),
      out_shardings=sharding.replicated(mesh),
    )
    sides = {"samples": lambda: compiled(params, prompt, keys)}
    return take_turns(sides, repeats, tick, until)["samples"], n
