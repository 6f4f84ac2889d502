"""The list of mutations stays one that can be tried: each text is there once, and each test exists."""

import ast
import importlib.util
import subprocess

import pytest

from support.mutations import ALL
from support.mutations.mutation import PACKAGE, Mutation
from support.paths import ROOT, TESTS

ROOMS = {"model", "training", "data", "sampling", "probing", "checkpoint", "runner", "pretrained"}


def test_each_can_be_put_in_and_names_tests():
  for mutation in ALL:
    ast.parse(mutation.mutated(ROOT))
    assert mutation.before != mutation.after, mutation.name
    assert mutation.tests and not mutation.missing_tests(ROOT), mutation.name


def test_there_are_many_in_every_room_and_unit_tests_see_most():
  assert len({mutation.name for mutation in ALL}) == len(ALL) >= 60
  assert {mutation.room for mutation in ALL} >= ROOMS
  assert sum(mutation.by_unit_tests for mutation in ALL) > 0.8 * len(ALL)


@pytest.fixture(scope="module")
def program():
  """tests/mutations.py, which isn't in a package."""
  spec = importlib.util.spec_from_file_location("mutations_program", TESTS / "mutations.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  ("status", "output", "verdict"),
  [
    (1, "F\nFAILED tests/a.py::test_b - assert 1 == 2\n1 failed in 2.0s", "killed"),
    (None, "", "killed"),
    (0, ".s\n1 passed, 1 skipped in 2.0s", "SURVIVED"),
    (0, "s\n1 skipped in 2.0s", "error"),  # nothing was tried
    (2, "ERROR tests/a.py\n1 error in 2.0s", "error"),  # a mutation that can't be imported
    (4, "ERROR: not found: tests/a.py::test_c", "error"),
  ],
)
def test_verdicts(program, status, output, verdict):
  found, why = program.judged(status, output)
  assert found == verdict
  assert status != 1 or why.startswith("FAILED tests/a.py")


def test_a_mutation_lives_in_the_copy_alone(program, tmp_path):
  """Killed, survived, and not to be found: each tried in a project of one file."""
  root, copy = tmp_path / "project", tmp_path / "copy"
  (root / PACKAGE).mkdir(parents=True)
  (root / "tests" / "unit").mkdir(parents=True)
  (root / PACKAGE / "__init__.py").write_text("")
  source = root / PACKAGE / "sum.py"
  source.write_text("def add(a, b):\n  return a + b\n")
  (root / "tests" / "unit" / "test_sum.py").write_text(
    f"from {PACKAGE}.sum import add\n\ndef test_add():\n  assert add(2, 2) == 4\n"
  )
  (root / ".gitignore").write_text("kept.txt\n")
  (root / "kept.txt").write_text("not copied")
  subprocess.run(["git", "init", "-q", str(root)], check=True)
  program.copy_of(root, copy)
  assert not (copy / "kept.txt").exists()
  verdicts = {}
  for name, before, after in (
    ("minus", "a + b", "a - b"), ("times", "a + b", "a * b"), ("absent", "a ** b", "a"),
  ):  # fmt: skip
    mutation = Mutation(name, "sum.py", before, after, "unit/test_sum.py::test_add")
    outcome = program.tried(copy, mutation, 60.0)
    verdicts[name] = outcome.verdict
    assert (copy / PACKAGE / "sum.py").read_text() == source.read_text()
  assert verdicts == {"minus": "killed", "times": "SURVIVED", "absent": "error"}
