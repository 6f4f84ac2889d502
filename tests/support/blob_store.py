"""A blob store on loopback, as the one that OpenAI's released files lie in; its fields make it misbehave."""

import base64
import hashlib
import http.server
import sys


class BlobStore(http.server.ThreadingHTTPServer):
  """Serves `files` with ranges, as a blob store does; the fields below make it misbehave."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.files: dict[str, bytes] = {}
    self.requests: list[tuple[str, str | None]] = []
    self.cut_after: list[int] = []  # bytes after which each next answer breaks off
    self.statuses: list[int] = []  # errors to answer first
    self.md5: str | None = None
    self.ignores_if_range = False
    self.hides_length = False

  def handle_error(self, request, client_address):
    """A client that hangs up is part of the tests."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
  server: BlobStore

  def log_message(self, *_):
    pass

  def do_GET(self):
    server = self.server
    asked = self.headers.get("Range")
    server.requests.append((self.path, asked))
    if server.statuses:
      self.send_error(server.statuses.pop(0))
      return
    content = server.files.get(self.path.lstrip("/"))
    if content is None:
      self.send_error(404)
      return
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    if start and self.headers.get("If-Range") != etag and not server.ignores_if_range:
      start = 0
    if start and start >= len(content):
      self.send_error(416)
      return
    self.send_response(206 if start else 200)
    if start:
      self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    if not server.hides_length:
      self.send_header("Content-Length", str(len(content) - start))
    self.send_header("ETag", etag)
    md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
    self.send_header("Content-MD5", server.md5 or md5)
    self.end_headers()
    body = content[start:]
    self.wfile.write(body[: server.cut_after.pop(0)] if server.cut_after else body)
