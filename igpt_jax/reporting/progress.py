"""Progress lines of training, and signs of life of other long work."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from igpt_jax import units

_T = TypeVar("_T")

# Seconds between two lines: a tenth of the time so far, within these.
_SOONEST, _LATEST = 15.0, 60.0


class Progress:
  """Measures speed, MFU and remaining time, and formats the progress line of a log.

  Args:
    total_steps: steps of the run.
    images_per_step: global batch size.
    flops_per_image: model FLOPs of a training step, without recomputation.
    peak_flops: FLOP/s of all devices together; None if unknown: then there is no MFU.
    shown: metrics of the line, in order, with their formats.
    eval_every: steps between two evaluations, for the remaining time; 0: at the end only.
  """

  PRETRAINING = (
    ("loss", "loss {:.4f} nats/token"),
    ("validation_loss", "validation {:.4f}"),
    ("validation_bits_per_dim", "{:.4f} bits/dim"),
  )
  _SPEED = (("mfu", "MFU {:.1%}"), ("data_wait", "data wait {:.0%}"))

  def __init__(
    self,
    total_steps: int,
    images_per_step: int,
    flops_per_image: float,
    peak_flops: float | None,
    shown: Sequence[tuple[str, str]] = PRETRAINING,
    eval_every: int = 0,
  ):
    self.shown = tuple(shown)
    self._eval_every, self._evaluation_seconds = eval_every, 0.0
    self._began = time.monotonic()
    self._spoke: float | None = None
    self.total_steps, self.images_per_step = total_steps, images_per_step
    self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
    self._since: tuple[float, int] | None = None
    self._paused = self._seconds = self._waited = 0.0

  def start(self, step: int, waited: float = 0.0) -> None:
    """Starts measuring at `step`, after compilation. `waited`: seconds spent waiting for data so far."""
    self._since = (time.monotonic(), step)
    self._paused = 0.0
    self._waited = waited

  def pause(self, seconds: float, evaluated: bool = False) -> None:
    """Excludes time that wasn't training (evaluation, waiting for a checkpoint)."""
    self._paused += seconds
    if evaluated:
      self._evaluation_seconds = seconds

  def due(self) -> bool:
    """True if there was no line for a while: a few seconds at first, a minute later."""
    if self._spoke is None:
      return True
    now = time.monotonic()
    return now - self._spoke >= min(max(_SOONEST, 0.1 * (now - self._began)), _LATEST)

  def measure(self, step: int) -> dict[str, float]:
    """Returns `speed` since the last call, and begins anew."""
    values = self.speed(step)
    if values:
      self.start(step, self._waited)
    return values

  def speed(self, step: int) -> dict[str, float]:
    """Returns images_per_second, mfu (if the peak is known) and eta_seconds, since the last `measure`."""
    if self._since is None or step <= self._since[1]:
      return {}
    began, first = self._since
    self._seconds = max(time.monotonic() - began - self._paused, 1e-9)
    speed = (step - first) * self.images_per_step / self._seconds
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
    """Formats a step's line; its ETA includes evaluations, once one has been timed."""
    self._spoke = time.monotonic()
    width = len(str(self.total_steps))
    parts = [f"step {step:>{width}}/{self.total_steps}"]
    parts += [form.format(values[name]) for name, form in self.shown if name in values]
    if "images_per_second" in values:
      parts.append(f"{units.significant(values['images_per_second'])} images/s")
    parts += [form.format(values[name]) for name, form in self._SPEED if name in values]
    if "eta_seconds" in values:
      eta = values["eta_seconds"] + self._evaluations_after(step) * self._evaluation_seconds
      parts.append(f"ETA {format_seconds(eta)}")
    return "  ".join(parts)

  def _evaluations_after(self, step: int) -> int:
    every = self._eval_every or self.total_steps
    return -(-self.total_steps // every) - step // every if step < self.total_steps else 0


@contextlib.contextmanager
def doing(
  what: str, say: Callable[[str], None], after: float = 1.0, ends: bool = True
) -> Iterator[None]:
  """Says what the block does, and every now and then that it still does, if it takes longer than `after`.

  Then it also says how long it took, unless `ends` is False because the caller does.

  A thread says so: the block may be one call into native code.
  """
  began, ended, spoke = time.monotonic(), threading.Event(), threading.Event()

  def passed() -> float:
    return time.monotonic() - began

  def tell() -> None:
    if ended.wait(after):
      return
    spoke.set()
    say(f"{what} …")
    while not ended.wait(min(max(_SOONEST, 0.5 * passed()), _LATEST)):
      say(f"{what} … {units.seconds(passed())} so far")

  thread = threading.Thread(target=tell, name=what, daemon=True)
  thread.start()
  try:
    yield
    ended.set()
    thread.join()
    if spoke.is_set() and ends:
      say(f"{what}: {units.seconds(passed())}")
  finally:
    ended.set()


class Countdown:
  """Prints progress of work of known length (done/total, speed, ETA), less often the longer it takes.

  Args:
    what: the work.
    total: its length.
    say: prints a line.
    every: seconds between two lines, at least.
    show: formats amounts of the work, and its speed.
    then: name of what comes after it, and the seconds that it will take, which the ETA includes.
  """

  def __init__(
    self,
    what: str,
    total: int,
    say: Callable[[str], None],
    every: float = 5.0,
    show: Callable[[float], str] = units.significant,
    then: tuple[str, float] = ("", 0.0),
  ):
    self._what, self._total, self._say, self._every = what, total, say, every
    self._show = show
    self._after, self._after_seconds = then
    self._began = self._last = time.monotonic()
    self._first: tuple[float, int] | None = None
    self._spoke = False

  def batches(self, batch_size: int) -> Callable[[int], None]:
    """Returns a `tick` that counts batches."""
    return lambda n: self.tick(n * batch_size)

  def over(self, batches: Iterable[_T], batch_size: int) -> Iterator[_T]:
    """Passes batches on, and counts those that have been used."""
    for done, batch in enumerate(batches, 1):
      yield batch
      self.tick(done * batch_size)

  def tick(self, done: int) -> None:
    """Prints a line if it is time for one, or as soon as the work is known to be long.

    The first call comes when programs have been compiled: speed is measured from there on.
    """
    now = time.monotonic()
    since, before = self._first or (self._began, 0)
    self._first = self._first or (now, done)
    if not before < done < self._total:
      return
    speed = (done - before) / max(now - since, 1e-9)
    left = (self._total - done) / speed + self._after_seconds
    pause = max(self._every, 0.1 * (now - self._began))
    long = before and not self._spoke and left > 2 * self._every
    if now - self._last < pause and not long:
      return
    self._last, self._spoke = now, True
    done_of_total = f"{self._show(done)}/{self._show(self._total)}"
    after = f", {self._after} included" if self._after else ""
    self._say(
      f"{self._what}: {done_of_total}  {self._show(speed)}/s  ETA {format_seconds(left)}{after}"
    )


def format_seconds(seconds: float) -> str:
  """Formats 3723 as 1:02:03, with days in front if there are any."""
  days, rest = divmod(round(seconds), 86_400)
  hours, rest = divmod(rest, 3_600)
  clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
  return f"{days}d {clock}" if days else clock
