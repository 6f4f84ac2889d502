"""Choice of a run's size by the machine's speed and the number of images: `config.sizing.minutes`.

A setting is chosen where it has the program's default (`config.base()`); one that a config file or a
flag sets otherwise is kept. A small model's step is timed, the others' extrapolated by FLOPs, and the
chosen one timed to make sure. What is chosen goes into config.json, from which every later start
reads it, and the measured times into sizing.json.
"""

import dataclasses
import math
import os
from typing import Any

import jax
from jax.sharding import Mesh

from igpt_jax import files
from igpt_jax.config import choices
from igpt_jax.config.fields import FIELDS, Settings, value_of, with_values
from igpt_jax.data.sources import open_split
from igpt_jax.errors import DoesNotFit, UserError
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.pretrained import packaged
from igpt_jax.reporting import summary
from igpt_jax.timing import device
from igpt_jax.training import compilation
from igpt_jax.workspace import candidates, devices, measurements, memory, weights
from igpt_jax.workspace import workdir as workdir_lib
from igpt_jax.workspace.candidates import Candidate

RECORD = "sizing.json"
_GOOD = 4  # first results' images in a good one
_FOR_STEPS = (
  0.8  # share of the time that is left for steps by input, evaluation, images, checkpoints
)
_LEAST_STEPS, _MANY_STEPS = 20, 1_500  # of a run; beyond many, batches grow
_BATCHES = (16, 128)  # smallest and largest batch
_SLACK = 1.25  # by which a timed step may be slower than the extrapolated one
_LOG_SECONDS, _EVAL_SECONDS = 10.0, 75.0
_EVAL_IMAGES = 256
_REPEATS = 5  # timings of a step
_CADENCE = (
  "train.batch_size", "train.steps", "train.warmup_steps", "train.log_every", "train.eval_every",
  "train.eval_images", "train.checkpoint_every",
)  # fmt: skip
_CHOSEN = (*candidates.CHOSEN, *_CADENCE)
_BESIDE_SHAPE = ("data.resolution", "model.positions", "palette.size")  # chosen beside `model.size`


