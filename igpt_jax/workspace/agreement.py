"""Comparisons among a run's hosts, made where they wait for each other anyway."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from igpt_jax import __version__, files
from igpt_jax.checkpoint.checksum import checksum
from igpt_jax.config.fields import FIELDS, Settings, as_json
from igpt_jax.errors import HostsDiffer, UserError
from igpt_jax.model.image_gpt import Params
from igpt_jax.parallel import hosts

_BYTES = 96  # compared of "name=value"; a checksum stands for the rest


def differing(values: Mapping[str, Any]) -> dict[str, list[str]]:
  """Returns name -> every host's value, of values that differ among hosts.

  Collective: all hosts must call it, with the same number of values.
  """
  if jax.process_count() == 1:
    return {}
  ours = np.stack([_as_bytes(name, value) for name, value in values.items()])
  what = f"a comparison of {', '.join(list(values)[:3])}"
  all_HxNxB = hosts.gathered(ours, what)
  different = {}
  for i, name in enumerate(values):
    if (all_HxNxB[:, i] != all_HxNxB[0, i]).any():
      texts = [bytes(row[4:]).rstrip(b"\0").decode(errors="replace") for row in all_HxNxB[:, i]]
      different[name] = [text.removeprefix(f"{name}=") for text in texts]
  return different


def _as_bytes(name: str, value: Any) -> np.ndarray:
  text = f"{name}={value}".encode()
  whole = zlib.crc32(text).to_bytes(4, "little") + text[:_BYTES]
  return np.frombuffer(whole.ljust(_BYTES + 4, b"\0"), np.uint8)


def _in_words(different: Mapping[str, list[str]]) -> str:
  parts = []
  for name, values in different.items():
    others = [f"host {i} {value}" for i, value in enumerate(values) if value != values[0]]
    parts.append(f"{name}: host 0 has {values[0]}, {', '.join(others[:4]) or 'others another'}")
  return "; ".join(parts)


def check(
  at_step: int, place: Callable[[], Mapping[str, Any]], params: Params | None = None
) -> None:
  """Compares the step, the place in the data, and the parameters' checksums on all hosts.

  Args:
    at_step: this host's step.
    place: returns the data that this host reads and its position there; must not depend on the host.
    params: compared among hosts, or groups of hosts, that have copies of them.

  Raises:
    UserError: the step or the data differ.
    HostsDiffer: the parameters differ. The next start resumes from the checkpoint before.
  """
  if jax.process_count() == 1:
    return
  different = differing({"step": at_step, **place()})
  if different:
    raise UserError(
      f"hosts: they differ at step {at_step}: {_in_words(different)}; expected the same everywhere; fix: "
      "give every host the same command, data and version of igpt_jax"
    )
  if params is not None:
    different = differing({"checksum": checksum(params)})
    if different:
      raise HostsDiffer(
        f"hosts: their parameters differ at step {at_step}: {_in_words(different)}; nothing of this is "
        "saved; fix: the same command goes on from the checkpoint before; if it happens again, a host "
        "named here computes wrongly"
      )


def check_data(fingerprint: str) -> None:
  """Compares the fingerprints of the data that hosts are about to read.

  Raises:
    UserError: names, contents or labels differ.
  """
  different = differing({"data": fingerprint})
  if different:
    raise UserError(
      f"hosts: they would read different data: {_in_words(different)}; expected the same files on every "
      "host; fix: copy data.path or data.data_dir anew"
    )


def check_settings(settings: Settings) -> None:
  """Compares the settings on all hosts, except those that may be a host's own.

  Raises:
    UserError: some differ.
  """
  compared = {
    f"config.{name}": value
    for name, value in files.flatten(as_json(settings)).items()
    if not FIELDS[name].host
  }
  # Settings can be compared only if all hosts run a version that has the same ones.
  different = differing({"igpt_jax": __version__, "fields": sorted(compared)}) or differing(
    compared
  )
  if different:
    raise UserError(
      f"hosts: they were started differently: {_in_words(different)}; expected the same everywhere; fix: "
      "the same command on every host"
    )
