"""Measures training, attention, sampling and the input pipeline on this machine.

Writes benchmark.json and benchmark.md: medians of `benchmark.repeats` timings, with the fastest and
the slowest. Only the input pipeline needs a data set; nothing needs a checkpoint.
"""

import dataclasses
import math
import os
import platform
from typing import Any, cast

import jax
from jax.sharding import Mesh

from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import Split, open_split
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, sharding
from igpt_jax.parallel import hosts as hosts_lib
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress, summary, versions
from igpt_jax.timing import benchmark_tables, device
from igpt_jax.timing import input as data_benchmark
from igpt_jax.training import compilation, objectives, optimizer, step
from igpt_jax.workspace import devices, weights
from igpt_jax.workspace import workdir as workdir_lib

PARTS = ("training", "attention", "sampling", "input")
CPU_NOTE = "CPU: relative use only"

Values = dict[str, Any]


def run(settings: Settings, workdir: str) -> None:
  """Measures `benchmark.parts`; skips a part that can't be measured, unless it is the only one."""
  parts = [part for part in PARTS if part in settings.benchmark.parts]
  workdir_lib.open_workdir(workdir)
  mesh = devices.mesh_of(settings)
  sharding.batch_size_per_shard(
    mesh, settings.train.batch_size, accumulate=settings.train.accumulate
  )
  model_config, settings = model_of(settings)
  sharding.check_model_fits(mesh, n_head=model_config.n_head, n_embd=model_config.n_embd)
  skipped: dict[str, str] = {}
  split = None

  def skip(part: str, reason: str) -> None:
    if len(parts) == 1:
      raise UserError(
        f"benchmark.parts: {part}: {reason}; expected a part that can be measured here"
      )
    say(f"{part}: skipped: {reason}")
    skipped[part] = reason

  if "input" in parts:
    try:
      split = open_split(settings.data, "train")
    except UserError as error:
      skip("input", str(error))
  if "sampling" in parts and not model_config.causal:
    skip("sampling", "objective: 'masked' has no left-to-right distribution to sample")

  values: Values = {
    "machine": machine(mesh),
    "versions": versions.versions(),
    "model": dataclasses.asdict(model_config),
    "parameters": count_params(model_config),
    "objective": settings.objective,
    "note": CPU_NOTE if jax.default_backend() == "cpu" else None,
  }
  say(benchmark_tables.heading(values))
  measures = {
    "training": lambda: training(settings, model_config, mesh),
    "attention": lambda: attention(settings, model_config, mesh),
    "sampling": lambda: sampling(settings, model_config, mesh),
    "input": lambda: of_input(settings, cast(Split, split), values.get("training")),
  }
  for part in parts:
    if part not in skipped:
      say(f"{part}: measuring")
      values[part] = measures[part]()
  values["skipped"] = skipped
  text = benchmark_tables.as_markdown(values)
  say(text)
  if hosts_lib.is_main():
    summary.write_json(os.path.join(workdir, "benchmark.json"), values)
    summary.write_text(os.path.join(workdir, "benchmark.md"), text)
    say(f"wrote benchmark.json and benchmark.md to {workdir}")


def model_of(settings: Settings) -> tuple[ImageGPTConfig, Settings]:
  """Returns the model that these settings train, and the settings with all choices made."""
  if settings.init_from:
    start = weights.describe(settings.init_from, settings).config
    settings = choices.settle(settings, start)
    return choices.model_config(settings, n_vocab=start.n_vocab), settings
  settings = choices.settle(settings)
  path = settings.palette.path
  n_vocab = Palette.from_setting(path).size if path else choices.palette_size(settings)
  return choices.model_config(settings, n_vocab=n_vocab), settings


def ticker(part: str, settings: Settings):
  return progress.Countdown(f"{part}: timings", settings.benchmark.repeats, say, every=1.0).tick


def training(settings: Settings, model_config: ImageGPTConfig, mesh: Mesh) -> Values:
  optimizer_config = choices.optimizer_config(settings)
  tx = optimizer.make_optimizer(optimizer_config)
  objective = objectives.make_objective(settings.objective, settings.mask_probability)
  accumulate = settings.train.accumulate
  batch_size = settings.train.batch_size
  measured = device.measure_training(
    model_config,
    step.make_train_step(
      model_config, objective, tx, optimizer.make_schedule(optimizer_config), accumulate=accumulate
    ),
    tx,
    mesh,
    batch_size=batch_size,
    repeats=settings.benchmark.repeats,
    say=say,
    tick=ticker("training", settings),
  )
  per_image = compilation.flops_per_image(model_config)
  speed = batch_size / measured.step.seconds
  peak = hardware.peak_flops(mesh)
  matmul = measured.matmul_flops / measured.matmul.seconds
  analysis = measured.compiled.executable.memory_analysis()
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
    "compile_seconds": measured.compiled.seconds,
    "memory_per_device": analysis
    and {name: getattr(analysis, f"{name}_size_in_bytes") for name in names},
    "peak_bytes_per_device": measured.peak_bytes,
  }


def attention(settings: Settings, model_config: ImageGPTConfig, mesh: Mesh) -> Values:
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


def sampling(settings: Settings, model_config: ImageGPTConfig, mesh: Mesh) -> Values:
  timing, samples = device.measure_sampling(
    model_config,
    mesh,
    samples=settings.benchmark.samples,
    sampling=choices.sampling_config(settings),
    repeats=settings.benchmark.repeats,
    tick=ticker("sampling", settings),
  )
  speed = samples / timing.seconds
  return {
    "samples": samples,
    "all_samples": dataclasses.asdict(timing),
    "samples_per_second": speed,
    "tokens_per_second": speed * model_config.n_positions,
  }


def of_input(settings: Settings, split: Split, trained: Values | None) -> Values:
  """Measures reading the data set as tokens on this host, relative to training's speed."""
  data_config = settings.data
  palette = None
  if not split.is_tokens:
    # Speed doesn't depend on the colours.
    palette = Palette.from_setting(settings.palette.path or "default")
  hosts = jax.process_count()
  batch_size = max(settings.train.batch_size // hosts, 1)
  n_batches = max(10, math.ceil(settings.benchmark.images / batch_size))
  tick = ticker("input", settings)
  passes, whole = [], []
  for done in range(1, settings.benchmark.repeats + 1):
    if palette is not None:
      n = settings.benchmark.images
      passes.append(data_benchmark.stages(split, data_config, palette, n_images=n, repeats=1))
    sizes = {"batch_size": batch_size, "n_batches": n_batches}
    whole.append(data_benchmark.throughput(split, data_config, palette, **sizes))
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
