"""What job benchmark measures of this machine: a training step, attention, sampling, input.

Each function returns the values of its part of benchmark.json; job first_contact measures some of them, too.
"""

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import Split
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress
from igpt_jax.timing import device
from igpt_jax.timing import input as data_benchmark
from igpt_jax.training import compilation, objectives, optimizer, step

CPU_NOTE = "CPU: relative use only"

Values = dict[str, Any]


def ticker(part: str, settings: Settings) -> device.Ticker:
  """Returns what tells how many timings of a part are done."""
  return progress.Countdown(f"{part}: timings", settings.benchmark.repeats, say, every=1.0).tick


def step_of(
  settings: Settings, model: ImageGPTConfig
) -> tuple[Callable, optax.GradientTransformation]:
  """Returns the training step of the settings, and its optimizer."""
  config = choices.optimizer_config(settings)
  tx, schedule = optimizer.make_optimizer(config), optimizer.make_schedule(config)
  kind = "autoregressive" if model.causal else "masked"
  objective = objectives.make_objective(kind, settings.mask_probability)
  return step.make_train_step(model, objective, tx, schedule, settings.train.accumulate), tx


def compiled_step(
  settings: Settings, model_config: ImageGPTConfig, mesh: Mesh
) -> compilation.CompiledStep:
  """Compiles the training step of the settings; allocates nothing."""
  train_step, tx = step_of(settings, model_config)
  with progress.doing("training: compiling the step", say, ends=False):
    compiled = device.compile_training_step(
      model_config, train_step, tx, mesh, settings.train.batch_size
    )
  say(f"training: {compiled.took}; {compiled.memory}")
  return compiled


def training(
  settings: Settings,
  model_config: ImageGPTConfig,
  mesh: Mesh,
  compiled: compilation.CompiledStep,
  until: float = math.inf,
) -> Values:
  """Measures a step of `compiled_step`; `until` as in `device.take_turns`."""
  accumulate, batch_size = settings.train.accumulate, settings.train.batch_size
  measured = device.measure_training(
    model_config,
    compiled,
    optimizer.make_optimizer(choices.optimizer_config(settings)),
    mesh,
    batch_size=batch_size,
    repeats=settings.benchmark.repeats,
    tick=ticker("training", settings),
    until=until,
  )
  per_image = compilation.flops_per_image(model_config)
  speed = batch_size / measured.step.seconds
  peak = hardware.peak_flops(mesh)
  matmul = measured.matmul_flops / measured.matmul.seconds
  analysis = compiled.executable.memory_analysis()
  names = ("argument", "output", "alias", "temp", "generated_code")
  return {
    "batch_size": batch_size,
    "accumulate": accumulate,
    "step": dataclasses.asdict(measured.step),
    "images_per_second": speed,
    "tokens_per_second": speed * model_config.n_positions,
    "flops_per_image": per_image,
    "tflops_per_second": speed * per_image / 1e12,
    "peak_tflops_per_second": peak and peak / 1e12,
    "mfu": peak and speed * per_image / peak,
    "matmul": dataclasses.asdict(measured.matmul),
    "matmul_tflops_per_second": matmul / 1e12,
    "share_of_matmul": speed * per_image / matmul,
    "compile_seconds": compiled.seconds,
    "memory_per_device": analysis
    and {name: getattr(analysis, f"{name}_size_in_bytes") for name in names},
    "peak_bytes_per_device": measured.peak_bytes,
  }


