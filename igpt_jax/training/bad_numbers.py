"""What counts as bad numbers in training, and what is to be done about them."""

import dataclasses
import math

from igpt_jax.errors import UserError

ACTIONS = ("rollback", "stop", "warn")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """`config.guard`.

  Attributes:
    in_row: updates left out one after the other, until `then`.
    then: "rollback", "stop" or "warn" (only told).
    spike: nats per token above the median of the last 20 logged losses that make a spike; 0: none is.
    spike_then: likewise.
    rollbacks: of one run, at most; then it stops.
  """

  in_row: int = 10
  then: str = "rollback"
  spike: float = 1.0
  spike_then: str = "warn"
  rollbacks: int = 3

  def __post_init__(self):
    for name in ("then", "spike_then"):
      if getattr(self, name) not in ACTIONS:
        raise UserError(
          f"config.guard.{name}: {getattr(self, name)!r}; expected one of {', '.join(ACTIONS)}"
        )
    for name, least in (("in_row", 1), ("rollbacks", 0)):
      value = getattr(self, name)
      if not isinstance(value, int) or value < least:
        raise UserError(f"config.guard.{name}: {value}; expected {least} or more")
    if not (math.isfinite(self.spike) and self.spike >= 0):
      raise UserError(f"config.guard.spike: {self.spike}; expected 0 or more nats per token")


class BadNumbers(UserError):
  """Training goes wrong, and the config says that it isn't to go on so.

  Attributes:
    step: where this was seen.
    since: the last step at which all was well, as far as is known.
    back: whether the config says to go back.
  """

  def __init__(self, message: str, step: int, since: int, back: bool):
    super().__init__(message)
    self.step, self.since, self.back = step, since, back
