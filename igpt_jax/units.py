"""Numbers with their units, and lists, as messages say them: no amount reads as 0. Ground floor."""

from collections.abc import Sequence

_BYTES = ("bytes", "kB", "MB", "GB", "TB")


def counted(n: int, noun: str) -> str:
  """Formats 1 as "1 image" and 2000 as "2,000 images"."""
  return f"{n:,} {noun}" + ("" if n == 1 else "s")


def some_of(names: Sequence[str]) -> str:
  """Returns the first three names as text, with "…" for the others."""
  return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def significant(value: float) -> str:
  """Formats a rate: whole from 100 on, else with three digits."""
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
  """Formats 0.24 as "0.24 s" and 75.3 as "75 s"."""
  return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def data_size(n_bytes: float) -> str:
  """Formats the size of a file in powers of 1,000, such as "6.34 kB"."""
  power = 0
  while n_bytes >= 999.5 and power < len(_BYTES) - 1:
    n_bytes, power = n_bytes / 1_000, power + 1
  return f"{significant(n_bytes)} {_BYTES[power]}"


def memory(n_bytes: float) -> str:
  """Formats an amount of memory in powers of 1,024, such as "15.75 GiB"."""
  return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.3g} MiB"
