"""Compiles training and sampling for a TPU slice that isn't attached, and predicts memory and speed.

  python -m igpt_jax.main --config configs/imagenet32_l.py --config.job=compile \
    --config.compile.topology=v5p:4x4x4

The TPU compiler runs on any machine. Writes compile.json: memory needed and available, collectives, a
predicted step time with its parts, MFU, and days to the end of the schedule; scale.md has a row for
every model and slice compiled into the workdir. With `mesh.slices` it compiles for several such slices,
and also says what crosses the network between them and how much of that is hidden by work. With `plan` it
searches for the mesh, batch and remat that train fastest there (without sampling).
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from igpt_jax import units
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import fused_kernel
from igpt_jax.parallel import sharding, tpu_types
from igpt_jax.parallel.hosts import say
from igpt_jax.prediction import forecast as forecasting
from igpt_jax.prediction import forecast_table
from igpt_jax.prediction import plan as planning
from igpt_jax.prediction.forecast import Forecast, Training
from igpt_jax.prediction.schedule import Crossing
from igpt_jax.prediction.topology import Topology, check_name, open_topology
from igpt_jax.reporting import summary as summary_lib
from igpt_jax.reporting import versions
from igpt_jax.training.compilation import flops_per_image, optimizer_flops
from igpt_jax.training.objectives import make_objective
from igpt_jax.workspace import devices
from igpt_jax.workspace import workdir as workdir_lib

METHOD = (
  "compiler's estimated cycles of the scheduled program, kernels by their bundles, "
  "collectives by bytes over link bandwidth less what work hides; within 25-30% of a chip's clock, "
  "closer between versions of one program"
)


# Full ImageNet JPEGs that a core decodes and crops in a second, as seen on a shared machine's; job benchmark
# measures those of the machine at hand.
_IMAGES_PER_CORE = 500


def run(settings: Settings, workdir: str) -> None:
  """Forecasts for `config.compile.topology`.

  Raises:
    UserError: the topology isn't one, the model doesn't divide over the mesh, or the step doesn't
      fit; compile.json is there in the last case.
  """
  if not settings.compile.topology:
    raise UserError(
      "config.compile.topology: missing; expected a TPU slice to compile for, such as "
      "--config.compile.topology=v5e:4x4 (job=benchmark measures the machine at hand)"
    )
  check_name(settings.compile.topology)
  workdir_lib.open_workdir(workdir)
  topology = open_topology(
    settings.compile.topology, settings.mesh.slices, settings.compile.network
  )
  training = training_of(settings)
  chosen, tried = None, []
  if settings.compile.plan:
    chosen, tried = planning.search(training, topology, say)
    training, mesh = chosen.training, chosen.mesh
  else:
    images, chips = training.batch_size // training.accumulate, list(topology.devices)
    model, mesh = devices.arranged(settings, training.model, images, devices=chips)
    training = dataclasses.replace(training, model=model)
    sharding.batch_size_per_shard(mesh, training.batch_size, accumulate=training.accumulate)
    sharding.check_model_fits(mesh, n_head=training.model.n_head, n_embd=training.model.n_embd)
  say(f"{describe(training, mesh)} on {topology.title}: compiling the training step")
  step = chosen.forecast if chosen else forecasting.training_step(training, topology, mesh)
  values = summary(settings, training, topology, mesh, step)
  if tried:
    values["plan"] = [planning.row(candidate) for candidate in tried]
  path = os.path.join(workdir, "compile.json")
  summary_lib.write_json(path, values)
  forecast_table.add(workdir, values)
  say(table(values))
  if not step.memory.fits:
    raise UserError(
      f"{describe(training, mesh)} doesn't fit {topology.title}: it needs "
      f"{units.memory(step.memory.needed)} of a device's {units.memory(step.memory.hbm)}; fix: "
      + "; or ".join(planning.remedies(training, mesh))
    )
  if training.model.causal and settings.sample.samples and not settings.compile.plan:
    n, cache, model = settings.sample.samples, settings.sample.cache, training.model
    mesh = devices.sampling_mesh(settings, model, together=n, devices=list(topology.devices))
    say(f"compiling the sampling of {n} images, mesh ({sizes_of(mesh)})")
    sampling = choices.sampling_config(settings)
    drawn = forecasting.sampling(model, sampling, n, topology, mesh, cache)
    batch = sharding.round_up_batch(mesh, n)
    values["sampling"] = {"mesh": dict(mesh.shape)} | sampling_summary(drawn, topology, batch)
    summary_lib.write_json(path, values)
    say(sampling_line(values["sampling"]))
  say(f"wrote {path}")


def training_of(settings: Settings) -> Training:
  """Returns the training step of the settings; reads no data, so the palette has its full size."""
  settings = choices.settle(settings)
  return Training(
    choices.model_config(settings),
    make_objective(settings.objective, settings.mask_probability),
    choices.optimizer_config(settings),
    settings.train.batch_size,
    settings.train.accumulate,
  )


def describe(training: Training, mesh) -> str:
  model = training.model
  parts = f" in {training.accumulate} parts" if training.accumulate > 1 else ""
  return (
    f"{model.n_layer} layers of width {model.n_embd}, {model.n_positions} positions, batch "
    f"{training.batch_size}{parts}, remat {model.remat}, mesh ({sizes_of(mesh)})"
  )


def sizes_of(mesh) -> str:
  return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def summary(
  settings: Settings, training: Training, topology: Topology, mesh, step: Forecast
) -> dict[str, Any]:
  """Returns the contents of compile.json."""
  per_chip = len(topology.devices) // topology.n_chips
  memory, model = step.memory, training.model
  flops = flops_per_image(model) * training.batch_size
  images = settings.train.steps * settings.train.batch_size
  values: dict[str, Any] = {
    "topology": topology.name,
    "slices": topology.slices,
    "chips": topology.n_chips,
    "devices": len(topology.devices),
    "mesh": dict(mesh.shape),
    "batch_size": training.batch_size,
    "accumulate": training.accumulate,
    "remat": model.remat,
    "blocks": path_of_blocks(training, mesh),
    "model": dataclasses.asdict(model),
    "objective": "autoregressive" if model.causal else "masked",
    "optimizer": training.optimizer.optimizer,
    "fits": memory.fits,
    "bytes_per_chip": memory.needed * per_chip,
    "hbm_bytes": memory.hbm * per_chip,
    "bytes_per_device": {
      "arguments": memory.arguments,
      "temporaries": memory.temporaries,
      "code": memory.code,
      "outputs": memory.outputs,
    },
    "largest_buffers": [
      {"bytes": size, "shape": shape, "origin": origin} for size, shape, origin in memory.largest
    ],
    "model_flops_per_step": flops,
    "optimizer_flops_per_step": optimizer_flops(model, training.optimizer),
    "schedule_images": images,
    "compile_seconds": round(step.compile_seconds, 1),
    "versions": versions.versions(),
    "method": METHOD,
  }
  if step.prediction is None:
    return values
  predicted = step.prediction
  images_per_second = training.batch_size / predicted.seconds
  days = images / images_per_second / 86_400
  return (
    values
    | {
      "step_seconds": predicted.seconds,
      "step_parts": {
        "compute": predicted.compute,
        "kernels": predicted.kernels,
        "communication_not_hidden": predicted.exposed,
      },
      "mfu": flops / predicted.seconds / (topology.chip.peak_flops * mesh.size),
      "images_per_second": images_per_second,
      "input": input_of(topology, images_per_second),
      "days": days,
      "chip_hours": days * 24 * topology.n_chips,
      "collectives": {
        kind: {"count": total.count, "bytes": total.bytes, "seconds": total.seconds}
        for kind, total in predicted.collectives.items()
      },
      "compute_by_origin": dict(list(predicted.by_origin.items())[:20]),
    }
    | between_slices(topology, predicted.network)
  )


def input_of(topology: Topology, images_per_second: float) -> dict[str, float]:
  """Returns compile.json's figures of what each host must read, and of the CPUs that it has for it."""
  kind, _, shape = topology.name.partition(":")
  rented = tpu_types.Slice(tpu_types.KINDS[kind], shape, topology.slices)
  each = images_per_second / rented.hosts
  return {
    "hosts": rented.hosts,
    "images_per_second_and_host": each,
    "cores_of_a_host": each / _IMAGES_PER_CORE,
    "vcpus_of_a_host": rented.vcpus,
  }


