"""Where numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when asked; progress lines."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from igpt_jax.errors import UserError
from igpt_jax.files import replacing, sync


class JsonlWriter:
  """Appends one JSON object a line. A record's "step" never occurs twice for one kind of record.

  Resuming at a step drops the records after it: they are computed again, to the same values. Where the
  disk is full a record waits for the next one, or for `sync`, which says so.
  """

  def __init__(self, path: str, resume_step: int):
    self.path = path
    if os.path.exists(path):
      with open(path, encoding="utf-8", errors="replace") as lines:
        kept = [line.rstrip("\n") + "\n" for line in lines if _belongs_before(line, resume_step)]
      with replacing(path) as partial, open(partial, "w", encoding="utf-8") as out:
        out.writelines(kept)
    self._file = open(path, "ab", buffering=0)
    self._waiting = b""

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    self._waiting += (json.dumps({"step": step, **values}) + "\n").encode()
    with contextlib.suppress(OSError):
      self._append()

  def _append(self) -> None:
    """Whole lines, or nothing."""
    end, left = self._file.seek(0, os.SEEK_END), self._waiting
    try:
      while left:
        left = left[self._file.write(left) :]
    except OSError:
      self._file.truncate(end)
      raise
    self._waiting = b""

  def sync(self) -> None:
    """What was written is on the disk, as far as the file system keeps such a promise.

    Raises:
      OSError: it can't be; it still waits.
    """
    self._append()
    sync(self.path)

  def close(self) -> None:
    self._append()
    self._file.close()


def read_jsonl(path: str) -> list[dict[str, Any]]:
  """The records of a metrics file, [] where there is none; a line that a crash cut short is left out."""
  records = []
  if not os.path.exists(path):
    return records
  with open(path, encoding="utf-8", errors="replace") as lines:
    for line in lines:
      with contextlib.suppress(ValueError):
        records.append(json.loads(line))
  return [record for record in records if isinstance(record, dict)]


def newest(path: str) -> dict[str, Any]:
  """The newest value of every metric in a metrics file."""
  values = {name: value for record in read_jsonl(path) for name, value in record.items()}
  return {name: value for name, value in values.items() if name != "step"}


def _belongs_before(line: str, step: int) -> bool:
  try:
    return json.loads(line)["step"] <= step
  except (ValueError, KeyError, TypeError):
    return False  # a line that a crash cut short


class TensorBoardWriter:
  """Scalars as TensorBoard events, through tensorboardX."""

  def __init__(self, workdir: str, resume_step: int):
    try:
      import tensorboardX
    except ImportError:
      raise UserError(
        "log.tensorboard: True needs tensorboardX; fix: pip install 'igpt_jax[tensorboard]'"
      ) from None
    self._writer = tensorboardX.SummaryWriter(
      os.path.join(workdir, "tensorboard"), purge_step=resume_step + 1
    )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
      if isinstance(value, int | float):
        self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class WandbWriter:
  """Scalars to Weights & Biases; the run is named by the workdir and resumed with it."""

  def __init__(self, workdir: str, config: Mapping[str, Any], project: str):
    try:
      import wandb
    except ImportError:
      raise UserError("log.wandb: True needs wandb; fix: pip install 'igpt_jax[wandb]'") from None
    identity = os.path.join(workdir, "wandb_run_id")
    run_id = None
    if os.path.exists(identity):
      with open(identity, encoding="utf-8") as file:
        run_id = file.read().strip()
    name = os.path.basename(os.path.abspath(workdir))
    try:
      self._run = wandb.init(
        project=project, id=run_id, resume="allow", name=name, dir=workdir, config=dict(config)
      )
    except (wandb.errors.Error, OSError, ValueError) as error:  # no key, network or project
      raise UserError(
        f"log.wandb: True, but wandb.init failed ({' '.join(str(error).split())[:300]}); fix: "
        "`wandb login` or WANDB_API_KEY; or WANDB_MODE=offline, which is sent later by `wandb sync`; "
        "or --config.log.wandb=False"
      ) from None
    with open(identity, "w", encoding="utf-8") as file:
      file.write(self._run.id)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()


class Writers:
  """All the writers of a run; on processes other than 0 there are none."""

  def __init__(self, writers: list[Any]):
    self._writers = writers

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.write(step, values)

  def sync(self) -> None:
    """What goes on with a checkpoint is on the disk: metrics.jsonl."""
    for writer in self._writers:
      if isinstance(writer, JsonlWriter):
        writer.sync()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()


class Progress:
  """Speed, share of the peak, and time left; one line for a person at every log.

  Args:
    total_steps: of the run.
    images_per_step: global batch size.
    flops_per_image: model FLOPs of a training step (nothing recomputed).
    peak_flops: of all devices together, or None where it isn't known: then no MFU is shown.
    shown: the metrics that a line tells, in order, and how.
  """

  PRETRAINING = (
    ("loss", "loss {:.4f} nats/token"),
    ("validation_loss", "validation {:.4f}"),
  )

  def __init__(
    self,
    total_steps: int,
    images_per_step: int,
    flops_per_image: float,
    peak_flops: float | None,
    shown: Sequence[tuple[str, str]] = PRETRAINING,
  ):
    self.shown = tuple(shown)
    self.total_steps = total_steps
    self.images_per_step = images_per_step
    self.flops_per_image = flops_per_image
    self.peak_flops = peak_flops
    self._since: tuple[float, int] | None = None
    self._paused = 0.0
    self._seconds = 0.0
    self._waited = 0.0

  def start(self, step: int, waited: float = 0.0) -> None:
    """Begins to measure, at `step`: call it once compiled. `waited`: seconds for data, so far."""
    self._since = (time.monotonic(), step)
    self._paused = 0.0
    self._waited = waited

  def pause(self, seconds: float) -> None:
    """Takes out time that wasn't training (evaluation, waiting for a checkpoint)."""
    self._paused += seconds

  def measure(self, step: int) -> dict[str, float]:
    """images_per_second, mfu (if the peak is known) and eta_seconds since the last call."""
    now = time.monotonic()
    if self._since is None or step <= self._since[1]:
      return {}
    began, first = self._since
    self._seconds = max(now - began - self._paused, 1e-9)
    speed = (step - first) * self.images_per_step / self._seconds
    self.start(step, self._waited)
    values = {"images_per_second": speed}
    if self.peak_flops:
      values["mfu"] = speed * self.flops_per_image / self.peak_flops
    values["eta_seconds"] = (self.total_steps - step) * self.images_per_step / speed
    return values

  def share_waited(self, waited: float) -> float:
    """Share of the interval just measured that was spent waiting for data."""
    share = (waited - self._waited) / self._seconds
    self._waited = waited
    return min(max(share, 0.0), 1.0)

  def line(self, step: int, values: Mapping[str, float]) -> str:
    width = len(str(self.total_steps))
    parts = [f"step {step:>{width}}/{self.total_steps}"]
    parts += [form.format(values[name]) for name, form in self.shown if name in values]
    if "images_per_second" in values:
      parts.append(f"{values['images_per_second']:,.0f} images/s")
    if "mfu" in values:
      parts.append(f"MFU {values['mfu']:.1%}")
    if "data_wait" in values:
      parts.append(f"data wait {values['data_wait']:.0%}")
    if "eta_seconds" in values:
      parts.append(f"ETA {format_seconds(values['eta_seconds'])}")
    return "  ".join(parts)


class Countdown:
  """Lines about a job of known length, one every few seconds or tenth of its time: done/total, speed, ETA."""

  def __init__(self, what: str, total: int, say: Callable[[str], None], every: float = 5.0):
    self._what, self._total, self._say, self._every = what, total, say, every
    self._began = self._told = time.monotonic()

  def batches(self, batch_size: int) -> Callable[[int], None]:
    """A ticker that is told how many batches are done, not how many of the whole."""
    return lambda n: self.tick(n * batch_size)

  def tick(self, done: int) -> None:
    now = time.monotonic()
    # The longer it takes, the less often it has something to say.
    pause = max(self._every, 0.1 * (now - self._began))
    if now - self._told < pause or not 0 < done < self._total:
      return
    self._told = now
    speed = done / (now - self._began)
    left = format_seconds((self._total - done) / speed)
    self._say(f"{self._what}: {done:,}/{self._total:,}  {speed:,.1f}/s  ETA {left}")


def format_seconds(seconds: float) -> str:
  """3723 -> 1:02:03; days in front when there are any."""
  days, rest = divmod(round(seconds), 86_400)
  hours, rest = divmod(rest, 3_600)
  clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
  return f"{days}d {clock}" if days else clock
