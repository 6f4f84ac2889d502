"""Runs in a bucket, killed and failed at: each ends with the numbers of one on a disk, bit for bit.

Each life is a process of the command. Where nothing else is said, a failure comes once: the request of that
kind, for an object of that kind, which comes next.
"""

import re
import time

import pytest

from igpt_jax import files
from support.faults import args_of, lives, result
from support.kills import Killed, Life

STEPS = 8
SHORT = {
  "train.steps": STEPS,
  "train.keep_period": 4,
  "train.eval_every": 4,
  "train.progress_images": 2,
}

# Objects of a run, and what is asked of each: (operation, objects, kind of failure).
_FEW = [
  ("write", "*/.lock", "lost"),
  ("write", "*/params/*", "503"),
  ("write", "*/checkpoints/4/commit_success.txt", "cut"),
  ("read", "*/config.json", "timeout"),
]
_MANY = [
  # A list is of a bucket: what is asked of it isn't an object.
  (operation, "bucket/*" if operation == "list" else f"bucket/run/{objects}", kind)
  for operation, objects in (
    ("write", ".lock"),
    ("write", "config.json"),
    ("write", "palette.npy"),
    ("write", "metrics.jsonl*"),
    ("write", "goodput.json"),
    ("write", "progress/*"),
    ("write", "training.json"),
    ("write", "checkpoints/*/params/d/*"),
    ("write", "checkpoints/*/training/manifest.ocdbt"),
    ("write", "checkpoints/*/_CHECKPOINT_METADATA"),
    ("write", "checkpoints/*/commit_success.txt"),
    ("list", "*"),
    ("get", "*"),
    ("read", "checkpoints/*"),
    ("delete", "checkpoints/2/*"),
    ("delete", ".lock"),
  )
  for kind in ("503", "timeout", "cut", "lost")
  if not (kind == "timeout" and operation in ("get", "delete"))
]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
  """Lives, and a run of them on a disk: its result, and the seconds that it took."""
  folder = tmp_path_factory.mktemp("lives")
  with lives(folder, JAX_NUM_CPU_DEVICES="1") as started:
    whole = folder / "whole"
    for _ in range(2):  # the first one compiles
      began = time.monotonic()
      out = folder / f"{began}.log"
      files.remove_folder(str(whole))
      assert Life(started, [started.begin(args_of(whole, **SHORT), out)], out).ended()
    yield started, result(whole), time.monotonic() - began


def environment(buckets):
  return {"STORAGE_EMULATOR_HOST": buckets.url, "TENSORSTORE_GCS_HTTP_URL": buckets.url}


def begin_in(buckets, started, **extra):
  def begin(workdir, out):
    pid = started.begin(args_of(workdir, **SHORT), out, **environment(buckets), **extra)
    return Life(started, [pid], out)

  return begin


@pytest.mark.parametrize(
  ("owner", "kills"),
  [
    ("run", 3),
    pytest.param("run", 30, marks=pytest.mark.slow),
    pytest.param("", 3, marks=pytest.mark.slow),
  ],
)
def test_killed_at_random_instants(buckets, started, tmp_path, owner, kills):
  """The next start takes the lock over, by its owner or because its process is gone, and goes on."""
  lives, expected, seconds = started
  begin = begin_in(buckets, lives, IGPT_OWNER=owner)
  killed = Killed(tmp_path, expected, 2 * seconds + 4, begin, "gs://bucket")
  killed.run(kills)
  assert [each["step"] for each in expected[0] if "loss" in each] == list(range(1, STEPS + 1))
  assert not any(name.endswith(".lock") for name in buckets.names("bucket"))


@pytest.mark.parametrize(
  ("operation", "objects", "kind"),
  [*_FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in _MANY)],
)
def test_one_failure_loses_nothing(buckets, started, tmp_path, operation, objects, kind):
  lives, expected, _ = started
  out, workdir = tmp_path / "out", "gs://bucket/run"
  buckets.hold_s = 2.0
  begin = begin_in(buckets, lives)
  if operation == "read":  # what a resumed run reads
    assert begin(workdir, out).ended()
    files.remove_folder(f"{workdir}/checkpoints/8", "commit_success.txt")
  buckets.fail(operation, objects, kind)
  assert begin(workdir, out).ended()
  said = out.read_text()
  assert not buckets.unspent(), said
  assert "set aside" not in said and "Traceback" not in said, said
  assert result(workdir) == expected, said
  files.read_json(f"{workdir}/training.json")


@pytest.mark.parametrize(
  "objects",
  [
    "_CHECKPOINT_METADATA",
    "params/d/*",
    pytest.param("commit_success.txt", marks=pytest.mark.slow),
  ],
)
def test_a_save_that_fails_for_good_is_made_again(buckets, started, tmp_path, objects):
  """What isn't worth another try of the request fails the save, which is told and made again."""
  lives, expected, _ = started
  out, workdir = tmp_path / "out", "gs://bucket/run"
  buckets.fail("write", f"*/checkpoints/4/{objects}", "400")
  assert begin_in(buckets, lives)(workdir, out).ended()
  said = out.read_text()
  assert re.search(r"NOT SAVED at step \d: .*400.*trying again", said), said
  assert "is saved, at try 2" in said and "Traceback" not in said, said
  records, sums = result(workdir)
  assert records == expected[0] and sums[STEPS] == expected[1][STEPS], said
