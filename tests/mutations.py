"""Tries whether the tests see mistakes: puts small ones into a copy of the project, one at a time.

  python tests/mutations.py                    all of them, about twenty minutes on one core
  python tests/mutations.py NAME…              some
  python tests/mutations.py --room training    those in one room
  python tests/mutations.py --list             their names, files and tests

Each mistake of `support/mutations` names the tests that must see it, and these alone are run. Exits with
status 1 if one survives without a reason, or can't be tried. The working tree is never changed.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from support.mutations import ALL
from support.mutations.mutation import PACKAGE, Mutation
from support.paths import ROOT, SHARED

KILLED, SURVIVED, ERROR = "killed", "SURVIVED", "error"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a mutation; `why` is a test's last words, or what went wrong."""

  mutation: Mutation
  verdict: str
  seconds: float
  why: str

  @property
  def is_well(self) -> bool:
    return self.verdict == KILLED or (self.verdict == SURVIVED and bool(self.mutation.reason))


def copy_of(root: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  """Copies what git tracks and what it doesn't ignore; returns the copy."""
  command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  names = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
  for name in filter(None, os.fsdecode(names).split("\0")):
    if (root / name).is_file():  # it may have been deleted since
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(root / name, target / name)
  return target


def run_tests(copy: pathlib.Path, nodes: Sequence[str], timeout: float) -> tuple[int | None, str]:
  """Runs tests in the copy; returns pytest's exit status, None if their time was over, and its output."""
  environment = {
    "JAX_PLATFORMS": "cpu",
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, (str(copy), os.environ.get("PYTHONPATH")))),
    # A file changed twice within a second can't be told from its bytecode.
    "PYTHONDONTWRITEBYTECODE": "1",
    "IGPT_SHARED": str(SHARED),
  }
  options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
  process = subprocess.Popen(
    [sys.executable, "-m", "pytest", *options, *nodes], cwd=copy, env=environment, text=True,
    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    start_new_session=True,
  )  # fmt: skip
  try:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output
  except subprocess.TimeoutExpired:
    return None, ""
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # and what the tests have started
    process.wait()


def judged(status: int | None, output: str) -> tuple[str, str]:
  """Returns the verdict on a mutation by pytest's exit status and output, and its reason."""
  lines = output.strip().splitlines() or [""]
  if status is None:
    return KILLED, "by the time limit"
  if status == 1:
    return KILLED, next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
  if status == 0 and " passed" in lines[-1]:
    return SURVIVED, lines[-1]
  return ERROR, f"pytest's status is {status}: {lines[-1]}"


def tried(copy: pathlib.Path, mutation: Mutation, timeout: float) -> Outcome:
  """Puts one mutation into the copy, runs its tests, and takes it out again."""
  began = time.monotonic()

  def outcome(verdict: str, why: str) -> Outcome:
    return Outcome(mutation, verdict, time.monotonic() - began, why)

  path = copy / PACKAGE / mutation.file
  try:
    mutated = mutation.mutated(copy)
  except ValueError as error:
    return outcome(ERROR, str(error))
  original = path.read_bytes()
  path.write_text(mutated, encoding="utf-8")
  try:
    return outcome(*judged(*run_tests(copy, mutation.tests, timeout)))
  finally:
    path.write_bytes(original)


def check_unmutated(copy: pathlib.Path, mutations: Sequence[Mutation], timeout: float) -> None:
  """Ends the program unless all tests pass without a mutation."""
  nodes = list(dict.fromkeys(node for mutation in mutations for node in mutation.tests))
  say(f"without a mutation: {len(nodes)} tests …")
  began = time.monotonic()
  status, output = run_tests(copy, nodes, timeout * len(nodes))
  if status != 0:
    say(output[-4_000:])
    sys.exit(f"the tests don't pass without a mutation (pytest's status is {status})")
  say(f"without a mutation: {output.strip().splitlines()[-1]} ({time.monotonic() - began:.0f} s)")


def table(outcomes: Sequence[Outcome]) -> str:
  """Formats what was found in each room."""
  by_room: dict[str, list[Outcome]] = collections.defaultdict(list)
  for outcome in outcomes:
    by_room[outcome.mutation.room].append(outcome)
  lines = [
    "| room | mutations | killed | by unit tests | survived | for a reason | errors | seconds |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
  ]
  for room, found in [*sorted(by_room.items()), ("all", list(outcomes))]:
    verdicts = collections.Counter(outcome.verdict for outcome in found)
    by_unit = sum(o.verdict == KILLED and o.mutation.by_unit_tests for o in found)
    reasons = sum(o.verdict == SURVIVED and bool(o.mutation.reason) for o in found)
    numbers = (
      len(found), verdicts[KILLED], by_unit, verdicts[SURVIVED] - reasons, reasons, verdicts[ERROR],
      round(sum(outcome.seconds for outcome in found)),
    )  # fmt: skip
    lines.append(f"| {room} | {' | '.join(map(str, numbers))} |")
  return "\n".join(lines)


def say(line: str) -> None:
  print(line, flush=True)


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Mutation]]:
  """Parses the command line; returns its options and the mutations that it chooses."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; none: all")
  parser.add_argument("--room", default="", help="only those in one room")
  parser.add_argument("--list", action="store_true", help="list them and end")
  parser.add_argument("--no-baseline", action="store_true", help="don't run the unmutated tests")
  parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each (300)")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the outcomes there")
  options = parser.parse_args(arguments)
  if unknown := set(options.names) - {mutation.name for mutation in ALL}:
    parser.error(f"no mutation is called {', '.join(sorted(unknown))}; --list shows all")
  chosen = [m for m in ALL if not options.names or m.name in options.names]
  chosen = [m for m in chosen if options.room in ("", m.room)]
  if not chosen:
    parser.error(
      f"--room {options.room}: no mutation; rooms: {', '.join({m.room: 0 for m in ALL})}"
    )
  return options, chosen


def main(arguments: Sequence[str] | None = None) -> int:
  options, chosen = parsed(arguments)
  if options.list:
    say("\n".join(f"{m.name:36}  {PACKAGE}/{m.file}  {' '.join(m.tests)}" for m in chosen))
    return 0
  os.nice(10)
  outcomes: list[Outcome] = []
  began = time.monotonic()
  with tempfile.TemporaryDirectory(prefix="igpt_jax_mutations_") as folder:
    copy = copy_of(ROOT, pathlib.Path(folder))
    if not options.no_baseline:
      check_unmutated(copy, chosen, options.timeout)
    first = time.monotonic()
    for number, mutation in enumerate(chosen, 1):
      outcome = tried(copy, mutation, options.timeout)
      outcomes.append(outcome)
      left = (time.monotonic() - first) / number * (len(chosen) - number)
      why = mutation.reason if outcome.is_well and mutation.reason else outcome.why
      say(
        f"{number:3}/{len(chosen)}  {outcome.verdict:8}  {mutation.name:36} {outcome.seconds:4.0f} s  "
        f"ETA {left / 60:.0f} min  {why[:200]}"
      )
  say(f"\n{table(outcomes)}\n\n{(time.monotonic() - began) / 60:.1f} minutes")
  if options.json:
    found = [{**dataclasses.asdict(o), "room": o.mutation.room} for o in outcomes]
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
  bad = [outcome for outcome in outcomes if not outcome.is_well]
  for outcome in bad:
    say(f"{outcome.verdict}: {outcome.mutation.name}: {outcome.why}")
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
