"""Features of a workdir in a bucket: whole there or not at all, and the same on every machine."""

import concurrent.futures
import json
import os
import threading

import numpy as np
import pytest

from igpt_jax import files, scratch
from igpt_jax.errors import BucketError, UserError
from igpt_jax.probing import bucket_stores
from igpt_jax.probing.features import FeatureRows
from igpt_jax.probing.store import FeatureStore

ROWS, WIDTH, SIDE = 20, 6, 4
STORE = "gs://bucket/run/features/12-abcd/train-0123"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
  """Returns a function that goes on as on another machine."""

  def another(name="first"):
    monkeypatch.setattr(files, "_scratch", str(tmp_path / name))
    return os.path.join(bucket_stores.local(os.path.dirname(STORE)), os.path.basename(STORE))

  another()
  return another


def store(folder, rows=ROWS, checkpoint="abc"):
  identity = {"checkpoint": checkpoint, "data": "digits train"}
  return FeatureStore(folder, identity, rows=rows, width=WIDTH, side=SIDE, kept_in=STORE)


def fill(folder, layers, rows=ROWS, checkpoint="abc"):
  index = np.arange(rows, dtype=np.int32)
  features = np.stack([index[:, None] + 100.0 * layer + np.zeros(WIDTH) for layer in layers])
  images = np.zeros((rows, SIDE, SIDE, 3), np.uint8) + index[:, None, None, None].astype(np.uint8)
  found = store(folder, rows, checkpoint)
  found.begin(layers).add(FeatureRows(index, features.astype(np.float32), images, index % 5), rows)
  return found


def assert_whole(folder, layers, rows=ROWS):
  found = store(folder, rows)
  assert found.missing(layers) == ()
  for layer in layers:
    np.testing.assert_array_equal(found.layer(layer)[:, 0], np.arange(rows) + 100 * layer)
  np.testing.assert_array_equal(found.labels(), np.arange(rows) % 5)
  assert (found.images()[3] == 3).all()


def test_another_machine_finds_them(buckets, machine):
  here = machine()
  assert not bucket_stores.fetch(STORE, here)
  fill(here, (0, 1))
  bucket_stores.publish(here, STORE)
  assert bucket_stores.fetch(STORE, here)  # nothing is copied
  assert buckets.count("read", "*.npy") == 0
  there = machine("second")
  assert bucket_stores.fetch(STORE, there)
  assert_whole(there, (0, 1))
  buckets.requests.clear()
  bucket_stores.publish(there, STORE)
  assert buckets.count("write") == 0


def test_what_is_added_elsewhere_is_found_here(buckets, machine):
  """Layers and rows; and only files that differ are written again."""
  fill(here := machine(), (0,))
  bucket_stores.publish(here, STORE)
  bucket_stores.fetch(STORE, there := machine("second"))
  fill(there, (0, 1))
  assert not bucket_stores.fetch(STORE, there)  # more here than there
  assert_whole(there, (0, 1))
  buckets.requests.clear()
  bucket_stores.publish(there, STORE)
  written = {name.rpartition("/")[2] for kind, name in buckets.requests if kind == "write"}
  assert written == {"layer-01.npy", "progress.json", "whole.json"}
  here = machine()
  assert bucket_stores.fetch(STORE, here)
  assert_whole(here, (0, 1))


def test_of_two_jobs_on_a_machine_one_copies(buckets, machine, monkeypatch):
  """The second one begins while the first copies, into the same folder; both find all of it."""
  fill(here := machine(), (0, 1))
  bucket_stores.publish(here, STORE)
  there, first, download = machine("second"), threading.Lock(), files.buckets.download
  buckets.requests.clear()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    others = []

    def meanwhile(*args):
      if first.acquire(blocking=False):
        others.append(pool.submit(bucket_stores.fetch, STORE, there))
        concurrent.futures.wait(others, 0.5)
      download(*args)

    monkeypatch.setattr(files.buckets, "download", meanwhile)
    assert bucket_stores.fetch(STORE, there)
    assert others[0].result()
  assert_whole(there, (0, 1))
  assert buckets.count("read", "*.npy") == 4  # layers, images, labels: once