def _open(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
  """Returns those values whose settings have the program's defaults."""
  return {
    name: value
    for name, value in values.items()
    if value_of(settings, name) == FIELDS[name].default
  }


def _as_begun(settings: Settings, theirs: dict[str, Any], workdir: str) -> Settings:
  """Returns the settings with what was chosen for the run that has been begun in `workdir`.

  With more `sizing.minutes` than the run was sized for, `train.steps` grows by the measured time.
  """
  kept = {name: theirs[name] for name in _CHOSEN}
  asked, begun = settings.sizing.packaged, theirs["init_from"] == packaged.NAME
  if asked not in (theirs["sizing.packaged"], begun):
    say(
      f"sizing.packaged: {asked} changes nothing: the run was begun from {theirs['init_from'] or 'random values'}; "
      "fix: another --workdir"
    )
  minutes, before = settings.sizing.minutes, theirs["sizing.minutes"]
  if minutes > before:
    run = with_values(settings, {name: kept[name] for name in ("init_from", "train.batch_size")})
    seconds, images = _recorded(workdir, minutes)
    most = _most_steps(run, images)
    steps = kept["train.steps"] = max(_steps(minutes, seconds, most), theirs["train.steps"])
    same = steps == theirs["train.steps"]
    change = ", as before" if same else f" instead of {theirs['train.steps']:,}"
    if steps >= most:
      change += f": with so few images, more would only learn them by heart (--config.train.steps={2 * steps} does)"
    say(f"sizing: {minutes:g} minutes instead of {before:g}: {steps:,} steps{change}")
  elif minutes < before:
    say(
      f"sizing.minutes: {minutes:g} changes nothing: the run was sized for {before:g} and keeps its "
      f"{kept['train.steps']:,} steps; fix: --config.train.steps=N ends it earlier"
    )
  return with_values(settings, _open(settings, kept))


def _recorded(workdir: str, minutes: float) -> tuple[float, int]:
  """Returns the seconds of a sized run's step, and the images that it was sized for."""
  path = os.path.join(workdir, RECORD)
  try:
    record = files.read_json(path)
    return float(record["step_seconds"]), int(record["images"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"sizing.minutes: {minutes:g}; {path} can't be read ({error}), which has the time of "
      "a step; fix: --config.train.steps="
    ) from None


def _most_steps(settings: Settings, images: int) -> int:
  """Returns the steps beyond which a run of these settings only learns so many images by heart."""
  return max(-(-candidates.passes(settings) * images // settings.train.batch_size), _LEAST_STEPS)


def _steps(minutes: float, step_seconds: float, most: int) -> int:
  """Returns the steps that so many minutes allow, at most `most`."""
  return min(max(round(minutes * 60 * _FOR_STEPS / step_seconds), _LEAST_STEPS), most)


def size(settings: Settings, workdir: str, mesh: Mesh | None = None) -> Settings:
  """Returns the settings with the size chosen, if they ask for it.

  A run that has been begun in `workdir` keeps the size that was chosen then. Every process must call it:
  they time steps together, and the main one's times decide.

  Raises:
    UserError: the smallest size doesn't fit, the steps of the chosen one don't suit what is given, or
      `init_from` is of another model than what is given.
  """
  if not settings.sizing.minutes:
    return settings
  # A start that never came to a checkpoint binds nothing.
  if (theirs := workdir_lib.read(workdir)) is not None and workdir_lib.has_begun(workdir):
    return _as_begun(settings, theirs, workdir) if theirs.get("sizing.minutes") else settings
  images = len(open_split(settings.data, "train"))
  sizes = candidates.of_run(settings, images, workdir)
  any_mesh = mesh or devices.mesh_of(settings)
  workdir_lib.open_workdir(workdir)
  say(
    f"sizing: timing steps here, for about {settings.sizing.minutes:g} minutes with {images:,} images"
  )
  return _chosen(settings, images, sizes, any_mesh, mesh).told(workdir)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """A run of one size.

  Attributes:
    settings: the run's.
    model: its model.
    images: images of train.
    step_seconds: time of a step, extrapolated or measured.
    good_steps: steps of a good result.
    most_steps: steps beyond which there is little to gain.
  """

  settings: Settings
  model: ImageGPTConfig
  images: int
  step_seconds: float
  good_steps: int
  most_steps: int

  @property
  def batch_size(self) -> int:
    return self.settings.train.batch_size

  def minutes(self, steps: int) -> float:
    """Returns the minutes that so many steps take, with all that goes on beside them."""
    return steps * self.step_seconds / (60 * _FOR_STEPS)

  def told(self, workdir: str) -> Settings:
    """Says what was chosen, writes it into sizing.json, and returns the run's settings."""
    settings, model, steps = self.settings, self.model, self.settings.train.steps
    side, passes = settings.data.resolution, steps * self.batch_size / self.images
    took, good = self.minutes(steps), self.minutes(self.good_steps)
    begun = f", begun from {settings.init_from}" if settings.init_from else ""
    say(
      f"sizing: {side}×{side} pixels of {model.tokens.values}, {model.n_layer} layers of {model.n_embd}, "
      f"{model.positions} positions{begun}; a step of {self.batch_size} images takes {self.step_seconds:.2g} s here: "
      f"{steps:,} steps, {passes:,.3g} times each image"
    )
    result = "good" if steps >= self.good_steps else "first"
    about = f"sizing: about {_in_words(took)} on this machine for a {result} result"
    if steps >= self.most_steps:
      about += "; with so few images, more steps would only learn them by heart"
    elif good > took + 1:
      about += f", {good:.0f} for a good one (--config.sizing.minutes={math.ceil(good)})"
    say(about)
    values = {
      "minutes": settings.sizing.minutes, "images": self.images, "step_seconds": self.step_seconds,
      "first_minutes": took, "good_minutes": max(took, good),
      "chosen": {name: value_of(settings, name) for name in _CHOSEN},
    }  # fmt: skip
    if hosts.is_main():
      summary.write_json(os.path.join(workdir, RECORD), values)
    return settings


def _in_words(minutes: float) -> str:
  return "a minute" if minutes < 1.5 else f"{minutes:.0f} minutes"


def _chosen(
  settings: Settings, images: int, sizes: list[Candidate], any_mesh: Mesh, mesh: Mesh | None
) -> _Plan:
  """Returns the plan of the largest size whose first result the minutes allow; `any_mesh` divides batches as `mesh`."""

  def plan(size: Candidate, image_seconds: float, batch_size: int = 0) -> _Plan:
    return _plan(settings, size, images, any_mesh, image_seconds, batch_size)

  def reaches(size: Candidate, image_seconds: float) -> bool:
    return size.first_images * image_seconds <= settings.sizing.minutes * 60 * _FOR_STEPS

  def timed(plan: _Plan) -> float:
    return step_seconds(plan.settings, plan.model, mesh)

  # A few images fill a CPU's cores, not an accelerator.
  trial = plan(sizes[0], 1.0, _BATCHES[any_mesh.devices.flat[0].platform != "cpu"])
  if sizes[0].start is not None:
    weights.check_same_model(trial.settings, sizes[0].start)
  trial_seconds = timed(trial)
  speed = compilation.flops_per_image(trial.model) * trial.batch_size / trial_seconds
  for size in reversed(sizes):
    flops = compilation.flops_per_image(plan(size, 1.0).model)
    guessed = plan(size, flops / speed)
    if size is not sizes[0] and not reaches(size, flops / speed):
      continue
    try:
      same = size is sizes[0] and guessed.batch_size == trial.batch_size
      image_seconds = (trial_seconds if same else timed(guessed)) / guessed.batch_size
    except DoesNotFit:
      if size is sizes[0]:
        raise
      continue
    if size is sizes[0] or reaches(size, image_seconds / _SLACK):
      chosen = plan(size, image_seconds, guessed.batch_size)
      choices.optimizer_config(chosen.settings)  # raises if its steps don't suit what is given
      return chosen
  raise AssertionError("the smallest size is always taken")


def _plan(
  settings: Settings,
  size: Candidate,
  images: int,
  mesh: Mesh,
  image_seconds: float,
  batch_size: int,
) -> _Plan:
  """Returns the run of a size at this speed; `batch_size` 0: chosen."""
  kept = dict(size.choices)
  if settings.model.size:
    kept = {name: kept[name] for name in _BESIDE_SHAPE if name in kept}
  sized = with_values(settings, _open(settings, kept))
  shape = sized.model
  # Given heads that rope2d doesn't take keep the positions that are set.
  if size.start is None and shape.n_head and shape.n_embd // shape.n_head % 4:
    sized = with_values(sized, {"model.positions": settings.model.positions})
  most_images = candidates.passes(sized) * images
  seen = min(settings.sizing.minutes * 60 * _FOR_STEPS / image_seconds, most_images)
  if not batch_size:
    batch_size = _BATCHES[0]
    while batch_size < _BATCHES[1] and seen > batch_size * _MANY_STEPS:
      batch_size *= 2
  batch_size = sharding.round_up_batch(mesh, batch_size)
  sized = with_values(sized, _open(settings, {"train.batch_size": batch_size}))
  batch_size = sized.train.batch_size
  seconds = image_seconds * batch_size
  most_steps = _most_steps(sized, images)
  good_steps = min(_GOOD * size.first_images // batch_size, most_steps)
  steps = _steps(settings.sizing.minutes, seconds, most_steps)
  steps = _open(settings, {"train.steps": steps}).get("train.steps", settings.train.steps)
  every = min(max(round(_EVAL_SECONDS / seconds), 1), max(steps // 5, 1))
  cadence = {
    "train.steps": steps,
    "train.warmup_steps": min(steps // 10, 200),
    "train.log_every": min(max(round(_LOG_SECONDS / seconds), 1), 50),
    "train.eval_every": every,
    "train.eval_images": _EVAL_IMAGES,
    "train.checkpoint_every": every,
  }
  sized = with_values(sized, _open(settings, cadence))
  settled = choices.settle(sized, None if size.start is None else size.start.config)
  model = choices.model_config(settled)
  return _Plan(sized, model, images, seconds, good_steps, most_steps)


def step_seconds(settings: Settings, model: ImageGPTConfig, mesh: Mesh | None) -> float:
  """Returns the seconds of a compiled training step of a model, the median of some. Collective.

  Args:
    settings: of the training.
    model: its model.
    mesh: the mesh to train on; None: the settings'.

  Raises:
    DoesNotFit: it needs more memory than the devices have.
  """
  # A rate takes no time, and the plan's steps are a guess that given settings needn't suit.
  settings = with_values(settings, {"train.schedule": "constant", "train.warmup_steps": 0})
  at_a_time = settings.train.batch_size // settings.train.accumulate
  model, mesh = devices.arranged(settings, model, at_a_time, mesh, tell=lambda _: None)
  train_step, tx = measurements.step_of(settings, model)
  memory.check_state(model, tx, mesh)
  batch = settings.train.batch_size
  compiled = device.compile_training_step(model, train_step, tx, mesh, batch)
  memory.check_step(compiled, mesh)
  run_step = device.step_call(model, compiled, tx, mesh, batch)
  with jax.set_mesh(mesh):
    timed = device.take_turns({"step": run_step}, _REPEATS, lambda done: None)["step"]
  return hosts.from_main(math.ceil(timed.seconds * 1e6), "the first host's time of a step") / 1e6
