"""Errors of requests to buckets, in one line with the fix. Ground floor."""

import errno

from igpt_jax.errors import BucketError


def in_words(path: str, error: Exception) -> Exception:
  """Returns the BucketError of `failure`, or the error itself if no bucket is at fault."""
  import gcsfs.retry

  told = failure(path, error)
  if told is None and isinstance(error, gcsfs.retry.HttpError | ValueError):
    return BucketError(f"{path}: the bucket answers: {_text(error)}", errno.EIO)
  return told or error


def failure(path: str, error: BaseException) -> BucketError | None:
  """Returns the error of a bucket that refuses or can't be reached; None: it is an error of another kind.

  Args:
    path: what was to be read or written.
    error: raised by gcsfs, or by TensorStore, which names the kind of its errors in capitals.
  """
  import aiohttp
  import google.auth.exceptions
  import requests.exceptions
  from gcsfs.retry import ChecksumError

  bucket, text = path.removeprefix("gs://").partition("/")[0], _text(error)
  code = str(getattr(error, "code", None))
  if (
    isinstance(error, google.auth.exceptions.GoogleAuthError)
    or code == "401"
    or "UNAUTHENTICATED" in text
  ):
    return BucketError(
      f"{path}: the credentials aren't accepted ({text}); fix: `gcloud auth application-default login`, "
      "or run as a service account",
      errno.EACCES,
    )
  forbidden = isinstance(error, OSError) and text.startswith("Forbidden")
  if forbidden or code == "403" or "PERMISSION_DENIED" in text:
    return BucketError(
      f"{path}: no right to do this ({text}); fix: grant this account roles/storage.objectUser on "
      f"gs://{bucket}, sign in (gcloud auth application-default login), or name a bucket of this project",
      errno.EACCES,
    )
  lost = (
    TimeoutError, aiohttp.ClientError, requests.exceptions.RequestException, ChecksumError,
    ConnectionError,
  )  # fmt: skip
  unavailable = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED")
  busy = code in ("408", "429", "500", "502", "503", "504")
  if isinstance(error, lost) or busy or any(kind in text for kind in unavailable):
    return BucketError(
      f"{path}: the bucket can't be reached after several attempts ({text})", errno.EIO
    )
  return None


def _text(error: BaseException) -> str:
  """Returns an error's text in one line, or its kind."""
  return " ".join(str(error).split())[:300] or type(error).__name__
