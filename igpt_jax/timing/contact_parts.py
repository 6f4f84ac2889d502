"""Parts of job first_contact: their order, what the time allows, and what is kept of them on disk."""

import dataclasses
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from igpt_jax import files
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.reporting import summary
from igpt_jax.timing import contact_tables

FILE, TABLE = "first_contact.json", "first_contact.md"
KINDS = ("training", "sampling", "input", "forecast")

# What came of a part. What was left out for time, and what failed, is tried at the next start of one's own.
MEASURED, TOO_LARGE, FAILED, LEFT_OUT = "measured", "doesn't fit", "failed", "left out"
_TRIES = 2  # starts that a part may end the process of, before it counts as failed

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
  """A measurement, or a forecast, of a kind in KINDS, of a config."""

  kind: str
  config: str

  @property
  def name(self) -> str:
    """Its name in the report."""
    return f"{self.config}: {self.kind}"


def ordered(configs: Sequence[str], kinds: Sequence[str]) -> list[Part]:
  """Returns the parts, the most informative first: the training of all configs, in their order, then sampling.

  Input is measured for the first config, which is the fastest to train. Forecasts come last: they need
  what was measured, and none of this machine's accelerators.
  """
  return [
    Part(kind, config)
    for kind in KINDS
    if kind in kinds
    for config in (configs[:1] if kind == "input" else configs)
  ]


def is_allowed(part: Part, left: float, took: Mapping[Part, float]) -> bool:
  """Returns True if a part may begin with so many seconds left.

  Configs come small to large: a part takes at least as long as the one of its kind before it.

  Args:
    part: the part.
    left: seconds of the budget.
    took: seconds that the parts took that were measured in this start.
  """
  alike = [seconds for other, seconds in took.items() if other.kind == part.kind]
  return left > max(alike, default=0.0)


