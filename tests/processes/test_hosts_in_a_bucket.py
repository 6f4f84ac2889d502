"""Two real processes with one workdir in a bucket, beside the same two with one on a disk."""

import pytest

from igpt_jax import checkpoint, files
from igpt_jax.reporting import metrics
from support.hosts import hosts

RUN = "gs://bucket/run"


def losses(workdir):
  records = metrics.read_jsonl(f"{workdir}/metrics.jsonl")
  names = ("loss", "validation_loss")
  return [(r["step"], name, r[name]) for r in records for name in names if name in r]


def train(folder, workdir, scratch, **overrides):
  per_host = {host: {"scratch": str(scratch / str(host))} for host in range(2)}
  with hosts(folder, workdir, overrides, per_host) as started:
    started.succeed()
    return started.said(0)


@pytest.mark.slow
def test_two_hosts_train_resume_and_probe_in_a_bucket_as_on_a_disk(buckets, tmp_path):
  """Each with a scratch folder of its own, as hosts have."""
  for workdir in (str(tmp_path / "run"), RUN):
    train(tmp_path / "first", workdir, tmp_path / "scratch", **{"train.steps": 6})
    said = train(tmp_path / "again", workdir, tmp_path / "scratch", **{"train.steps": 8})
    assert "step 8/8" in said and "step 4/8" not in said
    train(tmp_path / "probe", workdir, tmp_path / "scratch", job="probe")
  assert losses(RUN) == losses(tmp_path / "run") and len(losses(RUN)) > 8
  assert checkpoint.whole_steps(RUN) == checkpoint.whole_steps(str(tmp_path / "run"))
  there, here = (files.read_json(f"{workdir}/probe.json") for workdir in (RUN, tmp_path / "run"))
  assert there["rows"] == here["rows"] and there["parameters"] == here["parameters"]
  left = buckets.names("bucket", "run/")
  assert not any(name.endswith((".lock", ".partial")) or ".parts/" in name for name in left), left