def attention(settings: Settings, model_config: ImageGPTConfig, mesh: Mesh) -> Values:
  """Measures attention alone, plain and fused, on one device."""
  measured = device.measure_attention(
    model_config,
    mesh,
    batch_size=settings.train.batch_size // settings.train.accumulate,
    repeats=settings.benchmark.repeats,
    tick=ticker("attention", settings),
  )
  length, width = model_config.n_positions, measured.n_head * model_config.head_dim
  # Scores and values, without the masked half, as in the model FLOPs of a step.
  flops = 4 * measured.images * length**2 * width * (0.5 if model_config.causal else 1.0)

  def row(name: str) -> Values:
    forward, both = measured.forward[name], measured.both[name]
    return {
      "implementation": name,
      "forward": dataclasses.asdict(forward),
      "forward_and_backward": dataclasses.asdict(both),
      "forward_tflops_per_second": flops / forward.seconds / 1e12,
      "forward_and_backward_tflops_per_second": 3 * flops / both.seconds / 1e12,
    }

  return {
    "auto": measured.auto,
    "pictures": measured.images,
    "length": length,
    "n_head": measured.n_head,
    "head_dim": model_config.head_dim,
    "causal": model_config.causal,
    "rows": [row(name) for name in measured.forward],
    "not_run": measured.not_run,
  }


def sampling(
  settings: Settings, model_config: ImageGPTConfig, mesh: Mesh, until: float = math.inf
) -> Values:
  """Measures the drawing of `benchmark.samples` images, or a few more; `until` as in `device.take_turns`."""
  timing, samples = device.measure_sampling(
    model_config,
    mesh,
    samples=settings.benchmark.samples,
    sampling=choices.sampling_config(settings),
    repeats=settings.benchmark.repeats,
    tick=ticker("sampling", settings),
    until=until,
  )
  speed = samples / timing.seconds
  return {
    "samples": samples,
    "mesh": dict(mesh.shape),
    "all_samples": dataclasses.asdict(timing),
    "samples_per_second": speed,
    "tokens_per_second": speed * model_config.n_positions,
  }


def of_input(
  settings: Settings, split: Split, trained: Values | None, until: float = math.inf
) -> Values:
  """Measures reading a data set as tokens on this host, relative to training's speed.

  No pass but the first begins after `until` (`time.monotonic`).
  """
  data_config = settings.data
  spec = choices.token_spec(settings)
  if spec.needs_palette and not split.is_tokens:
    # Speed doesn't depend on the colours.
    spec = choices.token_spec(settings, Palette.from_setting(settings.palette.path or "default"))
  hosts = jax.process_count()
  batch_size = max(settings.train.batch_size // hosts, 1)
  n_batches = max(10, math.ceil(settings.benchmark.images / batch_size))
  tick = ticker("input", settings)
  passes, whole = [], []
  for done in range(1, settings.benchmark.repeats + 1):
    if done > 1 and time.monotonic() > until:
      break
    if not split.is_tokens:
      n = settings.benchmark.images
      passes.append(data_benchmark.stages(split, data_config, spec, n_images=n, repeats=1))
    sizes = {"batch_size": batch_size, "n_batches": n_batches}
    whole.append(data_benchmark.throughput(split, data_config, spec, **sizes))
    tick(done)

  def timing(seconds: list[float]) -> Values:
    return dataclasses.asdict(device.timing(seconds))

  stages = [
    {"stage": costs[0].stage, "cpu": timing([cost.cpu_ms / 1e3 for cost in costs])}
    for costs in zip(*passes, strict=True)
  ]
  wall = timing([1 / measured.images_per_second for measured in whole])
  cpu = timing([measured.cpu_ms / 1e3 for measured in whole])
  speed = 1 / wall["seconds"]
  return {
    "data": split.fingerprint,
    "pipeline": whole[0].pipeline,
    "workers": whole[0].workers,
    "stages": [{**row, "per_core_second": 1 / row["cpu"]["seconds"]} for row in stages],
    "picture": wall,
    "picture_cpu": cpu,
    "pictures_per_second": speed,
    "images_per_core_second": 1 / cpu["seconds"],
    "hosts": hosts,
    "times_training": trained and speed * hosts / trained["images_per_second"],
  }


def machine(mesh: Mesh) -> Values:
  """Returns what this machine is: devices, hosts, processor."""
  processor = platform.processor() or platform.machine()
  if os.path.exists("/proc/cpuinfo"):  # has the full name
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
      named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else processor
  return {
    "backend": jax.default_backend(),
    "device": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "mesh": hardware.describe_devices(mesh),
    "hosts": jax.process_count(),
    "processor": processor,
    "cores": os.cpu_count(),
  }
