"""The errors that a person is told in one line. Ground floor: imports nothing."""


class UserError(Exception):
  """Something in the configuration, the data or the workdir is not as it must be.

  The message names the thing, its value, what was expected and the fix. `main` prints it without a
  traceback and exits with `status`.
  """

  status = 2  # a mistake: running the same command again doesn't help


class NoSuchSplit(UserError):
  """The data set is there, but not this split of it; some jobs can do without."""


class NewerFormat(UserError):
  """A workdir or a checkpoint was written by a version that knows more than this one: it isn't damaged."""


class SaveFailed(UserError):
  """A checkpoint can't be written; the same command may go on, once it can."""

  status = 1


class HostsDiffer(UserError):
  """Hosts of one run have come to different numbers; the same command may go on."""

  status = 1
