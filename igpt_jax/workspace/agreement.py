"""Whether all hosts of a run do the same: asked now and then, where they wait for each other anyway."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpt_jax import __version__, files
from igpt_jax.checkpoint.checksum import checksum
from igpt_jax.config.fields import FIELDS, Settings, as_json
from igpt_jax.errors import HostsDiffer, UserError
from igpt_jax.model.image_gpt import Params

_BYTES = 96  # that are compared of a name and its value; of longer ones a checksum, too


def differing(values: Mapping[str, Any]) -> dict[str, list[str]]:
  """name -> the value on every host, of those that aren't the same everywhere.

  All hosts must call it together, with the same number of values.
  """
  if jax.process_count() == 1:
    return {}
  mine = np.stack([_as_bytes(name, value) for name, value in values.items()])
  all_HxNxB = np.asarray(multihost_utils.process_allgather(mine))
  found = {}
  for i, name in enumerate(values):
    if (all_HxNxB[:, i] != all_HxNxB[0, i]).any():
      texts = [bytes(row[4:]).rstrip(b"\0").decode(errors="replace") for row in all_HxNxB[:, i]]
      found[name] = [text.removeprefix(f"{name}=") for text in texts]
  return found


def _as_bytes(name: str, value: Any) -> np.ndarray:
  text = f"{name}={value}".encode()
  whole = zlib.crc32(text).to_bytes(4, "little") + text[:_BYTES]
  return np.frombuffer(whole.ljust(_BYTES + 4, b"\0"), np.uint8)


def _in_words(found: Mapping[str, list[str]]) -> str:
  said = []
  for name, values in found.items():
    others = [f"host {i} {value}" for i, value in enumerate(values) if value != values[0]]
    said.append(f"{name}: host 0 has {values[0]}, {', '.join(others[:4]) or 'others another'}")
  return "; ".join(said)


def check(
  at_step: int, place: Callable[[], Mapping[str, Any]], params: Params | None = None
) -> None:
  """Compares the step, the place in the data, and the numbers of parameters, on all hosts.

  Args:
    at_step: of this host.
    place: tells where in which data this host is, in words that all hosts must have in common.
    params: of which each host, or group of hosts that share one copy, has a copy to compare.

  Raises:
    UserError: the step or the data differ.
    HostsDiffer: parameters do. The next start goes on from a checkpoint at which they didn't.
  """
  if jax.process_count() == 1:
    return
  found = differing({"step": at_step, **place()})
  if found:
    raise UserError(
      f"hosts: they differ at step {at_step}: {_in_words(found)}; expected the same everywhere; fix: "
      "give every host the same command, data and version of igpt_jax"
    )
  if params is not None:
    found = differing({"checksum": checksum(params)})
    if found:
      raise HostsDiffer(
        f"hosts: their parameters differ at step {at_step}: {_in_words(found)}; nothing of this is "
        "saved; fix: the same command goes on from the checkpoint before; if it happens again, a host "
        "named here computes wrongly"
      )


def check_data(fingerprint: str) -> None:
  """Compares what all hosts are about to read, each from its own place perhaps.

  Raises:
    UserError: names, contents or labels differ.
  """
  found = differing({"data": fingerprint})
  if found:
    raise UserError(
      f"hosts: they would read different data: {_in_words(found)}; expected the same files on every "
      "host; fix: copy data.path or data.data_dir anew"
    )


def check_settings(settings: Settings) -> None:
  """Compares the settings on all hosts; what may be a host's own is left out.

  Raises:
    UserError: some differ.
  """
  compared = {
    f"config.{name}": value
    for name, value in files.flatten(as_json(settings)).items()
    if not FIELDS[name].host
  }
  # The first has one length whatever the hosts run, the second only where that is the same.
  found = differing({"igpt_jax": __version__, "fields": sorted(compared)}) or differing(compared)
  if found:
    raise UserError(
      f"hosts: they were started differently: {_in_words(found)}; expected the same everywhere; fix: "
      "the same command on every host"
    )
