"""Measures the project's models on a machine in minutes, for a report that can be sent to anybody.

  bash launch/first_contact.sh

Needs no data set and no checkpoint: weights and tokens are random, images are made. Training steps come
first, then sampling, then input, then, on TPUs, the forecasts of job compile. What fails, doesn't fit or is
left out for time is a line of the report, which is written after every part; started again on the same
machine, the job goes on with what is missing. The report names no host, user or path.
"""

import dataclasses
import gc
import os
import pathlib
import re
import sys
import time

import jax
from jax.sharding import Mesh

from igpt_jax import files, stopping
from igpt_jax.config import choices, named
from igpt_jax.config.fields import Settings, as_json, with_values
from igpt_jax.data import made_images
from igpt_jax.errors import DoesNotFit, UserError
from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress, versions
from igpt_jax.reporting.anonymous import scrubbed
from igpt_jax.timing import contact_parts, contact_tables, device
from igpt_jax.timing.contact_parts import FAILED, LEFT_OUT, MEASURED, TOO_LARGE, Part, Record
from igpt_jax.training import compilation
from igpt_jax.workspace import devices, fitting_step, forecast_apart, measurements, memory
from igpt_jax.workspace import workdir as workdir_lib
from igpt_jax.workspace.forecast_apart import OutOfTime
from igpt_jax.workspace.measurements import Values

