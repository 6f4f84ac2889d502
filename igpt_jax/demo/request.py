"""What a request asks for: its parameters, checked, or why it isn't served."""

import base64
import functools
from urllib.parse import urlsplit

import numpy as np

from igpt_jax.data.order import MAX_SEED
from igpt_jax.demo.models import Models
from igpt_jax.errors import UserError
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.sampling.completer import prompt_rows

MAX_TEMPERATURE = 2.0
MAX_PASSES = 64


class Refused(Exception):
  """A request that isn't served, with its HTTP status and a message for the person."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class CompletionRequest:
  """Parameters of a completion. Raises Refused if one is invalid."""

  def __init__(self, query, models: Models, most_samples: int):
    parameter = functools.partial(number, query)
    self.model: int = parameter("model", int, 0, len(models) - 1)
    side = models.reader(self.model).resolution
    self.n: int = parameter("n", int, 1, most_samples)
    self.seed: int = parameter("seed", int, 0, MAX_SEED)
    self.passes: int = parameter("passes", int, 1, MAX_PASSES, "16")
    if models.any_region(self.model):
      self.known = _known(query.get("hidden", ""), side)
      self.steps = min(self.passes, int((~self.known).sum()))
    else:
      keep = parameter("keep", float, 0, 1)
      if not 0 < keep < 1:
        raise Refused(400, f"keep: {keep}; expected a share of the rows within (0, 1)")
      self.known = np.repeat(np.arange(side)[:, None] < prompt_rows(keep, side), side, axis=1)
      self.steps = side - prompt_rows(keep, side)
    temperature = parameter("temperature", float, 0, MAX_TEMPERATURE)
    top_k, top_p = parameter("top_k", int, 0, 2**16, "0"), parameter("top_p", float, 0, 1, "1")
    try:
      self.sampling = SamplingConfig(temperature, top_k, top_p)
    except UserError as error:
      raise Refused(400, str(error)) from None


def number(query, name: str, kind, least, most, default: str | None = None):
  """Returns a parameter within bounds. Raises Refused otherwise, and without one or a default."""
  text = query.get(name, default)
  try:
    value = kind(text)
  except (TypeError, ValueError):
    raise Refused(400, f"{name}: {text!r}; expected a number") from None
  if not least <= value <= most:
    raise Refused(400, f"{name}: {value}; expected {least} to {most}")
  return value


def _known(hidden: str, side: int) -> np.ndarray:
  """Returns the given pixels, bool [side, side]. Raises Refused if `hidden` isn't a mask of that size."""
  try:
    packed = np.frombuffer(base64.b64decode(hidden, b"-_", validate=True), np.uint8)
  except ValueError:
    packed = np.zeros(0, np.uint8)
  if len(packed) != -(-(side**2) // 8):
    raise Refused(400, f"hidden: {hidden[:40]!r}; expected {side}×{side} bits in URL-safe base64")
  known = np.unpackbits(packed)[: side**2].reshape(side, side) == 0
  if known.all():
    raise Refused(400, "hidden: no pixel; expected one or more")
  return known


def check_origin(request) -> None:
  origin = request.headers.get("origin")
  if origin and urlsplit(origin).netloc != request.headers.get("host"):
    raise Refused(403, "another site's page may not ask for completions")
