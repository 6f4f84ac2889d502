"""The one error a person can cause. Ground floor: imports nothing."""


class UserError(Exception):
  """Something in the configuration, the data or the workdir is not as it must be.

  The message names the thing, its value, what was expected and the fix. `main` prints it without a
  traceback and exits with status 2.
  """
