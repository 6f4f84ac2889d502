"""The summary: every job's numbers, and only those of jobs that have run."""

import json
import os

import pytest

from igpt_jax import report


def test_summary_gathers_what_there_is(tmp_path):
  workdir = tmp_path / "digits"
  workdir.mkdir()
  report.write_json(str(workdir / "training.json"), {"step": 1_000, "loss": 1.25, "mfu": None})
  report.write_json(
    str(workdir / "evaluation.json"),
    {"nats_per_token": 1.2, "images": 360, "below_position_unigram": 0.25, "uniform": None},
  )
  text = report.write_summary(str(workdir))
  assert text.splitlines() == [
    "# digits",
    "",
    "- **Pretraining**: 1,000 steps, last training loss 1.2500 nats/token",
    "- **Likelihood**: 360 pictures, model 1.2000 nats/token, 25.0% below the per-position unigram",
  ]
  assert (workdir / "summary.md").read_text() == text
  assert sorted(os.listdir(workdir)) == ["evaluation.json", "summary.md", "training.json"]


def test_writes_are_whole_or_not_at_all(tmp_path):
  path = tmp_path / "a.json"
  report.write_json(str(path), {"a": 1})
  with pytest.raises(TypeError):
    report.write_json(str(path), {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert os.listdir(tmp_path) == ["a.json"]