@pytest.mark.parametrize("at", range(6))
def test_a_copy_that_is_cut_short_is_none(buckets, machine, monkeypatch, at):
  """Neither into the bucket, at any file, nor out of it; the next one is whole."""
  fill(here := machine(), (0,))
  bucket_stores.publish(here, STORE)
  fill(here, (0, 2))
  left, upload = at, files.buckets.upload

  def killed(source, path):
    nonlocal left
    if not left:
      raise KeyboardInterrupt
    left -= 1
    upload(source, path)

  buckets.put("bucket", "run/features/12-abcd/train-0123/layer-00.npy", b"another run's")
  monkeypatch.setattr(files.buckets, "upload", killed)
  ends = False
  try:
    bucket_stores.publish(here, STORE)
    ends = True
  except KeyboardInterrupt:
    pass
  monkeypatch.setattr(files.buckets, "upload", upload)
  assert bucket_stores.fetch(STORE, machine("second")) == ends
  bucket_stores.publish(here, STORE)

  left, download = at, files.buckets.download

  def cut(*args):
    nonlocal left
    if not left:
      raise KeyboardInterrupt
    left -= 1
    download(*args)

  there = machine("third")
  monkeypatch.setattr(files.buckets, "download", cut)
  try:
    bucket_stores.fetch(STORE, there)
  except KeyboardInterrupt:
    assert not os.path.exists(os.path.join(there, "identity.json"))
  monkeypatch.setattr(files.buckets, "download", download)
  assert bucket_stores.fetch(STORE, there)
  assert_whole(there, (0, 2))


@pytest.mark.parametrize("kind", ["503", "cut", "lost"])
@pytest.mark.parametrize("operation", ["write", "read", "list"])
def test_one_failure_loses_nothing(buckets, machine, operation, kind):
  fill(here := machine(), (0, 1))
  buckets.fail(operation, "bucket/run/*" if operation != "list" else "*", kind)
  bucket_stores.publish(here, STORE)
  there = machine("second")
  assert bucket_stores.fetch(STORE, there)
  assert_whole(there, (0, 1))
  assert buckets.unspent() == 0


@pytest.mark.parametrize("kind", ["503", "cut", "lost"])
@pytest.mark.parametrize("operation", ["start", "write"])
def test_one_failure_of_a_large_upload_loses_nothing(buckets, tmp_path, operation, kind):
  """Files beyond 5 MiB are uploaded in chunks."""
  content = np.random.default_rng(0).integers(0, 256, 6 * 2**20, np.uint8).tobytes()
  (tmp_path / "layer-00.npy").write_bytes(content)
  buckets.fail(operation, "bucket/run/*", kind)
  files.buckets.upload(str(tmp_path / "layer-00.npy"), "gs://bucket/run/layer-00.npy")
  assert buckets.content("bucket", "run/layer-00.npy") == content
  assert buckets.unspent() == 0 and buckets.count("start") >= 1


def test_a_bucket_that_is_changed_by_hand_is_not_believed(buckets, machine):
  fill(here := machine(), (0,))
  bucket_stores.publish(here, STORE)
  name = "run/features/12-abcd/train-0123/labels.npy"
  labels = buckets.content("bucket", name)
  buckets.put("bucket", name, labels[:-1] + b"\x07")
  assert not bucket_stores.fetch(STORE, machine("second"))
  buckets.put("bucket", name, labels)
  buckets.put("bucket", "run/features/12-abcd/train-0123/whole.json", b"{")
  assert not bucket_stores.fetch(STORE, machine("second"))


def test_features_of_something_else_are_refused_by_their_address(buckets, machine):
  """Finds another checkpoint, as in a folder of the user's own, and doesn't overwrite it."""
  fill(here := machine(), (0,), checkpoint="another")
  bucket_stores.publish(here, STORE)
  there = machine("second")
  bucket_stores.fetch(STORE, there)
  with pytest.raises(UserError, match=f"{STORE} holds features of something else"):
    store(there)
  assert (
    json.loads(buckets.content("bucket", f"{STORE[12:]}/identity.json"))["checkpoint"] == "another"
  )


def test_who_may_not_write_is_told(buckets, machine):
  fill(here := machine(), (0,))
  buckets.refusing["bucket"] = {"write", "start"}
  with pytest.raises(BucketError, match="no right to do this"):
    bucket_stores.publish(here, STORE)
  buckets.refusing.clear()
  assert not bucket_stores.fetch(STORE, here)
  assert_whole(here, (0,))


def test_removal_leaves_neither_features_nor_copies(buckets, machine):
  fill(here := machine(), (0,))
  folder = os.path.dirname(STORE)
  assert bucket_stores.exists(folder)
  bucket_stores.publish(here, STORE)
  assert bucket_stores.exists(folder)
  bucket_stores.forget(folder)
  assert not bucket_stores.exists(folder) and not buckets.names("bucket")
  assert not os.path.exists(scratch.path_for(folder))
