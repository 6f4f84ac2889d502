"""Jobs on a run in a bucket, as on a disk: the probe, its second run, and watching."""

import json
import pathlib

import numpy as np
import pytest

from igpt_jax import checkpoint, files
from igpt_jax.errors import UserError
from igpt_jax.jobs import evaluate, probe
from igpt_jax.probing import sets
from support.quickstart import shrunk

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile", "one_device")]

RUN = "gs://bucket/run"


@pytest.fixture
def in_bucket(buckets, tiny_run, tmp_path, monkeypatch):
  """The run of `tiny_run` in the bucket; returns the server."""
  monkeypatch.setattr(files, "_scratch", str(tmp_path / "scratch"))
  put(buckets, tiny_run)
  return buckets


def put(buckets, run, without=""):
  for path in sorted(run.rglob("*")):
    name = path.relative_to(run)
    if path.is_file() and (not without or not name.match(without)):
      buckets.put("bucket", f"run/{name}", path.read_bytes())


def results(buckets, name):
  return json.loads(buckets.content("bucket", f"run/{name}"))


def test_the_probe_of_a_run_in_a_bucket(in_bucket, tiny_run, tmp_path, monkeypatch, capsys):
  """The numbers of a disk; another machine computes no feature again; another checkpoint has its own."""
  few = {"job": "probe", "features__baselines": (), "features__layers": (1,)}
  settings = shrunk(**few)
  probe.run(settings, RUN)
  ours = results(in_bucket, "probe.json")
  local = tmp_path / "local"
  local.mkdir()
  probe.run(shrunk(**few, checkpoint=str(tiny_run)), str(local))
  theirs = json.loads((local / "probe.json").read_text())
  assert ours["rows"] == theirs["rows"] and ours["parameters"] == theirs["parameters"]
  stores = {name.split("/")[3] for name in in_bucket.names("bucket", "run/features/")}
  assert {name.split("-")[0] for name in stores} == {"train", "validation", "test"}

  monkeypatch.setattr(files, "_scratch", str(tmp_path / "another"))
  capsys.readouterr()
  probe.run(settings, RUN)
  said = capsys.readouterr().out
  assert said.count("features: copied from gs://bucket/run/features/12-") == 3
  assert said.count("found in") == 3 and "features: copied to" not in said
  assert results(in_bucket, "probe.json")["rows"] == ours["rows"]

  source = sets.open_source(settings, RUN)
  here = sets.compute(settings, RUN, source)["layer"]
  with pytest.MonkeyPatch.context() as patch:  # another host, whose scratch is its own
    patch.setattr(files, "_scratch", str(tmp_path / "host"))
    patch.setattr("igpt_jax.parallel.hosts.is_main", lambda: False)
    there = sets.compute(settings, RUN, source)["layer"]
    for name in sets.SPLITS:
      assert str(tmp_path / "host") in there[name].folder
      np.testing.assert_array_equal(here[name].layer(1), there[name].layer(1))

  probe.run(shrunk(**few, checkpoint=f"{RUN}/checkpoints/8"), RUN)
  assert results(in_bucket, "probe.json")["parameters"] != ours["parameters"]
  folders = {
    name.split("/")[2].split("-")[0] for name in in_bucket.names("bucket", "run/features/")
  }
  assert folders == {"8", "12"}


def test_a_folder_of_features_in_a_bucket_is_of_one_checkpoint(in_bucket):
  """Behaves as on a disk; once it has been removed, what this machine keeps of it is in nobody's way."""
  few = {"job": "probe", "features__baselines": (), "features__layers": (1,)}
  cached = shrunk(**few, features__cache="gs://bucket/cache")
  other = shrunk(**few, features__cache="gs://bucket/cache", checkpoint=f"{RUN}/checkpoints/8")
  sets.compute(cached, RUN, sets.open_source(cached, RUN))
  for _ in range(2):
    with pytest.raises(UserError, match=r"gs://bucket/cache/train-\w+ holds features of something"):
      sets.compute(other, RUN, sets.open_source(other, RUN))
  files.remove_folder("gs://bucket/cache")
  sets.compute(other, RUN, sets.open_source(other, RUN))
  assert in_bucket.names("bucket", "cache/train-")


def test_a_watched_run_in_a_bucket_is_evaluated_at_its_whole_checkpoints(in_bucket, tiny_run):
  """One that is being written has no last file: it isn't looked at until it has."""
  last = "run/checkpoints/12/commit_success.txt"
  written = in_bucket.buckets["bucket"].pop(last)
  assert checkpoint.whole_steps(RUN) == [4, 8]
  ended = in_bucket.buckets["bucket"].pop("run/training.json")
  settings = shrunk(
    job="evaluate",
    watch=True,
    watch_seconds=0.01,
    watch_patience=1.0,
    evaluate__images=32,
    evaluate__baseline_images=32,
  )
  evaluate.run(settings, RUN)
  steps = {name.split("/")[2] for name in in_bucket.names("bucket", "run/evaluate/")}
  assert steps == {"4", "8"}
  in_bucket.buckets["bucket"] |= {last: written, "run/training.json": ended}
  in_bucket.requests.clear()
  evaluate.run(settings, RUN)
  steps = {name.split("/")[2] for name in in_bucket.names("bucket", "run/evaluate/")}
  assert steps == {"4", "8", "12"}
  assert in_bucket.count("write", "bucket/run/evaluate/12/*")
  assert not in_bucket.count("write", "bucket/run/evaluate/4/*")
  made_from = results(in_bucket, "evaluate/12/made_from.json")
  info = checkpoint.describe(str(tiny_run / "checkpoints" / "12"))
  assert made_from["checkpoint"]["parameters"] == info.sums["params"]


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_passed_over(
  in_bucket, monkeypatch, capsys
):
  """The run keeps its newest: what is removed has lost its last file first."""
  one = evaluate.weights.load_model

  def deleted(settings, *args, **kwargs):
    if settings.checkpoint.endswith("/4"):
      checkpoint.remove(settings.checkpoint)
    return one(settings, *args, **kwargs)

  monkeypatch.setattr("igpt_jax.jobs.evaluate.weights.load_model", deleted)
  evaluate.run(
    shrunk(
      job="evaluate",
      watch=True,
      watch_seconds=0.01,
      evaluate__images=32,
      evaluate__baseline_images=32,
    ),
    RUN,
  )
  assert "checkpoint 4 was deleted while it was being read: passed over" in capsys.readouterr().out
  done = {name.split("/")[2] for name in in_bucket.names("bucket", "run/evaluate/")}
  assert {"8", "12"} <= done


def test_nothing_to_watch_in_a_bucket(buckets):
  with pytest.raises(UserError, match=r"config.watch: gs://bucket/none doesn't exist"):
    evaluate.run(shrunk(watch=True), "gs://bucket/none")
  assert not pathlib.Path("gs:").exists()
