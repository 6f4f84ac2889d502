"""Amounts with their units: none reads as 0, and one is singular."""

import pytest

from igpt_jax import units


@pytest.mark.parametrize(
  "text, expected",
  [
    (units.counted(0, "image"), "0 images"),
    (units.counted(1, "image"), "1 image"),
    (units.counted(2_000, "image"), "2,000 images"),
    (units.significant(0.0123), "0.0123"),
    (units.significant(99.4), "99.4"),
    (units.significant(12_345.6), "12,346"),
    (units.seconds(0.0), "0 s"),
    (units.seconds(0.241), "0.24 s"),
    (units.seconds(9.97), "10 s"),
    (units.seconds(1_234), "1,234 s"),
    (units.data_size(0), "0 bytes"),
    (units.data_size(999), "999 bytes"),
    (units.data_size(6_340), "6.34 kB"),
    (units.data_size(999_600), "1 MB"),
    (units.data_size(27_345_678_901), "27.3 GB"),
    (units.data_size(5e18), "5,000,000 TB"),
    (units.memory(5_000), "0.00477 MiB"),
    (units.memory(3 * 2**20), "3 MiB"),
    (units.memory(15.75 * 2**30), "15.75 GiB"),
  ],
)
def test_amounts(text, expected):
  assert text == expected
