"""One mutation: a small mistake of meaning, and the tests that must see it."""

import dataclasses
import pathlib
import re

PACKAGE, TESTS = "igpt_jax", "tests"


@dataclasses.dataclass(frozen=True)
class Mutation:
  """A mistake that is put into one file.

  Attributes:
    name: its name on the command line.
    file: the file that it changes, below igpt_jax/.
    before: text of the file, which stands there exactly once.
    after: the mistaken text in its place.
    test: node ids of the tests that must fail, below tests/, divided by spaces.
    reason: why no test can see it; "": one must.
  """

  name: str
  file: str
  before: str
  after: str
  test: str
  reason: str = ""

  @property
  def room(self) -> str:
    """Room of the changed file, "ground" for files of the ground floor."""
    return self.file.partition("/")[0] if "/" in self.file else "ground"

  @property
  def tests(self) -> list[str]:
    """Node ids as pytest takes them in the project's folder."""
    return [f"{TESTS}/{node}" for node in self.test.split()]

  @property
  def by_unit_tests(self) -> bool:
    return all(node.startswith(f"{TESTS}/unit/") for node in self.tests)

  def mutated(self, root: pathlib.Path) -> str:
    """Returns the mistaken file's text.

    Raises:
      ValueError: `before` doesn't stand in the file exactly once.
    """
    text = (root / PACKAGE / self.file).read_text(encoding="utf-8")
    found = text.count(self.before)
    if found != 1:
      raise ValueError(
        f"{self.name}: {self.before!r} stands {found} times in {PACKAGE}/{self.file}; expected 1"
      )
    return text.replace(self.before, self.after)

  def missing_tests(self, root: pathlib.Path) -> list[str]:
    """Returns the node ids whose file or function isn't there."""
    return [node for node in self.tests if not _is_there(root, node)]


def _is_there(root: pathlib.Path, node: str) -> bool:
  path, _, function = node.partition("::")
  if not (root / path).is_file():
    return False
  name = re.escape(function.partition("[")[0])
  text = (root / path).read_text(encoding="utf-8")
  return bool(function) and re.search(rf"^def {name}\(", text, re.MULTILINE) is not None