def between_slices(topology: Topology, network: Crossing) -> dict[str, Any]:
  """Returns compile.json's figures of the network between slices; none of one slice."""
  if topology.slices == 1:
    return {}
  per_chip = len(topology.devices) // topology.n_chips
  sent = network.bytes * per_chip
  return {
    "between_slices": {
      "transfers": network.count,
      "bytes_sent_per_chip": sent,
      "bytes_sent": sent * topology.n_chips,
      "gbit_per_second_and_chip": topology.network / 1e9,
      "seconds": network.seconds,
      "seconds_not_hidden": network.exposed,
    }
  }


def path_of_blocks(training: Training, mesh: Mesh) -> str:
  """Returns how the program computes the blocks: by the stack with a gradient of its own, or scanned."""
  model = training.model
  rows = training.batch_size // training.accumulate
  stream = jax.ShapeDtypeStruct((rows, model.n_positions, model.n_embd), jnp.dtype(model.dtype))
  with jax.set_mesh(mesh):
    fused = fused_kernel(model, stream)
  return "hand-written stack" if fused else "scanned, differentiated by JAX"


def sampling_summary(drawn: Forecast, topology: Topology, batch: int) -> dict[str, Any]:
  per_chip = len(topology.devices) // topology.n_chips
  values: dict[str, Any] = {
    "pictures": batch,
    "fits": drawn.memory.fits,
    "bytes_per_chip": drawn.memory.needed * per_chip,
    "compile_seconds": round(drawn.compile_seconds, 1),
  }
  if drawn.prediction is not None:
    values["seconds"] = drawn.prediction.seconds
    values["pictures_per_second"] = batch / drawn.prediction.seconds
  return values