_CONFIGS, _ON_CPU = ("imagenet32_s", "imagenet32_m", "imagenet32_l"), ("quickstart",)
_IMAGES = 64  # made, and read again and again
# Variables that decide what is measured.
_ENVIRONMENT = (
  "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR",
  "XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip
_GO, _DONE, _NO_TIME, _ENDS_STARTS = range(4)  # what the main process says of a part
_NO_TIME_LEFT = "no time was left; the same command goes on with it"
_REASON = 300  # letters of a failure


class NothingToCompare(Exception):
  """A forecast's training step wasn't measured."""


@dataclasses.dataclass(frozen=True)
class Subject:
  """A config to measure.

  Attributes:
    name: its file's, without the suffix.
    settings: its own, with what the job's settings replace.
    model, mesh: those of its training.
  """

  name: str
  settings: Settings
  model: ImageGPTConfig
  mesh: Mesh

  def described(self) -> Values:
    """Returns what the report says of it."""
    flops = compilation.flops_per_image(self.model) * self.settings.train.batch_size
    names = ("n_layer", "n_head", "n_embd", "n_positions", "n_vocab", "dtype", "remat", "attention")
    return {
      "parameters": count_params(self.model),
      **{name: getattr(self.model, name) for name in names},
      "mesh": dict(self.mesh.shape),
      "batch_size": self.settings.train.batch_size,
      "model_flops_per_step": flops,
    }


def run(settings: Settings, workdir: str) -> None:
  """Writes first_contact.json and first_contact.md, after every part.

  Raises:
    UserError: a config isn't there or doesn't suit the devices, or the workdir's report is damaged.
  """
  until = time.monotonic() + 60 * settings.first_contact.minutes
  workdir_lib.open_workdir(workdir)
  subjects = subjects_of(settings)
  parts = contact_parts.ordered(list(subjects), kinds_here(settings))
  about = about_here(next(iter(subjects.values())).mesh)
  # Those too that aren't asked for: a kept one of a changed config would stand under its new description.
  every = [Part(kind, name) for kind in contact_parts.KINDS for name in subjects]
  record = Record(workdir, about, keys_of(every, subjects, about), heading_of(settings, subjects))
  if record.aside:
    say(f"the report there is of another machine or other versions: kept as {record.aside}")
  if record.stale:
    say(f"measured anew, since settings have changed: {', '.join(record.stale)}")
  say(f"{len(parts)} parts, about {settings.first_contact.minutes:g} minutes")
  stopping.answer_by(lambda name: _stopped(name, record))
  try:
    _do_all(parts, subjects, record, until)
  finally:
    stopping.answer_by(None)
  if hosts.is_main():
    record.write()
    say(contact_tables.as_markdown(record.as_json()))
    say(
      f"wrote {contact_parts.FILE} and {contact_parts.TABLE} to {workdir}; both name no host, user or path: "
      "please send them in an issue"
    )
  hosts.wait_for_all("end of the report")


def _do_all(parts: list[Part], subjects: dict[str, Subject], record: Record, until: float) -> None:
  """Does what isn't known yet, as far as time allows. Collective: every process must call it."""
  for number, part in enumerate(parts, 1):
    left = until - time.monotonic()
    verdict = _GO
    if record.settled(part):
      verdict = _DONE
    elif record.has_ended_starts(part):
      verdict = _ENDS_STARTS
    elif not contact_parts.is_allowed(part, left, record.took()):
      verdict = _NO_TIME
    # Others may see no report, or another clock.
    verdict = hosts.from_main(verdict, f"the first host's word on part {number}")
    what = f"part {number} of {len(parts)}: {part.name}"
    if verdict == _GO:
      say(f"{what}; ETA about {progress.format_seconds(max(left, 0))} for all")
      _do(part, subjects[part.config], record, until)
    elif verdict == _DONE:
      say(f"{what}: kept from an earlier start")
    elif verdict == _NO_TIME:
      say(f"{what}: left out for time")
      if hosts.is_main():
        record.finish(part, LEFT_OUT, reason=_NO_TIME_LEFT)
    else:
      say(f"{what}: not tried again: it ended the process before")
      if hosts.is_main():
        record.finish(part, FAILED, reason="it ended the process, at every start that tried it")


def kinds_here(settings: Settings) -> list[str]:
  """Returns the kinds of parts to do: forecasts are for TPUs.

  Raises:
    UserError: none is left.
  """
  kinds = [
    kind
    for kind in settings.first_contact.parts
    if kind != "forecast" or jax.default_backend() == "tpu"
  ]
  if not kinds:
    raise UserError(
      "config.first_contact.parts: ('forecast',): there is no TPU here; expected training among them"
    )
  return kinds


def subjects_of(settings: Settings) -> dict[str, Subject]:
  """Returns the configs to measure by name, with what the job's settings replace in them.

  Raises:
    UserError: one isn't there, or doesn't suit the devices.
  """
  given = named.replaced(settings)
  if given:
    say(
      f"replaced in every config: {', '.join(f'{name}={value}' for name, value in given.items())}"
    )
  chosen = settings.first_contact.configs or (
    _ON_CPU if jax.default_backend() == "cpu" else _CONFIGS
  )
  subjects: dict[str, Subject] = {}
  for config in chosen:
    own = named.settings_of(config, "config.first_contact.configs")
    own = choices.settle(with_values(own, given))
    model = choices.model_config(own)
    model, mesh = devices.arranged(own, model, own.train.batch_size // own.train.accumulate)
    name = scrubbed(pathlib.Path(config).stem)
    if name in subjects:
      raise UserError(
        f"config.first_contact.configs: two are called {name!r}; expected each under a name of its own"
      )
    subjects[name] = Subject(name, own, model, mesh)
  return subjects


def about_here(mesh: Mesh) -> Values:
  """Returns what all measurements depend on: machine, versions, environment; any mesh over all devices does."""
  machine = measurements.machine(mesh)
  del machine["mesh"]
  machine["cores"] = hardware.usable_cores()
  memory_bytes = hardware.memory_bytes(mesh)
  machine["memory_gib"] = None if memory_bytes is None else round(memory_bytes / 2**30)
  machine["driver"] = scrubbed(hardware.driver(jax.local_devices()[0]))
  environment = {
    name: scrubbed(re.sub(r"[^\s=,]*/\S*", "<path>", os.environ[name]))
    for name in _ENVIRONMENT
    if os.environ.get(name)
  }
  source = {"source": versions.source_digest()}
  return {
    "machine": machine,
    "versions": versions.versions() | source,
    "environment": environment,
  }


def heading_of(settings: Settings, subjects: dict[str, Subject]) -> Values:
  """Returns what the report says beside the parts, and what their keys don't need: it follows from them."""
  return {
    "minutes": settings.first_contact.minutes,
    "memory_bytes_per_device": hardware.memory_bytes(next(iter(subjects.values())).mesh),
    "configs": {name: subject.described() for name, subject in subjects.items()},
    "note": measurements.CPU_NOTE if jax.default_backend() == "cpu" else None,
  }


def keys_of(parts: list[Part], subjects: dict[str, Subject], about: Values) -> dict[Part, str]:
  """Returns for each part a digest of all that decides it."""

  def key(part: Part) -> str:
    own = as_json(subjects[part.config].settings)
    return files.digest({"about": about, "kind": part.kind, "settings": own})

  return {part: key(part) for part in parts}


def _stopped(name: str, record: Record) -> str:
  forecast_apart.end()
  if hosts.is_main():
    record.stopped()
  return f"stopped by {name}: what was measured is kept; the same command goes on"


def _do(part: Part, subject: Subject, record: Record, until: float) -> None:
  """Measures a part, and keeps what came of it."""
  began, main = time.monotonic(), hosts.is_main()
  if main:
    record.begin(part)
  state, reason, values = MEASURED, "", None
  try:
    values = _MEASURES[part.kind](subject, record, until)
  except DoesNotFit as error:
    state, reason = TOO_LARGE, reason_of(error)
  except NothingToCompare:
    state, reason = LEFT_OUT, "no training step was measured to compare with"
  except UserError as error:
    state, reason = FAILED, reason_of(error)
  except OutOfTime:
    state, reason = LEFT_OUT, _NO_TIME_LEFT
  except Exception as error:  # whatever a compiler or a driver refuses is a line of the report
    # Alone, this host would go on to collectives other than those that the rest wait in.
    if jax.process_count() > 1:
      raise
    too_large = memory.in_words(error, "benchmark") is not None
    state, reason = TOO_LARGE if too_large else FAILED, reason_of(error)
  if hosts.on_any(state != MEASURED, f"the end of {part.name}") and state == MEASURED:
    state, reason, values = FAILED, "another host failed; its log says why", None
  # The next part needs the memory.
  gc.collect()
  jax.clear_caches()
  seconds = time.monotonic() - began
  if main:
    record.finish(part, state, reason=reason, values=values, took=seconds)
    say(
      f"{part.name}: {state}{f': {reason}' if reason else ''} ({progress.format_seconds(seconds)})"
    )
  elif reason:
    print(f"{part.name}: {state}: {reason}", file=sys.stderr, flush=True)


def reason_of(error: Exception) -> str:
  """Returns an error in one line, which names no host, user or path."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  first = scrubbed(lines[0] if lines else "")
  own = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
  text = f"{own}{first}".replace("|", "¦")  # cells of a table
  return text if len(text) <= _REASON else f"{text[:_REASON]} …"


def _training(subject: Subject, record: Record, until: float) -> Values:
  sharding.batch_size_per_shard(subject.mesh, subject.settings.train.batch_size)
  sharding.check_model_fits(subject.mesh, n_head=subject.model.n_head, n_embd=subject.model.n_embd)
  before = device.peak_bytes(subject.mesh)
  fitting = fitting_step.compile_fitting(subject.settings, subject.model, subject.mesh, until)
  values = measurements.training(
    fitting.settings, subject.model, subject.mesh, fitting.compiled, until
  )
  if before is not None and values["peak_bytes_per_device"] == before:
    values["peak_bytes_per_device"] = None  # an earlier part's
  notes = [f"training: {note}" for note in fitting.notes]
  if values["accumulate"] > 1:
    notes.append(f"training: measured in {values['accumulate']} parts of a batch")
  return {**values, "notes": notes}


def _sampling(subject: Subject, record: Record, until: float) -> Values:
  if not subject.model.causal:
    raise UserError(
      "sampling: objective 'masked' has no left-to-right distribution; expected 'autoregressive'"
    )
  mesh = devices.sampling_mesh(subject.settings, subject.model)
  samples = sharding.round_up_batch(mesh, subject.settings.benchmark.samples)
  memory.check_cache(subject.model, samples, "", mesh, "a smaller benchmark.samples")
  with progress.doing("sampling: compiling and drawing", say):
    return measurements.sampling(subject.settings, subject.model, mesh, until)


def _input(subject: Subject, record: Record, until: float) -> Values:
  with progress.doing("input: making images", say):
    split = made_images.split(_IMAGES)
  trained = record.values(Part("training", subject.name))
  values = measurements.of_input(subject.settings, split, trained, until)
  size = sum(len(split[i]["image"]) for i in range(len(split))) / len(split)
  note = (
    f"input: {_IMAGES} JPEGs of {size / 1e3:.0f} kB on average, made from random numbers with photographs' "
    f"spectrum; what a disk or network adds isn't measured"
  )
  return {**values, "notes": [note]}


def _forecast(subject: Subject, record: Record, until: float) -> Values | None:
  """Returns job compile's forecast of the step that was measured; None in other processes than the main one."""
  if not hosts.is_main():
    return None
  slices = hardware.by_slice(list(subject.mesh.devices.flat), subject.settings.mesh.slices)
  topology = hardware.topology_of(slices[0])
  if topology is None:
    raise UserError("forecast: these devices aren't a slice of TPUs; expected one, such as v5e:4x4")
  trained = record.values(Part("training", subject.name))
  if trained is None:
    raise NothingToCompare
  changes = {
    "job": "compile",
    "compile.topology": topology,
    "mesh.slices": len(slices),
    "sample.samples": 0,
    "train.accumulate": trained["accumulate"],
    "model.dtype": subject.model.dtype,
    "model.remat": subject.model.remat,
  }
  with progress.doing(f"forecast: job compile for {topology}", say):
    forecast = forecast_apart.run_job(with_values(subject.settings, changes), until)
  return {
    "topology": topology,
    **{name: forecast[name] for name in ("step_seconds", "step_parts", "mfu", "bytes_per_device")},
    "accumulate": trained["accumulate"],
  }


_MEASURES = {
  "training": _training,
  "sampling": _sampling,
  "input": _input,
  "forecast": _forecast,
}
