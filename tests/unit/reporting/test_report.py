"""The summary: every job's numbers, and only those of jobs that have run."""

import json
import os

import pytest

from igpt_jax.reporting import summary


def test_summary_gathers_what_there_is(tmp_path):
  workdir = tmp_path / "digits"
  workdir.mkdir()
  summary.write_json(
    str(workdir / "training.json"),
    {"step": 1_000, "loss": 1.25, "mfu": None, "images_per_second": 0.25},
  )
  summary.write_json(
    str(workdir / "evaluation.json"),
    {
      "nats_per_token": 1.2,
      "bits_per_token": 1.7312,
      "images": 360,
      "below_position_unigram": 0.25,
      "uniform": None,
    },
  )
  text = summary.write_summary(str(workdir))
  assert text.splitlines() == [
    "# digits",
    "",
    "- **Pretraining**: 1,000 steps, last training loss 1.2500 nats/token, 0.25 images/s in the last interval",
    "- **Likelihood**: 360 images, model 1.2000 nats/token (1.7312 bits/token), 25.0% below the per-position unigram",
  ]
  assert (workdir / "summary.md").read_text() == text
  assert sorted(os.listdir(workdir)) == ["evaluation.json", "summary.md", "training.json"]


def test_writes_are_whole_or_not_at_all(tmp_path):
  path = tmp_path / "a.json"
  summary.write_json(str(path), {"a": 1})
  with pytest.raises(TypeError):
    summary.write_json(str(path), {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert os.listdir(tmp_path) == ["a.json"]


def write_results(workdir, **results):
  workdir.mkdir()
  for name, values in {"training": {"step": 20}, **results}.items():
    summary.write_json(str(workdir / f"{name}.json"), values)
  return summary.write_summary(str(workdir)).splitlines()[3:]


def test_results_of_several_checkpoints_say_whose_they_are(tmp_path):
  evaluation = {"step": 20, "parameters": "a" * 16, "uniform": 1.0}
  sample = {"step": 20, "parameters": "a" * 16, "pictures": "b.png"}
  assert write_results(tmp_path / "one", evaluation=evaluation, sample=sample) == [
    "- **Likelihood**: uniform 1.0000", "- **Samples**: b.png"
  ]  # fmt: skip
  for name, other, said in (
    ("step", {"step": 10, "parameters": "b" * 16}, "step 10, parameters bbbbbbbb"),
    ("begun anew", {"parameters": "c" * 16}, "step 20, parameters cccccccc"),
    ("older", {"parameters": None}, "an older version's"),
  ):
    assert write_results(tmp_path / name, evaluation=evaluation, sample=sample | other) == [
      "- **Likelihood** (step 20, parameters aaaaaaaa): uniform 1.0000",
      f"- **Samples** ({said}): b.png",
    ]
  # All of one checkpoint, but not of the newest.
  behind = evaluation | {"step": 10}
  assert write_results(tmp_path / "behind", evaluation=behind) == [
    "- **Likelihood** (step 10, parameters aaaaaaaa): uniform 1.0000"
  ]


@pytest.mark.parametrize("text", ['{"step": ', "[]", '{"uniform": "x"}'])
def test_a_damaged_result_is_said(tmp_path, text):
  (tmp_path / "evaluation.json").write_text(text)
  (line,) = summary.write_summary(str(tmp_path)).splitlines()[2:]
  assert line.startswith("- **Likelihood**: evaluation.json is damaged (")
  assert line.endswith("fix: run that job again")
