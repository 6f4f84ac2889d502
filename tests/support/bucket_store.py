"""What lies in the tests' buckets, and the operations of Google Cloud Storage's JSON API on it.

Source: https://cloud.google.com/storage/docs/json_api. What isn't served answers 501, never silence.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
import threading
import time
import urllib.parse
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

_OF_CLIENT = ("contentType", "metadata", "cacheControl", "contentEncoding", "contentDisposition")


class Answer(NamedTuple):
  """An HTTP response; `body` is sent by half if `cut`."""

  status: int
  body: bytes = b""
  headers: Mapping[str, str] = {}
  cut: bool = False


class Refusal(Exception):
  """An error of the API, as its answer."""

  def __init__(self, status: int, message: str = ""):
    self.answer = Answer(status, as_json({"error": {"code": status, "message": message}}))


@dataclasses.dataclass
class Stored:
  """One object: its contents and what describes them."""

  content: bytes
  generation: int
  fields: dict[str, Any]
  metageneration: int = 1
  composed: bool = False


@dataclasses.dataclass
class Upload:
  bucket: str
  name: str
  fields: dict[str, Any]
  query: dict[str, str]
  content: bytes = b""
  stored: dict[str, Any] | None = (
    None  # the object, once it is whole: asked again, it is told again
  )


class Store:
  """Buckets: `buckets[BUCKET][NAME]` is an object. Methods with a _ are operations, called under `lock`."""

  def __init__(self, page_size: int):
    self.buckets: dict[str, dict[str, Stored]] = {}
    self.page_size = page_size  # most entries of a listing's page, whatever is asked for
    self.clock_ahead = 0.0  # seconds, of the times in answers
    self.lock = threading.RLock()
    self._uploads: dict[str, Upload] = {}
    self._generations = itertools.count(int(time.time() * 1e6))

  @property
  def url(self) -> str:
    """The server's address."""
    raise NotImplementedError

  def put(self, bucket: str, name: str, content: bytes) -> Stored:
    """Stores an object as somebody else would, past faults and counts."""
    with self.lock:
      stored = Stored(bytes(content), next(self._generations), {})
      stored.fields["timeCreated"] = stored.fields["updated"] = self._now()
      self.buckets[bucket][name] = stored
      return stored

  def names(self, bucket: str, prefix: str = "") -> list[str]:
    with self.lock:
      return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

  def content(self, bucket: str, name: str) -> bytes:
    with self.lock:
      return self.buckets[bucket][name].content

  def _now(self) -> str:
    return datetime.fromtimestamp(time.time() + self.clock_ahead, UTC).strftime(
      "%Y-%m-%dT%H:%M:%S.%fZ"
    )

  def _bucket(self, bucket, parts, query) -> Answer:
    if parts[2:] == ["storageLayout"]:
      layout = {"kind": "storage#storageLayout", "bucket": bucket, "locationType": "region"}
      return ok({**layout, "hierarchicalNamespace": {"enabled": False}})
    return ok({"kind": "storage#bucket", "id": bucket, "name": bucket, "storageClass": "STANDARD"})

  def _list(self, bucket, parts, query) -> Answer:
    for name in ("matchGlob", "softDeleted", "filter"):
      if name in query:
        raise Refusal(501, f"{name} isn't served")
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
    most = min(int(query.get("maxResults") or 1000), self.page_size)
    items, prefixes, last, token = [], [], "", ""
    for name in sorted(self.buckets[bucket], key=str.encode):
      entry, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
      entry = prefix + entry + found if found else name
      if (
        not name.startswith(prefix)
        or entry.encode() <= after.encode()
        or name.encode() < query.get("startOffset", "").encode()
        or ("endOffset" in query and name.encode() >= query["endOffset"].encode())
        or (found and entry in prefixes)
      ):
        continue
      if len(items) + len(prefixes) == most:
        token = base64.urlsafe_b64encode(last.encode()).decode()
        break
      if found:
        prefixes.append(entry)
      if not found or (query.get("includeTrailingDelimiter") == "true" and name == entry):
        items.append(self._described(bucket, name))
      last = entry
    page = {"kind": "storage#objects", "items": items, "prefixes": prefixes, "nextPageToken": token}
    return ok({key: value for key, value in page.items() if value})

  def _found(self, bucket: str, name: str, query: Mapping[str, str], reading: bool) -> Stored:
    """The object that a request is about, if its preconditions hold."""
    stored = self.buckets[bucket].get(name)
    if stored is None or query.get("generation", str(stored.generation)) != str(stored.generation):
      raise Refusal(404, f"No such object: {bucket}/{name}")
    _check(stored, query, reading)
    return stored

  def _described(self, bucket: str, name: str) -> dict[str, Any]:
    import google_crc32c

    stored = self.buckets[bucket][name]
    sums = {"crc32c": google_crc32c.Checksum(stored.content).digest()}
    if not stored.composed:
      sums["md5Hash"] = hashlib.md5(stored.content).digest()
    where = f"{self.url}/download/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
    return {
      **stored.fields,
      "kind": "storage#object",
      "id": f"{bucket}/{name}/{stored.generation}",
      "bucket": bucket,
      "name": name,
      "generation": str(stored.generation),
      "metageneration": str(stored.metageneration),
      "size": str(len(stored.content)),
      "storageClass": "STANDARD",
      "mediaLink": f"{where}?generation={stored.generation}&alt=media",
      **{key: base64.b64encode(value).decode() for key, value in sums.items()},
    }

  def _get(self, bucket, name, parts, query, body) -> Answer:
    self._found(bucket, name, query, reading=True)
    return ok(self._described(bucket, name))

  def _read(self, bucket, name, query, headers) -> Answer:
    stored = self._found(bucket, name, query, reading=True)
    described = self._described(bucket, name)
    told = {
      "Content-Type": stored.fields.get("contentType") or "application/octet-stream",
      "X-Goog-Generation": described["generation"],
      "X-Goog-Metageneration": described["metageneration"],
      "X-Goog-Hash": ",".join(
        f"{key.removesuffix('Hash')}={described[key]}"
        for key in ("crc32c", "md5Hash")
        if key in described
      ),
    }
    first, dash, last = headers.get("Range", "").removeprefix("bytes=").partition("-")
    if not dash:
      return Answer(200, stored.content, told)
    size = len(stored.content)
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
      raise Refusal(416, "Requested range not satisfiable")
    told["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Answer(206, stored.content[start:stop], told)

  def _store(self, bucket, name, content, fields, query, composed=False) -> dict[str, Any]:
    if not name:
      raise Refusal(400, "Required: name")
    _check(self.buckets[bucket].get(name), query, reading=False)
    if "md5Hash" in fields:
      ours = base64.b64encode(hashlib.md5(content).digest()).decode()
      if fields["md5Hash"] != ours:
        raise Refusal(400, f"Provided MD5 hash doesn't match calculated MD5 hash {ours}")
    stored = self.put(bucket, name, content)
    stored.fields.update({key: fields[key] for key in _OF_CLIENT if fields.get(key)})
    stored.composed = composed
    return self._described(bucket, name)

  def _start(self, bucket, name, query, headers, fields, body) -> Answer:
    _check(self.buckets[bucket].get(name), query, reading=False)
    identity = hashlib.md5(f"{bucket}/{name}/{next(self._generations)}".encode()).hexdigest()
    self._uploads[identity] = Upload(bucket, name, fields, query)
    where = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={identity}"
    return Answer(200, b"", {"Location": where})

  def _cancel(self, bucket, name, query, headers, fields, body) -> Answer:
    del self._uploads[query["upload_id"]]
    return Answer(499)

  def _write(self, bucket, name, query, headers, fields, body) -> Answer:
    if "upload_id" not in query:
      return ok(self._store(bucket, name, body, fields, query))
    upload = self._uploads[query["upload_id"]]
    span, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    held = len(upload.content)
    if upload.stored is not None:
      return ok(upload.stored)
    if span != "*":
      start = int(span.partition("-")[0]) if span else 0
      if start > held or (total == "*" and len(body) % 2**18):
        raise Refusal(400, "a chunk must follow what is held, by multiples of 256 KiB")
      upload.content += body[held - start :]
    held = len(upload.content)
    if total != "*" and held >= int(total or held):
      upload.stored = self._store(bucket, name, upload.content, upload.fields, upload.query)
      return ok(upload.stored)
    return Answer(308, b"", {"Range": f"bytes=0-{held - 1}"} if held else {})

  def _delete(self, bucket, name, parts, query, body) -> Answer:
    self._found(bucket, name, query, reading=False)
    del self.buckets[bucket][name]
    return Answer(204)

  def _patch(self, bucket, name, parts, query, body) -> Answer:
    stored = self._found(bucket, name, query, reading=False)
    wanted = json.loads(body or b"{}")
    stored.fields.update({key: wanted[key] for key in _OF_CLIENT if key in wanted})
    stored.fields["updated"] = self._now()
    stored.metageneration += 1
    return ok(self._described(bucket, name))

  def _copy(self, bucket, name, parts, query, body) -> Answer:
    to_bucket, to_name = parts[6], parts[8]
    if to_bucket not in self.buckets:
      raise Refusal(404, "The specified bucket does not exist.")
    asked = {f"if{key[8:]}": value for key, value in query.items() if key.startswith("ifSource")}
    if "sourceGeneration" in query:
      asked["generation"] = query["sourceGeneration"]
    source = self._found(bucket, name, asked, reading=False)
    fields = {**source.fields, **json.loads(body or b"{}")}
    stored = self._store(to_bucket, to_name, source.content, fields, query)
    if parts[4] == "copyTo":
      return ok(stored)
    size = {"totalBytesRewritten": stored["size"], "objectSize": stored["size"]}
    return ok({"kind": "storage#rewriteResponse", "done": True, **size, "resource": stored})

  def _move(self, bucket, name, parts, query, body) -> Answer:
    self._copy(bucket, name, [*parts[:4], "copyTo", "b", bucket, "o", parts[6]], query, b"")
    del self.buckets[bucket][name]
    return ok(self._described(bucket, parts[6]))

  def _compose(self, bucket, name, parts, query, body) -> Answer:
    asked = json.loads(body)
    content = b""
    for source in asked["sourceObjects"]:
      wanted = {key: str(source[key]) for key in ("generation",) if key in source}
      if "objectPreconditions" in source:
        wanted |= {key: str(value) for key, value in source["objectPreconditions"].items()}
      content += self._found(bucket, source["name"], wanted, reading=False).content
    return ok(self._store(bucket, name, content, asked.get("destination", {}), query, True))


def _check(stored: Stored | None, query: Mapping[str, str], reading: bool) -> None:
  """Refuses what its preconditions forbid; an object that isn't there has generation 0."""
  generation, metageneration = (stored.generation, stored.metageneration) if stored else (0, 0)
  for name, ours in (("Generation", generation), ("Metageneration", metageneration)):
    match, other = query.get(f"if{name}Match"), query.get(f"if{name}NotMatch")
    if match is not None and int(match) != ours:
      raise Refusal(412, f"if{name}Match={match}, but it is {ours}")
    if other is not None and int(other) == ours:
      raise Refusal(304 if reading else 412, f"if{name}NotMatch={other}, and so it is")


def as_json(value: Any) -> bytes:
  return json.dumps(value).encode()


def ok(value: Any) -> Answer:
  return Answer(200, as_json(value))
