"""Tables in markdown, and as comma-separated values."""

import csv
import io
from collections.abc import Iterable, Sequence


def markdown_table(sides: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """A table; `sides` has an "l" or "r" for each column, the side that its cells are aligned to."""
  first, *others = ("| " + " | ".join(map(str, row)) + " |\n" for row in (head, *rows))
  rule = "|" + "".join("--:|" if side == "r" else "---|" for side in sides) + "\n"
  return "".join([first, rule, *others])


def csv_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """A table as comma-separated values, a line per row."""
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows([head, *rows])
  return text.getvalue()
