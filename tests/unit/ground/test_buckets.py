"""Files in buckets, through the door that all of the program uses, against the tests' own server."""

import functools
import json
import os
import threading

import pytest

from igpt_jax import buckets as buckets_lib
from igpt_jax import files, scratch
from igpt_jax.errors import BucketError, UserError

RUN = "gs://bucket/run"


def put(path, contents):
  with files.replacing(path) as partial, open(partial, "wb") as file:
    file.write(contents)


def get(path):
  with files.opened(path) as file:
    return file.read()


@pytest.mark.parametrize(
  ("given", "address"),
  [
    ("gs://bucket", "gs://bucket"),
    ("gs://bucket//run/./a/", "gs://bucket/run/a"),
    ("gs://my-bucket.example/ü b", "gs://my-bucket.example/ü b"),
  ],
)
def test_an_address_is_normalised(given, address):
  pytest.importorskip("gcsfs")
  assert files.place("--workdir", given) == address


@pytest.mark.parametrize(
  ("given", "why"),
  [
    ("gs://", "no bucket in it; expected gs://BUCKET/PATH"),
    ("gs:///run", "no bucket in it"),
    ("gs://B/run", "'B' isn't a bucket's name"),
    ("gs:/bucket/run", "fix: two slashes after gs:"),
    ("s3://bucket/run", "expected a local path or gs://"),
    ("gs://bucket/a/../b", "without '..'"),
    ("gs://bucket/a\nb", "printable characters"),
  ],
)
def test_an_address_that_is_none_is_refused_in_a_line(given, why):
  with pytest.raises(UserError, match=why) as caught:
    files.place("--workdir", given)
  assert str(caught.value).startswith("--workdir: ") and "\n" not in str(caught.value)


def test_without_gcsfs_its_extra_is_named(monkeypatch):
  buckets_lib._prepare.cache_clear()
  monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
  with pytest.raises(UserError, match=r"buckets need gcsfs; fix: .*gcs"):
    files.place("--workdir", "gs://bucket/run")
  buckets_lib._prepare.cache_clear()


def test_files_and_folders(buckets):
  """What is asked of a bucket is answered as by a disk, over several pages of a listing."""
  assert not files.exists(RUN) and files.names(RUN) == []
  for n in range(45):  # the server's pages have 20
    put(f"{RUN}/many/{n:02d}", b"%d" % n)
  put(f"{RUN}/one.json", b'{"a": 1}')
  assert files.names(f"{RUN}/many") == [f"{n:02d}" for n in range(45)]
  assert files.names(RUN) == ["many", "one.json"] and files.names("gs://bucket") == ["run"]
  assert files.read_json(f"{RUN}/one.json") == {"a": 1} and files.size(f"{RUN}/one.json") == 8
  assert files.digest_of_file(f"{RUN}/one.json")
  assert files.is_folder(RUN) and files.is_folder("gs://bucket") and files.exists(f"{RUN}/many")
  assert not files.is_folder(f"{RUN}/one.json") and files.is_file(f"{RUN}/one.json")
  assert not files.is_file(RUN) and files.names(f"{RUN}/one.json") == []
  for missing in (f"{RUN}/on", f"{RUN}/man", f"{RUN}/one.json/x"):
    assert not files.exists(missing) and files.names(missing) == []
    with pytest.raises(FileNotFoundError):
      get(missing)
    with pytest.raises(FileNotFoundError):
      files.remove(missing)
    files.remove(missing, missing_ok=True)
  files.append_line(f"{RUN}/log", "é")
  files.append_line(f"{RUN}/log", "b")
  with files.opened(f"{RUN}/log", "r") as file:
    assert file.readlines() == ["é\n", "b\n"]
  files.move(f"{RUN}/log", f"{RUN}/moved")
  reads = buckets.count("read")
  files.copy(f"{RUN}/moved", f"{RUN}/again")
  assert buckets.count("read") == reads  # it doesn't come by here
  assert get(f"{RUN}/moved") == get(f"{RUN}/again") and not files.exists(f"{RUN}/log")


def test_a_block_that_fails_replaces_nothing(buckets):
  put(f"{RUN}/a", b"old")
  with pytest.raises(ZeroDivisionError), files.replacing(f"{RUN}/a") as partial:
    with open(partial, "wb") as file:
      file.write(b"new")
    raise ZeroDivisionError
  assert get(f"{RUN}/a") == b"old" and not os.path.exists(partial)


