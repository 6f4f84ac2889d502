"""Progress lines of training, and countdowns of other long work."""

import time
from collections.abc import Callable, Mapping, Sequence

from igpt_jax import units


class Progress:
  """Measures speed, MFU and remaining time, and formats the progress line of a log.

  Args:
    total_steps: steps of the run.
    images_per_step: global batch size.
    flops_per_image: model FLOPs of a training step, without recomputation.
    peak_flops: FLOP/s of all devices together; None if unknown: then there is no MFU.
    shown: metrics of the line, in order, with their formats.
  """

  PRETRAINING = (("loss", "loss {:.4f} nats/token"), ("validation_loss", "validation {:.4f}"))
  _SPEED = (("mfu", "MFU {:.1%}"), ("data_wait", "data wait {:.0%}"))

  def __init__(
    self,
    total_steps: int,
    images_per_step: int,
    flops_per_image: float,
    peak_flops: float | None,
    shown: Sequence[tuple[str, str]] = PRETRAINING,
  ):
    self.shown = tuple(shown)
    self.total_steps, self.images_per_step = total_steps, images_per_step
    self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
    self._since: tuple[float, int] | None = None
    self._paused = self._seconds = self._waited = 0.0

  def start(self, step: int, waited: float = 0.0) -> None:
    """Starts measuring at `step`, after compilation. `waited`: seconds spent waiting for data so far."""
    self._since = (time.monotonic(), step)
    self._paused = 0.0
    self._waited = waited

  def pause(self, seconds: float) -> None:
    """Excludes time that wasn't training (evaluation, waiting for a checkpoint)."""
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
      parts.append(f"{units.significant(values['images_per_second'])} images/s")
    parts += [form.format(values[name]) for name, form in self._SPEED if name in values]
    if "eta_seconds" in values:
      parts.append(f"ETA {format_seconds(values['eta_seconds'])}")
    return "  ".join(parts)


class Countdown:
  """Prints progress of work of known length (done/total, speed, ETA), less often the longer it takes."""

  def __init__(
    self,
    what: str,
    total: int,
    say: Callable[[str], None],
    every: float = 5.0,
    show: Callable[[float], str] = units.significant,
  ):
    """Starts the clock; `show` formats amounts of the work, and its speed."""
    self._what, self._total, self._say, self._every = what, total, say, every
    self._show = show
    self._began = self._last = time.monotonic()

  def batches(self, batch_size: int) -> Callable[[int], None]:
    """Returns a `tick` that counts batches."""
    return lambda n: self.tick(n * batch_size)

  def tick(self, done: int) -> None:
    now = time.monotonic()
    pause = max(self._every, 0.1 * (now - self._began))
    if now - self._last < pause or not 0 < done < self._total:
      return
    self._last = now
    speed = done / (now - self._began)
    left = format_seconds((self._total - done) / speed)
    done_of_total = f"{self._show(done)}/{self._show(self._total)}"
    self._say(f"{self._what}: {done_of_total}  {self._show(speed)}/s  ETA {left}")


def format_seconds(seconds: float) -> str:
  """Formats 3723 as 1:02:03, with days in front if there are any."""
  days, rest = divmod(round(seconds), 86_400)
  hours, rest = divmod(rest, 3_600)
  clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
  return f"{days}d {clock}" if days else clock
