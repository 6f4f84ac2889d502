"""Buckets on loopback, spoken to as to Google Cloud Storage's JSON API; tests make them fail on demand.

Source: https://cloud.google.com/storage/docs/json_api. Enough of it for gcsfs, google-cloud-storage,
etils' epath and TensorStore: what is missing answers 501, never silence.
"""

import contextlib
import dataclasses
import email.parser
import email.policy
import fnmatch
import http.client
import http.server
import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from email.message import Message
from typing import Any

from support.bucket_store import Answer, Refusal, Store

_RELAYED = {"media": "write", "multipart": "write", "resumable": "start"}


@dataclasses.dataclass
class _Fault:
  operation: str
  pattern: str
  kind: str
  times: int


class BucketServer(Store, http.server.ThreadingHTTPServer):
  """Serves buckets.

  Operations, for faults, refusals and counts: bucket (its description), list, get (an object's
  description), read, start (of an upload in chunks), write (whole, or a chunk), cancel, delete, patch,
  copy, move, compose.
  """

  daemon_threads = True
  request_queue_size = 128  # a client opens many connections at once

  def __init__(self, page_size: int):
    Store.__init__(self, page_size)
    http.server.ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), _Handler)
    self.hold_s = 60.0  # how long a time-out keeps silent before it hangs up
    self._released = threading.Event()
    self.reset()

  def reset(self, *buckets: str) -> None:
    """Forgets all but these buckets, which are empty."""
    self._released.set()
    with self.lock:
      self.buckets = {name: {} for name in buckets}
      self.refusing: dict[str, set[str]] = {}  # by bucket: operations (or "*") that answer 403
      self.requests: list[tuple[str, str]] = []  # operation, BUCKET/NAME
      self._faults: list[_Fault] = []
      self._released = threading.Event()

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"

  def handle_error(self, request, client_address):
    """A client that hangs up, or is killed, is part of the tests."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)

  def fail(self, operation: str, pattern: str, kind: str, times: int = 1) -> None:
    """Makes the next `times` requests of an operation, for BUCKET/NAME like `pattern`, fail.

    Args:
      kind: a status, such as "503"; "timeout": silence; "cut": the connection ends before anything is
        done, or in the middle of what is read; "lost": it is done, and then the connection ends
        without an answer.
    """
    with self.lock:
      self._faults.append(_Fault(operation, pattern, kind, times))

  def unspent(self) -> int:
    """How many of the failures asked for have yet to happen."""
    with self.lock:
      return sum(fault.times for fault in self._faults)

  def count(self, operation: str = "*", pattern: str = "*") -> int:
    """How many requests came, those that failed too."""
    with self.lock:
      return sum(
        fnmatch.fnmatchcase(done, operation) and fnmatch.fnmatchcase(name, pattern)
        for done, name in self.requests
      )

  def answer(self, method: str, url: str, headers: Message, body: bytes) -> Answer | None:
    """Does what is asked for; None: hang up without an answer."""
    parsed = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parsed.query, keep_blank_values=True))
    path = parsed.path.lstrip("/")
    try:
      if path.startswith("batch/"):
        return self._batch(headers, body)
      _, found, rest = path.partition("storage/v1/")
      parts = [urllib.parse.unquote(part) for part in rest.split("/")]
      if not found or parts[0] != "b" or len(parts) < 2:
        raise Refusal(501, f"{method} {url} isn't served")
      fields: dict[str, Any] = {}
      if path.startswith(("upload/", "resumable/upload/")):
        operation, name, fields, body = self._upload_of(method, query, headers, body)
      else:
        operation = _operation(method, parts, query)
        name = parts[3] if len(parts) > 3 else ""
      return self._do(operation, parts, name, query, headers, fields, body)
    except Refusal as refusal:
      return refusal.answer

  def _upload_of(self, method, query, headers, body):
    """Operation, object, its fields and contents of a request to upload."""
    if upload := self._uploads.get(query.get("upload_id", "")):
      return ("cancel" if method == "DELETE" else "write"), upload.name, {}, body
    if "upload_id" in query:
      raise Refusal(410, "no such upload")
    kind = query.get("uploadType", "")
    if method != "POST" or kind not in _RELAYED:
      raise Refusal(501, f"uploadType={kind} isn't served")
    fields: dict[str, Any] = {"contentType": headers.get("Content-Type", "")}
    if kind == "multipart":
      (_, described), (part_type, body) = _parts(headers["Content-Type"], body)
      fields = {"contentType": part_type, **json.loads(described)}
    elif kind == "resumable":
      fields = {
        "contentType": headers.get("X-Upload-Content-Type", ""),
        **json.loads(body or b"{}"),
      }
    return _RELAYED[kind], query.get("name") or fields.get("name", ""), fields, body

  def _do(self, operation, parts, name, query, headers, fields, body) -> Answer | None:
    """One operation, with what was asked to go wrong with it."""
    bucket = parts[1]
    kind = self._note(operation, f"{bucket}/{name}")
    if kind.isdecimal():
      raise Refusal(int(kind), "this failure was asked for")
    if kind == "timeout":
      self._released.wait(self.hold_s)
    if kind == "timeout" or (kind == "cut" and operation != "read"):
      return None
    with self.lock:
      if bucket not in self.buckets:
        raise Refusal(404, "The specified bucket does not exist.")
      if self.refusing.get(bucket, set()) & {operation, "*"}:
        raise Refusal(403, f"tester@test does not have access to {operation} in {bucket}.")
      if operation in ("list", "bucket"):
        answer = getattr(self, f"_{operation}")(bucket, parts, query)
      elif operation in ("write", "start", "cancel"):
        answer = getattr(self, f"_{operation}")(bucket, name, query, headers, fields, body)
      elif operation == "read":
        answer = self._read(bucket, name, query, headers)
      else:
        answer = getattr(self, f"_{operation}")(bucket, name, parts, query, body)
    return None if kind == "lost" else answer._replace(cut=kind == "cut")

  def _note(self, operation: str, name: str) -> str:
    """Counts a request; returns the kind of failure that was asked for, or ""."""
    with self.lock:
      self.requests.append((operation, name))
      for fault in self._faults:
        if (
          fault.times
          and fnmatch.fnmatchcase(operation, fault.operation)
          and fnmatch.fnmatchcase(name, fault.pattern)
        ):
          fault.times -= 1
          return fault.kind
    return ""

  def _batch(self, headers, body) -> Answer:
    """Several requests in one, as https://cloud.google.com/storage/docs/batch has them."""
    answers = []
    for _, part in _parts(headers["Content-Type"], body):
      line, _, rest = part.lstrip(b"\r\n").partition(b"\n")
      method, url, *_ = line.decode().split()
      asked = rest.replace(b"\r\n", b"\n").partition(b"\n\n")[2].strip()
      answer = self.answer(method, url, Message(), asked) or Answer(503)
      status = f"HTTP/1.1 {answer.status} {http.client.responses[answer.status]}"
      told = f"Content-Type: application/http\r\n\r\n{status}\r\nContent-Type: application/json"
      answers.append(f"--batch\r\n{told}\r\n\r\n".encode() + answer.body + b"\r\n")
    return Answer(
      200, b"".join(answers) + b"--batch--\r\n", {"Content-Type": "multipart/mixed; boundary=batch"}
    )


