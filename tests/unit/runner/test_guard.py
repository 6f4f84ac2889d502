"""When a run reacts to bad numbers, and what it goes back to; numbers alone, nothing is trained."""

import json
import math
import os
import types

import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.config.run_fields import GuardConfig
from igpt_jax.runner import guard
from igpt_jax.training.bad_numbers import BadNumbers
from igpt_jax.workspace import rollbacks


def look(watching, step, loss=1.0, in_row=0, in_all=0):
  values = {"loss": loss, "grad_norm": 1.0, "skipped_updates": in_all, "skipped_in_row": in_row}
  newest = types.SimpleNamespace(step=step, params={"w": jnp.ones(2)})
  watching.look(step, values, lambda: newest, {"tokens": np.zeros(3)})


def test_so_many_in_a_row_are_too_many(tmp_path, capsys):
  watching = guard.Guard(GuardConfig(in_row=3), str(tmp_path))
  look(watching, 4)
  look(watching, 5, math.nan, in_row=1, in_all=1)
  look(watching, 6, math.nan, in_row=2, in_all=2)
  assert capsys.readouterr().out.count("were left out") == 2
  with pytest.raises(BadNumbers, match=r"step 7: .* 3 updates in a row were left out") as bad:
    look(watching, 7, math.nan, in_row=3, in_all=3)
  assert (bad.value.step, bad.value.since, bad.value.back) == (7, 4, True)
  diagnosis = json.loads((tmp_path / "incidents" / "7" / "diagnosis.json").read_text())
  assert diagnosis["well_until"] == 4 and diagnosis["losses_before"] == [1.0]


def test_steps_that_were_not_logged_count_as_well_until_the_first_bad_one(tmp_path):
  watching = guard.Guard(GuardConfig(in_row=2), str(tmp_path))
  look(watching, 10)
  with pytest.raises(BadNumbers) as bad:
    look(watching, 20, math.nan, in_row=4, in_all=4)
  assert bad.value.since == 16


def test_a_spike_is_above_the_median_of_the_newest(capsys):
  watching = guard.Guard(GuardConfig(spike=1.0, spike_then="warn"), None)
  for step, loss in enumerate((1.0, 1.2, 0.9, 9.0), 1):
    look(watching, step, loss)  # too few to tell
  look(watching, 5, 1.1)
  assert capsys.readouterr().out == ""
  look(watching, 6, 2.0)
  assert capsys.readouterr().out == ""
  for step in (7, 8, 9, 10, 11, 12):  # of one spike one line, and it moves no median
    look(watching, step, 3.0)
  out = capsys.readouterr().out
  assert out.count("the loss jumped to") == 1 and "from a median of 1.1500" in out
  look(watching, 13, 1.0)
  look(watching, 14, 3.0)
  assert "step 14: the loss jumped" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A run's folder with checkpoints by name alone."""
  for step in (4, 8, 12):
    os.makedirs(checkpoint.path_of(str(tmp_path), step))
  monkeypatch.setattr(
    checkpoint,
    "whole_steps",
    lambda folder: sorted(int(n) for n in os.listdir(tmp_path / "checkpoints") if n.isdigit()),
  )
  return tmp_path


def test_going_back_moves_what_came_since_away(folder):
  config = GuardConfig(rollbacks=3)
  assert rollbacks.order_seeds(str(folder), 7) == [7]
  guard.go_back(BadNumbers("bad", 13, 9, True), config, str(folder))
  assert sorted(os.listdir(folder / "checkpoints")) == ["12.rolled_back", "4", "8"]
  assert rollbacks.rollback_steps(str(folder)) == [8]
  guard.go_back(BadNumbers("bad", 9, 8, True), config, str(folder))  # one of that very step is good
  assert rollbacks.rollback_steps(str(folder)) == [8, 8]
  seeds = rollbacks.order_seeds(str(folder), 7)
  assert seeds[0] == 7 and len(set(seeds)) == 3  # each return has an order of its own


def test_going_back_ends(folder):
  config = GuardConfig(rollbacks=1)
  guard.go_back(BadNumbers("bad", 13, 12, True), config, str(folder))
  with pytest.raises(BadNumbers, match="it went back 1 times already") as bad:
    guard.go_back(BadNumbers("bad", 13, 12, True), config, str(folder))
  assert not bad.value.back
  with pytest.raises(BadNumbers, match="no checkpoint of step 3 or before"):
    guard.go_back(BadNumbers("bad", 5, 3, True), GuardConfig(rollbacks=9), str(folder))


@pytest.mark.parametrize(
  ("job", "named"),
  [
    ("pretrain", "a lower train.learning_rate"),
    ("finetune", "a lower finetune.learning_rate"),
    ("probe", "lower probe.learning_rates"),
  ],
)
def test_the_fix_names_the_jobs_own_rate(job, named):
  watching = guard.Guard(GuardConfig(in_row=1), None, job)
  with pytest.raises(BadNumbers, match=f"fix: {named}"):
    look(watching, 1, math.nan, in_row=1, in_all=1)