def test_a_large_object_is_uploaded_in_chunks(buckets):
  contents = os.urandom(6 << 20)  # gcsfs sends up to 5 MiB at once
  put(f"{RUN}/large", contents)
  assert buckets.count("start", "*/large") == 1 and get(f"{RUN}/large") == contents


def test_one_of_many_creates(buckets):
  made, threads = [], []
  for n in range(8):
    do = functools.partial(buckets_lib.create, f"{RUN}/.lock", b"%d" % n)
    threads.append(threading.Thread(target=lambda do=do, n=n: made.append((n, do()))))
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  (winner,) = [n for n, mine in made if mine]
  assert get(f"{RUN}/.lock") == b"%d" % winner


def test_a_creation_whose_answer_is_lost_is_known_as_ones_own(buckets):
  buckets.fail("write", "bucket/run/.lock", "lost")
  assert buckets_lib.create(f"{RUN}/.lock", b"mine") and not buckets.unspent()
  assert not buckets_lib.create(f"{RUN}/.lock", b"theirs")


def test_an_older_generation_isnt_removed(buckets):
  put(f"{RUN}/.lock", b"theirs")
  generation = str(buckets_lib.described(f"{RUN}/.lock")["generation"])
  put(f"{RUN}/.lock", b"newer")
  buckets_lib.remove_generation(f"{RUN}/.lock", generation)
  assert get(f"{RUN}/.lock") == b"newer"
  generation = str(buckets_lib.described(f"{RUN}/.lock")["generation"])
  buckets_lib.remove_generation(f"{RUN}/.lock", generation)
  assert not files.exists(f"{RUN}/.lock")


def test_a_reader_sees_a_whole_folder_or_none(buckets):
  """The marker comes last in a copy, and goes first in a removal."""
  for name in ("a", "z", "marker", "deep/b"):
    put(f"{RUN}/{name}", name.encode())
  buckets.requests.clear()
  files.move_folder(RUN, "gs://bucket/moved", "marker")
  assert files.names(RUN) == [] and files.names("gs://bucket/moved") == ["a", "deep", "marker", "z"]
  assert get("gs://bucket/moved/deep/b") == b"deep/b"
  copied = [name for what, name in buckets.requests if what == "copy"]
  removed = [name for what, name in buckets.requests if what == "delete"]
  assert len(copied) == len(removed) == 4
  assert copied[-1].endswith("/marker") and removed[0].endswith("/marker")
  buckets.requests.clear()
  files.remove_folder("gs://bucket/moved", "marker")
  removed = [name for what, name in buckets.requests if what == "delete"]
  assert removed[0].endswith("/marker") and files.names("gs://bucket") == []


def test_a_copy_is_known_by_its_object(buckets, tmp_path):
  files.use_scratch(str(tmp_path))
  try:
    put(f"{RUN}/tokens.npy", b"one")
    copy = scratch.local_copy(f"{RUN}/tokens.npy")
    assert os.path.basename(copy) == "tokens.npy" and get(copy) == b"one"
    assert copy.startswith(str(tmp_path))
    reads = buckets.count("read")
    assert scratch.local_copy(f"{RUN}/tokens.npy") == copy and buckets.count("read") == reads
    put(f"{RUN}/tokens.npy", b"two")
    newer = scratch.local_copy(f"{RUN}/tokens.npy")
    assert newer != copy and get(newer) == b"two" and not os.path.exists(copy)
    buckets.fail("read", "*", "cut")  # half of it arrives
    put(f"{RUN}/tokens.npy", b"three" * 1000)
    assert get(scratch.local_copy(f"{RUN}/tokens.npy")) == b"three" * 1000
    put(f"{RUN}/config.json", b"{}")
    folder = scratch.local_copy(RUN)
    assert sorted(os.listdir(folder)) == ["config.json", "tokens.npy"]
    assert scratch.local_copy(copy) == copy
  finally:
    files.use_scratch("")


