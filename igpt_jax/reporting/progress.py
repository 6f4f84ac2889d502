"""Progress lines of training, and countdowns of other long work."""

import time
from collections.abc import Callable, Mapping, Sequence


class Progress:
  """Speed, share of the peak, and time left; one line for a person at every log.

  Args:
    total_steps: of the run.
    images_per_step: global batch size.
    flops_per_image: model FLOPs of a training step (nothing recomputed).
    peak_flops: of all devices together, or None where it isn't known: then no MFU is shown.
    shown: the metrics that a line tells, in order, and how.
  """

  PRETRAINING = (("loss", "loss {:.4f} nats/token"), ("validation_loss", "validation {:.4f}"))

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
    self._began = self._last = time.monotonic()

  def batches(self, batch_size: int) -> Callable[[int], None]:
    """A ticker that is told how many batches are done, not how many of the whole."""
    return lambda n: self.tick(n * batch_size)

  def tick(self, done: int) -> None:
    now = time.monotonic()
    # The longer it takes, the less often it has something to say.
    pause = max(self._every, 0.1 * (now - self._began))
    if now - self._last < pause or not 0 < done < self._total:
      return
    self._last = now
    speed = done / (now - self._began)
    left = format_seconds((self._total - done) / speed)
    self._say(f"{self._what}: {done:,}/{self._total:,}  {speed:,.1f}/s  ETA {left}")


def format_seconds(seconds: float) -> str:
  """3723 -> 1:02:03; days in front when there are any."""
  days, rest = divmod(round(seconds), 86_400)
  hours, rest = divmod(rest, 3_600)
  clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
  return f"{days}d {clock}" if days else clock
