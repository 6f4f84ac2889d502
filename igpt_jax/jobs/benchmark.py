"""Measures training, attention, sampling and the input pipeline on this machine.

Writes benchmark.json and benchmark.md: medians of `benchmark.repeats` timings, with the fastest and
the slowest. Only the input pipeline needs a data set; nothing needs a checkpoint.
"""

import dataclasses
import os
from typing import cast

import jax

from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import Split, open_split
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hosts as hosts_lib
from igpt_jax.parallel import sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import summary, versions
from igpt_jax.timing import benchmark_tables
from igpt_jax.workspace import checkpoint_tokens, devices, measurements, memory, weights
from igpt_jax.workspace import workdir as workdir_lib
from igpt_jax.workspace.measurements import CPU_NOTE, Values

PARTS = ("training", "attention", "sampling", "input")


def run(settings: Settings, workdir: str) -> None:
  """Measures `benchmark.parts`; skips a part that can't be measured, unless it is the only one."""
  parts = [part for part in PARTS if part in settings.benchmark.parts]
  workdir_lib.open_workdir(workdir)
  train = settings.train
  sharding.batch_size_per_shard(
    devices.mesh_of(settings), train.batch_size, accumulate=train.accumulate
  )
  model_config, settings = model_of(settings)
  model_config, mesh = devices.arranged(
    settings, model_config, train.batch_size // train.accumulate
  )
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
    "machine": measurements.machine(mesh),
    "versions": versions.versions(),
    "model": dataclasses.asdict(model_config),
    "parameters": count_params(model_config),
    "objective": settings.objective,
    "note": CPU_NOTE if jax.default_backend() == "cpu" else None,
  }
  say(benchmark_tables.heading(values))

  def training() -> Values:
    compiled = measurements.compiled_step(settings, model_config, mesh)
    memory.check_step(compiled, mesh)
    return measurements.training(settings, model_config, mesh, compiled)

  measures = {
    "training": training,
    "attention": lambda: measurements.attention(settings, model_config, mesh),
    "sampling": lambda: measurements.sampling(
      settings, model_config, devices.sampling_mesh(settings, model_config)
    ),
    "input": lambda: measurements.of_input(settings, cast(Split, split), values.get("training")),
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
    start = weights.describe(settings.init_from, settings)
    checkpoint_tokens.check_kind(settings, start)
    settings = choices.settle(settings, start.config)
    return choices.model_config(settings, n_vocab=start.config.n_vocab), settings
  settings = choices.settle(settings)
  path = settings.palette.path
  spec = choices.token_spec(settings, Palette.from_setting(path) if path else None)
  return choices.model_config(settings, n_vocab=spec.n_vocab), settings
