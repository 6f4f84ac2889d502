"""Which parts of a first contact are done, in which order, and what is kept of them."""

import json

import pytest

from igpt_jax.errors import UserError
from igpt_jax.timing import contact_parts
from igpt_jax.timing.contact_parts import FAILED, LEFT_OUT, MEASURED, TOO_LARGE, Part, Record

MACHINE = {"device": "TPU v5 lite", "devices": 8, "hosts": 1, "processor": "a CPU", "cores": 24}
ABOUT = {"machine": MACHINE, "versions": {"jax": "0.10.2"}, "environment": {}}
S, M = Part("training", "s"), Part("training", "m")
TIMES = {"seconds": 0.25, "fastest": 0.2, "slowest": 0.5, "repeats": 5, "calls": 1}
SAMPLED = {
  "samples": 8,
  "mesh": {"data": 1},
  "all_samples": TIMES,
  "samples_per_second": 32.0,
  "tokens_per_second": 9.0,
}
DRAWN = Part("sampling", "s")


def record_of(folder, about=ABOUT, **keys):
  """A record of parts, by the names of their configs."""
  given = {S: "of s", M: "of m", DRAWN: "drawn"}
  return Record(str(folder), about, given | {Part("training", k): v for k, v in keys.items()})


def test_the_most_informative_part_comes_first():
  parts = contact_parts.ordered(["s", "m", "l"], ["input", "forecast", "sampling", "training"])
  assert [part.name for part in parts] == [
    *("s: training", "m: training", "l: training"),
    *("s: sampling", "m: sampling", "l: sampling"),
    "s: input",
    *("s: forecast", "m: forecast", "l: forecast"),
  ]
  assert [part.kind for part in contact_parts.ordered(["s", "m"], ["input"])] == ["input"]


def test_a_part_begins_only_if_one_of_its_kind_would_have_ended():
  assert contact_parts.is_allowed(S, 0.1, {})
  assert not contact_parts.is_allowed(S, 0.0, {})
  took = {S: 40.0, DRAWN: 500.0}
  assert contact_parts.is_allowed(M, 41.0, took) and not contact_parts.is_allowed(M, 39.0, took)
  assert contact_parts.is_allowed(Part("input", "s"), 1.0, took)


def test_what_was_measured_is_kept_and_what_was_left_out_is_missing(tmp_path):
  first = record_of(tmp_path)
  for part in (S, M, DRAWN):
    first.begin(part)
  first.finish(DRAWN, MEASURED, values=SAMPLED, took=3.21)
  first.finish(S, FAILED, reason="no such kernel")
  first.finish(M, LEFT_OUT, reason="no time")
  again = record_of(tmp_path)
  assert again.settled(DRAWN) and not again.settled(S) and not again.settled(M)  # failures anew
  assert again.values(DRAWN) == SAMPLED and again.values(S) is again.values(M) is None
  assert (again.stale, again.aside) == ([], "")
  report = json.loads((tmp_path / contact_parts.FILE).read_text())
  assert list(report["parts"]) == ["s: training", "m: training", "s: sampling"]  # not as they ended
  assert report["parts"]["s: sampling"]["seconds"] == 3.2
  table = (tmp_path / contact_parts.TABLE).read_text()
  for row in (
    "| s: training |  |  |  | failed: no such kernel |",
    "| m: training |  |  |  | left out: no time |",
    "| s: sampling 8 images | 250 ms | 200 ms to 500 ms | 5 | 32 images/s, 9 tokens/s |",
  ):
    assert row.replace("32 images/s", "32.000 images/s") in table


def test_what_was_measured_with_other_settings_is_stale(tmp_path):
  record_of(tmp_path).finish(S, TOO_LARGE, reason="40 GiB")
  record_of(tmp_path).finish(M, TOO_LARGE, reason="50 GiB")
  changed = record_of(tmp_path, s="of another s")
  assert changed.stale == ["s: training"] and not changed.settled(S) and changed.settled(M)
  assert "s: training" not in changed.as_json()["parts"]


@pytest.mark.parametrize("part", ["machine", "versions", "environment"])
def test_a_report_of_another_machine_or_version_is_set_aside(tmp_path, part):
  first = record_of(tmp_path)
  first.finish(DRAWN, MEASURED, values=SAMPLED)
  before = (tmp_path / contact_parts.FILE).read_text(), (tmp_path / contact_parts.TABLE).read_text()
  about = ABOUT | {part: ABOUT[part] | {"device": "another"}}
  other = record_of(tmp_path, about)
  assert not other.settled(DRAWN) and other.stale == []
  assert (tmp_path / other.aside).read_text() == before[0]
  assert (tmp_path / other.aside).with_suffix(".md").read_text() == before[1]
  other.write()
  assert json.loads((tmp_path / contact_parts.FILE).read_text())["parts"] == {}


def test_what_was_measured_of_other_configs_stays_in_the_report(tmp_path):
  described = {
    "parameters": 7, "n_layer": 1, "n_embd": 2, "n_positions": 3, "dtype": "bfloat16",
    "remat": "none", "mesh": {"data": 1}, "batch_size": 4, "model_flops_per_step": 1e9,
  }  # fmt: skip
  first = Record(str(tmp_path), ABOUT, {DRAWN: "drawn"}, {"configs": {"s": described}})
  first.finish(DRAWN, MEASURED, values=SAMPLED)
  second = Record(str(tmp_path), ABOUT, {M: "of m"}, {"configs": {"m": described}})
  second.finish(M, FAILED, reason="no such kernel")
  report = json.loads((tmp_path / contact_parts.FILE).read_text())
  assert list(report["parts"]) == ["m: training", "s: sampling"]
  assert report["configs"].keys() == {"s", "m"}
  text = (tmp_path / contact_parts.TABLE).read_text()
  assert "- s: 7 parameters, 1 layers of 2, 3 positions, bfloat16" in text


def test_a_part_that_ends_the_process_is_tried_twice(tmp_path):
  for start in range(2):
    record = record_of(tmp_path)
    assert not record.has_ended_starts(M), start
    record.begin(M)
  record = record_of(tmp_path)
  assert record.has_ended_starts(M) and not record.has_ended_starts(S)
  record.finish(M, FAILED, reason="it ended the process")
  assert not record_of(tmp_path).settled(M)  # a start of one's own tries it again


def test_the_start_after_one_that_a_part_ended_repeats_no_failure(tmp_path):
  first = record_of(tmp_path)
  first.finish(S, FAILED, reason="no such kernel")
  first.begin(M)
  assert record_of(tmp_path).settled(S)


def test_a_start_that_was_told_to_stop_does_not_count(tmp_path):
  for _ in range(3):
    record = record_of(tmp_path)
    record.begin(M)
    record.stopped()
  assert not record_of(tmp_path).has_ended_starts(M)


def test_a_part_with_other_settings_has_not_ended_the_process(tmp_path):
  for _ in range(2):
    record_of(tmp_path).begin(M)
  assert not record_of(tmp_path, m="of another m").has_ended_starts(M)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"about": {}, "parts": {"s": 1}, "begun": {}}'])
def test_a_damaged_report_is_refused(tmp_path, text):
  (tmp_path / contact_parts.FILE).write_text(text)
  with pytest.raises(UserError, match=r"first_contact\.json is damaged .*fix: remove it"):
    record_of(tmp_path)
