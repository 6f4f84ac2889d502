"""The tests' own buckets keep what Google's promise, seen through the clients that the program uses.

Each of these fails on a server that ignores preconditions, never pages, or loses a failure asked for.
"""

import base64
import hashlib
import http.client
import json
import os
import threading
import urllib.parse

import numpy as np
import pytest


@pytest.fixture
def fs(buckets):
  """The file system that `igpt_jax.buckets` takes, whatever else was imported before.

  gcsfs' other one, which it offers unless it is told not to before its import, asks by gRPC, and waits.
  """
  import gcsfs.core

  return gcsfs.core.GCSFileSystem(
    token="anon", use_listings_cache=False, requests_timeout=30, skip_instance_cache=True
  )


def asked(server, method, path, body=b"", **headers):
  """Status, headers and contents of a bare request."""
  connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
  try:
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read()
  finally:
    connection.close()


def object_path(name, **query):
  path = f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}"
  return f"{path}?{urllib.parse.urlencode(query)}"


def upload_path(name, **query):
  query = {"uploadType": "media", "name": name, **query}
  return f"/upload/storage/v1/b/bucket/o?{urllib.parse.urlencode(query)}"


def test_absent_only_creation(buckets, fs):
  """ifGenerationMatch=0 lets the first writer alone succeed, whoever else tries at the same time."""
  fs.pipe_file("gs://bucket/lock", b"mine", mode="create")
  with pytest.raises(FileExistsError):
    fs.pipe_file("gs://bucket/lock", b"theirs", mode="create")
  assert fs.cat_file("gs://bucket/lock") == b"mine"

  statuses = []

  def attempt():
    statuses.append(asked(buckets, "POST", upload_path("race", ifGenerationMatch=0), b"x")[0])

  threads = [threading.Thread(target=attempt) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(statuses) == [200] + [412] * 7


@pytest.mark.parametrize(
  "method, asks, met, unmet",
  [
    ("GET", {}, 200, 412),
    ("GET", {"alt": "media"}, 200, 412),
    ("DELETE", {}, 204, 412),
    ("PATCH", {}, 200, 412),
    ("POST", {"uploadType": "media"}, 200, 412),
    ("POST", {"uploadType": "resumable"}, 200, 412),
    ("POST", "compose", 200, 412),
    ("POST", "rewriteTo/b/bucket/o/a%2Fone", 200, 412),
  ],
)
def test_preconditions_of_every_method(buckets, method, asks, met, unmet):
  def attempt(**conditions):
    if isinstance(asks, str):
      path = object_path("a/one", **conditions).replace("?", f"/{asks}?")
      return asked(buckets, method, path, json.dumps({"sourceObjects": [{"name": "a/one"}]}))[0]
    if "uploadType" in asks:
      return asked(buckets, method, upload_path("a/one", **asks, **conditions), b"{}")[0]
    return asked(buckets, method, object_path("a/one", **asks, **conditions), b"{}")[0]

  ours = buckets.put("bucket", "a/one", b"{}").generation
  assert attempt(ifGenerationMatch=ours - 1) == unmet
  assert attempt(ifGenerationNotMatch=ours) == (304 if method == "GET" else 412)
  assert attempt(ifMetagenerationMatch=2) == unmet
  assert buckets.buckets["bucket"]["a/one"].generation == ours
  assert attempt(ifGenerationMatch=ours, ifMetagenerationMatch=1) == met


def test_generations_and_sums(buckets, fs):
  """A new contents has a newer generation; sums are those of the contents; an old one is gone."""
  fs.pipe_file("gs://bucket/a", b"first")
  first = fs.info("gs://bucket/a")
  fs.pipe_file("gs://bucket/a", b"123456789")
  second = fs.info("gs://bucket/a")
  assert int(second["generation"]) > int(first["generation"])
  assert second["md5Hash"] == base64.b64encode(hashlib.md5(b"123456789").digest()).decode()
  assert second["crc32c"] == base64.b64encode(bytes.fromhex("e3069283")).decode()  # RFC 3720's
  assert second["size"] == 9
  assert asked(buckets, "GET", object_path("a", generation=first["generation"]))[0] == 404
  assert asked(buckets, "PATCH", object_path("a"), b'{"metadata": {"k": "v"}}')[0] == 200
  patched = fs.info("gs://bucket/a")
  assert (patched["metageneration"], patched["metadata"]) == ("2", {"k": "v"})
  assert patched["generation"] == second["generation"]


def test_listings_come_by_pages(buckets, fs):
  names = sorted(f"run/{folder}/{i:03d}" for folder in ("a", "b") for i in range(30))
  for name in names:
    buckets.put("bucket", name, b"x")
  buckets.requests.clear()
  assert [path.removeprefix("bucket/") for path in fs.find("gs://bucket/run")] == names
  # 60 objects, 20 a page; the client asks again for what takes long, as it does on a busy machine.
  assert buckets.count("list") >= 3
  assert [os.path.basename(path) for path in fs.ls("gs://bucket/run", detail=False)] == ["a", "b"]

  found, token = [], ""
  while True:
    path = f"/storage/v1/b/bucket/o?prefix=run/&startOffset=run/a/010&endOffset=run/b/010&pageToken={token}"
    page = json.loads(asked(buckets, "GET", path)[2])
    assert len(page["items"]) <= 20
    found += [item["name"] for item in page["items"]]
    if not (token := page.get("nextPageToken", "")):
      break
  assert found == [name for name in names if "run/a/010" <= name < "run/b/010"]


def test_pages_of_folders(buckets):
  """A page counts its folders too, and the next one begins after the last of them."""
  for i in range(45):
    buckets.put("bucket", f"{i:02d}/x", b"")
    buckets.put("bucket", f"{i:02d}/y", b"")
  folders, token, pages = [], "", 0
  while True:
    path = f"/storage/v1/b/bucket/o?delimiter=/&pageToken={token}"
    page = json.loads(asked(buckets, "GET", path)[2])
    folders, pages = folders + page["prefixes"], pages + 1
    if not (token := page.get("nextPageToken", "")):
      break
  assert (folders, pages) == ([f"{i:02d}/" for i in range(45)], 3)


def test_ranges(buckets, fs):
  buckets.put("bucket", "a", bytes(range(100)))
  assert fs.cat_file("gs://bucket/a", start=10, end=20) == bytes(range(10, 20))
  path = object_path("a", alt="media")
  for span, wanted, of in (
    ("5-", (5, 100), 206),
    ("-7", (93, 100), 206),
    ("98-200", (98, 100), 206),
  ):
    status, headers, body = asked(buckets, "GET", path, Range=f"bytes={span}")
    assert (status, body) == (of, bytes(range(*wanted)))
    assert headers["Content-Range"] == f"bytes {wanted[0]}-{wanted[1] - 1}/100"
  assert asked(buckets, "GET", path, Range="bytes=100-")[0] == 416


def test_uploads_in_chunks(buckets, fs, tmp_path):
  content = np.random.default_rng(0).integers(0, 256, 7 * 2**20, np.uint8).tobytes()
  with fs.open("gs://bucket/large", "wb", block_size=2**20) as file:
    for start in range(0, len(content), 2**20):
      file.write(content[start : start + 2**20])
  assert buckets.content("bucket", "large") == content
  assert buckets.count("write", "bucket/large") >= 7
  (tmp_path / "file").write_bytes(content)
  fs.put_file(str(tmp_path / "file"), "gs://bucket/put", chunksize=2**20)
  assert buckets.content("bucket", "put") == content


def test_an_upload_that_is_left_shows_nothing(buckets):
  """Only the last chunk makes the object; one that leaves a gap is refused."""
  _, headers, _ = asked(buckets, "POST", upload_path("a", uploadType="resumable"))
  where = headers["Location"].removeprefix(buckets.url)
  status, headers, _ = asked(
    buckets, "PUT", where, bytes(2**18), **{"Content-Range": f"bytes 0-{2**18 - 1}/*"}
  )
  assert (status, headers["Range"]) == (308, f"bytes=0-{2**18 - 1}")
  gap = {"Content-Range": f"bytes {2**19}-{2**19}/{2**19 + 1}"}
  assert asked(buckets, "PUT", where, b"x", **gap)[0] == 400
  assert asked(buckets, "PUT", where, **{"Content-Range": "bytes */*"})[0] == 308
  assert buckets.names("bucket") == []
  whole = {"Content-Range": f"bytes {2**18}-{2**18}/{2**18 + 1}"}
  told = [json.loads(asked(buckets, "PUT", where, b"x", **whole)[2]) for _ in range(2)]
  assert told[0] == told[1] and told[0]["size"] == str(
    2**18 + 1
  )  # asked again, it isn't made again
  _, headers, _ = asked(buckets, "POST", upload_path("b", uploadType="resumable"))
  where = headers["Location"].removeprefix(buckets.url)
  assert asked(buckets, "DELETE", where)[0] == 499
  assert asked(buckets, "PUT", where, **{"Content-Range": "bytes */*"})[0] == 410
  assert buckets.names("bucket") == ["a"]


def test_copies_compositions_and_removal(buckets, fs):
  fs.pipe_file("gs://bucket/run/a", b"one")
  fs.pipe_file("gs://bucket/run/b", b"two")
  fs.cp_file("gs://bucket/run/a", "gs://bucket/run/c")
  fs.merge("gs://bucket/run/d", ["gs://bucket/run/a", "gs://bucket/run/b"])
  fs.mv_file("gs://bucket/run/b", "gs://bucket/run/e")
  assert fs.cat(fs.find("gs://bucket/run")) == {
    "bucket/run/a": b"one",
    "bucket/run/c": b"one",
    "bucket/run/d": b"onetwo",
    "bucket/run/e": b"two",
  }
  assert "md5Hash" not in fs.info("gs://bucket/run/d")
  fs.rm("gs://bucket/run", recursive=True)
  assert buckets.names("bucket") == []


def test_google_client_and_its_batches(buckets):
  from google.cloud import storage

  client = storage.Client()
  bucket = client.bucket("bucket")
  for i in range(3):
    bucket.blob(f"a/{i}").upload_from_string(b"\r\nbytes\r\n")
  assert bucket.blob("a/0").download_as_bytes(checksum="md5") == b"\r\nbytes\r\n"
  assert [blob.name for blob in client.list_blobs("bucket", prefix="a/")] == ["a/0", "a/1", "a/2"]
  found = list(client.list_blobs("bucket", prefix="a/", max_results=2))
  with client.batch():
    for blob in found:
      blob.delete()
  assert buckets.names("bucket") == ["a/2"]


def test_tensorstore_and_epath(buckets):
  import tensorstore as ts
  from etils import epath

  spec = {
    "driver": "zarr3",
    "kvstore": "gs://bucket/run/array/",
    "metadata": {"shape": [64, 8], "data_type": "float32"},
  }
  values = np.arange(512, dtype=np.float32).reshape(64, 8)
  array = ts.open(spec, create=True).result()
  array.write(values).result()
  np.testing.assert_array_equal(ts.open(spec, open=True).result().read().result(), values)
  kv = ts.KvStore.open("gs://bucket/kv/").result()
  stamp = kv.write("a", b"1").result()
  assert kv.write("a", b"2", if_equal=stamp.generation).result().generation != stamp.generation
  assert kv.write("a", b"3", if_equal=stamp.generation).result().generation == b""
  assert kv.read("a").result().value == b"2"
  assert kv.list().result() == [b"a"]

  folder = epath.Path("gs://bucket/run")
  (folder / "note.txt").write_text("é")
  assert (folder / "note.txt").read_text() == "é"
  assert sorted(path.name for path in folder.iterdir()) == ["array", "note.txt"]
  folder.rmtree()
  assert not folder.exists()


def test_buckets_that_refuse(buckets, fs):
  buckets.buckets["closed"], buckets.buckets["readable"] = {}, {}
  buckets.refusing = {"closed": {"*"}, "readable": {"write", "start"}}
  buckets.put("readable", "a", b"x")
  with pytest.raises(FileNotFoundError):
    fs.pipe_file("gs://nowhere/a", b"x")
  for bucket in ("closed", "readable"):
    with pytest.raises(OSError, match="Forbidden"):
      fs.pipe_file(f"gs://{bucket}/b", b"x")
  with pytest.raises(OSError, match="Forbidden"):
    fs.cat_file("gs://closed/a")
  assert fs.cat_file("gs://readable/a") == b"x"


def test_failures_come_as_often_as_asked_for(buckets):
  """Fails the operation and names asked for alone; "lost" is done, "cut" isn't, a cut reading is short."""
  path = object_path("a", alt="media")
  buckets.put("bucket", "a", b"12345678")
  buckets.put("bucket", "b", b"12345678")
  buckets.fail("read", "bucket/a", "503", times=2)
  statuses = [asked(buckets, "GET", object_path(name, alt="media"))[0] for name in "abaa"]
  assert statuses == [503, 200, 503, 200]
  buckets.fail("read", "*", "cut")
  with pytest.raises(http.client.IncompleteRead) as error:
    asked(buckets, "GET", path)
  assert error.value.partial == b"1234"
  buckets.fail("write", "bucket/new", "cut")
  with pytest.raises(http.client.RemoteDisconnected):
    asked(buckets, "POST", upload_path("new"), b"x")
  assert buckets.names("bucket") == ["a", "b"]
  buckets.fail("write", "bucket/new", "lost")
  with pytest.raises(http.client.RemoteDisconnected):
    asked(buckets, "POST", upload_path("new"), b"x")
  assert buckets.names("bucket") == ["a", "b", "new"]
  buckets.hold_s = 0.2
  buckets.fail("delete", "*", "timeout")
  with pytest.raises(http.client.RemoteDisconnected):
    asked(buckets, "DELETE", object_path("a"))
  assert buckets.names("bucket") == ["a", "b", "new"]
  assert buckets.unspent() == 0
  assert (buckets.count("read", "bucket/a"), buckets.count("write"), buckets.count("delete")) == (
    4,
    2,
    1,
  )


def test_what_is_not_served_says_so(buckets):
  assert asked(buckets, "GET", "/storage/v1/b/bucket/o?matchGlob=*")[0] == 501
  assert asked(buckets, "GET", "/storage/v1/b/bucket/iam")[0] == 501
  assert asked(buckets, "POST", upload_path("a", uploadType="other"))[0] == 501
