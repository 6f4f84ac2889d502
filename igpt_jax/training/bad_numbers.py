"""The error that ends a training run whose numbers went bad."""

from igpt_jax.errors import UserError


class BadNumbers(UserError):
  """Bad numbers in training with which the settings don't let it continue.

  Attributes:
    step: the step at which they were noticed.
    since: the last step known to be good.
    back: True if the settings ask for a rollback.
    stopped_by: the signal that had asked the run to stop meanwhile; None: none had.
  """

  def __init__(self, message: str, step: int, since: int, back: bool):
    super().__init__(message)
    self.step, self.since, self.back = step, since, back
    self.stopped_by: str | None = None
