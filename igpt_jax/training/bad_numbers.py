"""What counts as bad numbers in training, and what is to be done about them."""

from igpt_jax.errors import UserError


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
