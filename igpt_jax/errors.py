"""Errors that are reported in one line. Ground floor: imports nothing of the project."""

import errno


class UserError(Exception):
  """A mistake in the settings, the data or the workdir.

  The message names the thing, its value, what was expected and the fix. `main` prints it without a
  traceback and exits with `status`.
  """

  status = 2  # a mistake: running the same command again doesn't help


class NoSuchSplit(UserError):
  """A data set has no such split; some jobs can do without it."""


class NewerFormat(UserError):
  """A workdir or a checkpoint was written by a newer version; it isn't damaged."""


class DoesNotFit(UserError):
  """A model, or a step, needs more memory than a device has."""


class SaveFailed(UserError):
  """A checkpoint can't be written; the same command may succeed later."""

  status = 1


class HostsDiffer(UserError):
  """Hosts of one run have computed different numbers; the same command may succeed."""

  status = 1


class Stopped(UserError):
  """A signal stopped a part of a job, which has been saved; the same command goes on."""

  status = 0


class BucketError(UserError, OSError):
  """A bucket refuses a request or can't be reached: an error of a file, told in one line.

  Args:
    message: the line.
    number: the error's number (errno): ENOENT and EACCES are mistakes, others may pass.
  """

  def __init__(self, message: str, number: int):
    super().__init__(number, message)
    self.status = 2 if number in (errno.ENOENT, errno.EACCES) else 1

  def __str__(self) -> str:
    return self.strerror or ""