@pytest.mark.parametrize("kind", ["503", "429", "cut", "lost"])
@pytest.mark.parametrize(
  ("operation", "do"),
  [
    ("write", lambda: put(f"{RUN}/a.json", b'{"b": 2}')),
    ("get", lambda: files.exists(f"{RUN}/a.json")),
    ("read", lambda: files.read_json(f"{RUN}/a.json")),
    ("list", lambda: files.names(RUN)),
    ("copy", lambda: files.move(f"{RUN}/c", f"{RUN}/d")),
    ("delete", lambda: files.remove_folder(RUN, "c")),
  ],
)
def test_one_failure_is_tried_again(buckets, operation, do, kind):
  put(f"{RUN}/a.json", b'{"a": 1}')
  put(f"{RUN}/c", b"c")
  buckets.fail(operation, "*", kind)
  result = do()
  assert not buckets.unspent()
  expected = {
    "write": lambda: files.read_json(f"{RUN}/a.json") == {"b": 2},
    "get": lambda: result is True,
    "read": lambda: result == {"a": 1},
    "list": lambda: result == ["a.json", "c"],
    "copy": lambda: files.names(RUN) == ["a.json", "d"] and get(f"{RUN}/d") == b"c",
    "delete": lambda: files.names("gs://bucket") == [],
  }
  assert expected[operation]()


def test_a_bucket_that_refuses_is_one_line(buckets):
  put(f"{RUN}/a", b"")
  with pytest.raises(BucketError, match="--workdir: gs://other/run: there is no bucket other; fix"):
    files.check_reachable("--workdir", "gs://other/run")
  files.check_reachable("--workdir", f"{RUN}/not/there/yet")
  for operation in ("list", "write", "delete"):
    buckets.refusing = {"bucket": {operation}}
    with pytest.raises(BucketError, match=r"no right to do this .*fix: grant") as caught:
      buckets_lib.check_writable(RUN)
    assert "\n" not in str(caught.value) and caught.value.status == 2
    assert isinstance(caught.value, OSError) and isinstance(caught.value, UserError)
  buckets.refusing = {}
  assert abs(buckets_lib.check_writable(RUN)) < 60
  assert files.names(RUN) == ["a"] or all(".writable" in name for name in files.names(RUN)[:-1])


def test_a_bucket_that_doesnt_answer_is_told_before_its_error(buckets, monkeypatch, caplog):
  monkeypatch.setattr(buckets_lib, "_asked", threading.Event())
  monkeypatch.setattr(buckets_lib, "_SILENT_SECONDS", 0.01)
  buckets.fail("list", "*", "503")  # what is asked again waits for a second
  files.names(RUN)
  (told,) = caplog.messages
  assert told.startswith(f"{RUN}: no answer from the bucket yet")
  buckets.fail("list", "*", "503")
  files.names(RUN)
  assert caplog.messages == [told] and not buckets.unspent()


def test_a_new_folder_is_whole_or_told(buckets):
  """A block that fails leaves nothing; what a killed one has left is told with its removal."""
  with pytest.raises(ZeroDivisionError), files.new_folder(RUN, "workdir") as part:
    put(f"{part}/config.json", b"{}")
    raise ZeroDivisionError
  assert files.names("gs://bucket") == []
  buckets.put("bucket", "run/config.json", b"{}")
  removal = f"workdir: {RUN} exists; fix: name another target, or `gcloud storage rm -r {RUN}` if"
  with pytest.raises(UserError, match=removal), files.new_folder(RUN, "workdir"):
    pass


def test_a_question_costs_one_request(buckets):
  for n in range(99):  # the server's pages have 20
    buckets.put("bucket", f"run/{n:02d}", b"")
  for path in ("gs://bucket", f"{RUN}/07", RUN):
    buckets.requests.clear()
    files.check_reachable("--workdir", path)
  assert buckets.count() <= 2, buckets.requests  # a lost connection may have it asked again


def test_summaries_are_written_as_one_object(buckets):
  from igpt_jax.reporting import summary

  summary.write_json(f"{RUN}/training.json", {"parameters": 5, "step": 3})
  buckets.requests.clear()
  assert "3 steps" in summary.write_summary(RUN)
  assert [name for what, name in buckets.requests if what == "write"] == ["bucket/run/summary.md"]
  assert json.loads(get(f"{RUN}/training.json")) == {"parameters": 5, "step": 3}
