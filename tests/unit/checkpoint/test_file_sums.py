"""A checkpoint's description is compared with its own checksum, and so are the scores beside it."""

import json

import pytest

from igpt_jax.checkpoint import file_sums
from igpt_jax.errors import UserError

RUN = {"model": {"n_layer": 2}, "elapsed_seconds": 1.5}
SUMS = {"params": "0123456789abcdef"}


def test_a_description_comes_back_as_it_was():
  run, sums = file_sums.without_sums("run/checkpoints/3", file_sums.with_sums(RUN, SUMS))
  assert run.items() >= RUN.items() and sums == SUMS


@pytest.mark.parametrize("changed", ["model", "seconds", "sums"])
def test_a_description_that_was_changed_is_noticed(changed):
  stored = json.loads(json.dumps(file_sums.with_sums(RUN, SUMS)))
  if changed == "model":
    stored["model"]["n_layer"] = 3
  elif changed == "seconds":
    stored["elapsed_seconds"] = 1.25
  else:
    stored["checksums"]["params"] = "f" * 16
  with pytest.raises(UserError, match="is damaged: its run isn't what was saved"):
    file_sums.without_sums("run/checkpoints/3", stored)