def sampling_line(values: dict[str, Any]) -> str:
  line = f"sampling {units.counted(values['pictures'], 'image')}: {units.memory(values['bytes_per_chip'])} a chip"
  if "seconds" in values:
    line += f", {values['seconds']:.2f} s, {units.significant(values['pictures_per_second'])} images/s predicted"
  return line


def input_line(values: dict[str, float]) -> str:
  return (
    f"  input              {units.significant(values['images_per_second_and_host'])} images/s a host: "
    f"{values['cores_of_a_host']:.1f} cores for ImageNet's JPEGs at {_IMAGES_PER_CORE} a second, of "
    f"{values['vcpus_of_a_host']} vCPUs"
  )


def table(values: dict[str, Any]) -> str:
  """Returns the figures as text."""
  held = values["bytes_per_device"]
  lines = [
    f"  fits               {'yes' if values['fits'] else 'NO'}: {units.memory(values['bytes_per_chip'])} of "
    f"{units.memory(values['hbm_bytes'])} a chip",
    f"  arguments          {units.memory(held['arguments'])} (state and batch; updated in place)",
    f"  temporaries        {units.memory(held['temporaries'])}",
  ]
  lines += [
    f"    {units.memory(buffer['bytes']):>10}  {buffer['shape']}  {buffer['origin']}"
    for buffer in values["largest_buffers"][:5]
  ]
  lines.append(f"  blocks             {values['blocks']}")
  lines.append(f"  model FLOPs        {values['model_flops_per_step']:.3e} a step")
  if own := values["optimizer_flops_per_step"]:
    lines.append(f"  optimizer's FLOPs  {own:.3e} a step, not in MFU")
  if "step_seconds" in values:
    parts = values["step_parts"]
    lines += [
      f"  step, predicted    {1e3 * values['step_seconds']:.1f} ms: compute "
      f"{1e3 * parts['compute']:.1f} (kernels {1e3 * parts['kernels']:.1f}), "
      f"communication not hidden {1e3 * parts['communication_not_hidden']:.1f}",
      f"  MFU                {values['mfu']:.1%}",
      f"  images/s           {units.significant(values['images_per_second'])}",
      input_line(values["input"]),
      f"  schedule           {values['days']:.2f} days, {values['chip_hours']:,.0f} chip-hours for "
      f"{values['schedule_images']:,} images",
    ]
    lines += [
      f"  {kind:18} {total['count']} a step, {units.data_size(total['bytes'])}, {1e3 * total['seconds']:.1f} ms"
      for kind, total in sorted(values["collectives"].items())
    ]
  if network := values.get("between_slices"):
    hidden = network["seconds"] - network["seconds_not_hidden"]
    lines += [
      f"  between slices     {units.data_size(network['bytes_sent_per_chip'])} sent a chip and step, "
      f"{units.data_size(network['bytes_sent'])} in all, in {network['transfers']} transfers",
      f"                     {1e3 * network['seconds']:.1f} ms at "
      f"{network['gbit_per_second_and_chip']:g} Gbit/s a chip, {1e3 * hidden:.1f} of them hidden by "
      f"work (--config.compile.network=GBITS for another network)",
    ]
  return "\n".join(lines)