class _Handler(http.server.BaseHTTPRequestHandler):
  server: BucketServer
  protocol_version = "HTTP/1.1"
  wbufsize = -1
  disable_nagle_algorithm = True

  def log_message(self, *_):
    pass

  def _handle(self) -> None:
    answer = self.server.answer(self.command, self.path, self.headers, self._body())
    if answer is None:
      self.close_connection = True
      return
    body = b"" if answer.status in (204, 304) else answer.body
    self.send_response(answer.status)
    for name, value in {"Content-Type": "application/json", **answer.headers}.items():
      self.send_header(name, value)
    if answer.status != 204:
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if answer.cut:
      body, self.close_connection = body[: len(body) // 2], True
    self.wfile.write(body)
    self.wfile.flush()

  do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

  def _body(self) -> bytes:
    if "chunked" not in self.headers.get("Transfer-Encoding", ""):
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    body = b""
    while size := int(self.rfile.readline().partition(b";")[0], 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body


def _operation(method: str, parts: list[str], query: Mapping[str, str]) -> str:
  """The operation's name, of the path's parts: b, BUCKET, o, NAME, …"""
  kind = (method, len(parts), *parts[4:5])
  if method == "GET" and (len(parts) == 2 or parts[2:] == ["storageLayout"]):
    return "bucket"
  known = {
    ("GET", 3): "list",
    ("GET", 4): "read" if query.get("alt") == "media" else "get",
    ("DELETE", 4): "delete",
    ("PATCH", 4): "patch",
    ("POST", 5, "compose"): "compose",
    ("POST", 9, "rewriteTo"): "copy",
    ("POST", 9, "copyTo"): "copy",
    ("POST", 7, "moveTo"): "move",
  }
  if kind not in known or parts[2] != "o":
    raise Refusal(501, f"{method} {'/'.join(parts)} isn't served")
  return known[kind]


def _parts(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
  """Content types and contents of a multipart body, byte for byte."""
  message = email.parser.HeaderParser(policy=email.policy.HTTP).parsestr(
    f"Content-Type: {content_type}\n\n"
  )
  boundary = b"--" + (message.get_boundary() or "").encode()
  parts = []
  for part in (b"\n" + body).split(b"\n" + boundary)[1:-1]:
    newline = b"\r\n" if part.startswith(b"\r\n") else b"\n"
    head, _, content = part.removeprefix(newline).partition(newline + newline)
    described = email.parser.HeaderParser().parsestr(head.decode())
    if newline == b"\r\n":
      content = content.removesuffix(b"\r")
    parts.append((described.get("Content-Type", ""), content))
  return parts


@contextlib.contextmanager
def serving(page_size: int = 20) -> Iterator[BucketServer]:
  """A server without a bucket, that runs in a thread."""
  server = BucketServer(page_size)
  thread = threading.Thread(
    target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
  )
  thread.start()
  try:
    yield server
  finally:
    server.reset()
    server.shutdown()
    thread.join(10)
    server.server_close()


def point_clients(server: BucketServer) -> dict[str, str]:
  """Environment variables by which gcsfs, google-cloud-storage and TensorStore talk to the server.

  gcsfs asks for a bucket's layout by gRPC, which the server doesn't speak; it is told not to ask.
  """
  return {
    "STORAGE_EMULATOR_HOST": server.url,
    "TENSORSTORE_GCS_HTTP_URL": server.url,
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }


def forget() -> None:
  """Has gcsfs forget the listings that it keeps of an earlier test's buckets."""
  if gcsfs := sys.modules.get("gcsfs"):
    for file_system in gcsfs.GCSFileSystem._cache.values():
      file_system.invalidate_cache()