class Record:
  """The main process' report on disk, written whole after every part: what it is of, and what came of each part.

  Args:
    workdir: its folder.
    about: what the measurements are of: machine, versions, environment. A report of another machine is
      set aside under another name.
    keys: part -> digest of all that decides it; what was kept under another one is measured anew. What was
      kept of other configs stays in the report.
    heading: what else the report says, that decides nothing; "configs" has what each of them is.

  Attributes:
    aside: name of the file that another machine's report was set aside as; "": there was none.
    stale: names of parts that were kept with other settings, and aren't any more.

  Raises:
    UserError: the report there is damaged.
  """

  def __init__(
    self, workdir: str, about: Values, keys: Mapping[Part, str], heading: Values | None = None
  ):
    self._workdir, self._keys = workdir, keys
    self._about = json.loads(json.dumps(about))
    self._heading = {"configs": {}} | (heading or {})
    self._lock = threading.Lock()  # a signal is answered by another thread
    self._begun: Values = {}  # name -> key, and the starts that it ended or that do it now
    self._now = ""
    self.entries: dict[str, Values] = {}
    self.aside, self.stale = "", []
    if hosts.is_main():
      self._load()

  def _load(self) -> None:
    path = os.path.join(self._workdir, FILE)
    try:
      old = files.read_json(path)
      about, entries, begun = old["about"], dict(old["parts"]), dict(old["begun"])
      configs = dict(old["configs"])
      names = {part.name: key for part, key in self._keys.items()}
      counts = {name: (count["key"], int(count["times"])) for name, count in begun.items()}
      _check(entries)
      same = {name for name, entry in entries.items() if entry["key"] == names.get(name)}
    except FileNotFoundError:
      return
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
      raise UserError(f"workdir: {path} is damaged ({error!r}); fix: remove it") from None
    if about != self._about:
      stem = f"first_contact-{files.digest(about)[:8]}"
      for name, suffix in ((FILE, ".json"), (TABLE, ".md")):
        if files.exists(source := os.path.join(self._workdir, name)):
          files.move(source, os.path.join(self._workdir, stem + suffix))
      self.aside = f"{stem}.json"
      return
    self.stale = [name for name in entries if name in names and name not in same]
    self.entries = {name: entry for name, entry in entries.items() if name not in self.stale}
    self._heading["configs"] = configs | self._heading["configs"]
    # A part that ended the process: this start goes on with the rest, and doesn't repeat failures.
    if not counts:
      self.entries = {n: entry for n, entry in self.entries.items() if entry["state"] != FAILED}
    self._begun = {n: begun[n] for n, (key, _) in counts.items() if names.get(n, key) == key}

  def settled(self, part: Part) -> bool:
    """Returns True if it is known what came of a part, in this start or an earlier one."""
    entry = self.entries.get(part.name, {})
    if part.kind == "forecast" and entry.get("state") == MEASURED:
      trained = self.values(Part("training", part.config))
      if trained and trained["accumulate"] != entry["values"]["accumulate"]:
        return False  # of another step than the one that was measured since
    return entry.get("state") in (MEASURED, TOO_LARGE, FAILED)

  def took(self) -> dict[Part, float]:
    """Returns the seconds that the parts took that were measured, in this start or an earlier one."""
    return {
      part: self.entries[part.name]["seconds"]
      for part in self._keys
      if self.values(part) is not None
    }

  def values(self, part: Part) -> Values | None:
    """Returns what was measured of a part; None: it wasn't."""
    entry = self.entries.get(part.name, {})
    return entry.get("values") if entry.get("state") == MEASURED else None

  def has_ended_starts(self, part: Part) -> bool:
    """Returns True if a part has ended the process as often as it may."""
    return self._times_begun(part) >= _TRIES

  def _times_begun(self, part: Part) -> int:
    return self._begun.get(part.name, {"times": 0})["times"]

  def begin(self, part: Part) -> None:
    """Notes that a part has begun, in case that it ends the process."""
    with self._lock:
      times = self._times_begun(part) + 1
      self._begun[part.name] = {"key": self._keys[part], "times": times}
      self._now = part.name
      self._write()

  def finish(
    self, part: Part, state: str, *, reason: str = "", values: Values | None = None, took: float = 0
  ) -> None:
    """Keeps what came of a part; `took` is in seconds."""
    entry: Values = {"kind": part.kind, "config": part.config, "state": state}
    entry |= {"key": self._keys[part], "reason": reason, "seconds": round(took, 1)}
    with self._lock:
      self.entries[part.name] = entry | {"values": values or {}}
      self._begun.pop(part.name, None)
      self._now = ""
      self._write()

  def stopped(self) -> None:
    """Forgets that a part has begun: the process ends because it was told to."""
    with self._lock:
      self._begun.pop(self._now, None)
      self._write()

  def as_json(self) -> Values:
    """Returns the report, its parts in their order."""
    names = [part.name for part in self._keys if part.name in self.entries]
    parts = {
      name: self._compared(self.entries[name]) for name in dict.fromkeys([*names, *self.entries])
    }
    return {"about": self._about, **self._heading, "parts": parts, "begun": self._begun}

  def _compared(self, entry: Values) -> Values:
    """Returns an entry with its ratio to the training step as that is known now, which may be newer."""
    if entry["state"] != MEASURED or entry["kind"] not in ("input", "forecast"):
      return entry
    trained, values, ratio = self.values(Part("training", entry["config"])), entry["values"], None
    if entry["kind"] == "input":
      if trained:
        ratio = values["pictures_per_second"] * values["hosts"] / trained["images_per_second"]
      return entry | {"values": values | {"times_training": ratio}}
    memory = None
    if trained and trained["accumulate"] == values["accumulate"]:
      ratio = trained["step"]["seconds"] / values["step_seconds"]
      memory = trained["peak_bytes_per_device"]
    compared = {"measured_over_forecast": ratio, "measured_bytes_per_device": memory}
    return entry | {"values": values | compared}

  def write(self) -> None:
    """Writes both files, each whole."""
    with self._lock:
      self._write()

  def _write(self) -> None:
    report = self.as_json()
    summary.write_json(os.path.join(self._workdir, FILE), report)
    summary.write_text(os.path.join(self._workdir, TABLE), contact_tables.as_markdown(report))


def _check(entries: Values) -> None:
  """Raises KeyError or TypeError if an entry lacks what the report reads of it."""
  for entry in entries.values():
    if lacks := {"kind", "config", "state", "key", "reason", "seconds", "values"} - entry.keys():
      raise KeyError(*sorted(lacks))
