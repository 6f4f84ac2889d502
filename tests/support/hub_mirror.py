"""A hub on loopback that huggingface_hub's real client talks to; its fields make it misbehave."""

import hashlib
import http.server
import json
import pathlib
import sys

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Mirror(http.server.ThreadingHTTPServer):
  """Serves folders as models, `models[NAME] = folder`, whatever the commit; `commit` is branch main's."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.models: dict[str, pathlib.Path] = {}
    self.commit = COMMIT
    self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
    self.status = 0  # of every answer, if set
    self.token = ""  # without which nothing is given
    self.cut_after: list[int] = []  # bytes after which each next large file breaks off
    self.spoilt = False  # large files come with one byte changed

  def handle_error(self, request, client_address):
    """A client that hangs up is part of the tests."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"

  def fetched(self) -> list[str]:
    """Names of the files whose contents were asked for, in order."""
    return [
      path.rpartition("/")[2]
      for method, path, _ in self.requests
      if method == "GET" and "/resolve/" in path
    ]


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Mirror
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self._answer(with_body=False)

  def do_GET(self):
    self._answer(with_body=True)

  def _answer(self, with_body: bool) -> None:
    server, path = self.server, self.path.partition("?")[0].strip("/")
    server.requests.append((self.command, path, self.headers.get("Range")))
    if server.status:
      return self._refuse(server.status, "")
    if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
      return self._refuse(401, "RepoNotFound")
    api = path.startswith("api/models/")
    owner, name, *rest = path.removeprefix("api/models/").split("/")
    folder = server.models.get(f"{owner}/{name}")
    if folder is None:
      return self._refuse(401, "RepoNotFound")  # so that nobody learns which private ones exist
    kind, revision, *file = rest or ("revision", "main")
    if revision != "main" and len(revision) != len(COMMIT):
      return self._refuse(404, "RevisionNotFound")
    if api:
      names = sorted(entry.name for entry in folder.iterdir())
      if kind == "tree":
        return self._send(json.dumps([_entry(folder / name) for name in names]).encode())
      siblings = [{"rfilename": name} for name in names]
      commit = server.commit if revision == "main" else revision
      info = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
      return self._send(json.dumps(info).encode())
    target = folder / "/".join(file)
    if not target.is_file():
      return self._refuse(404, "EntryNotFound")
    self._send_file(target, server.commit if revision == "main" else revision, with_body)

  def _refuse(self, status: int, code: str) -> None:
    self.send_response(status)
    self.send_header("X-Error-Code", code)
    self.send_header("Content-Length", "0")
    self.end_headers()

  def _send(self, body: bytes) -> None:
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _send_file(self, target: pathlib.Path, commit: str, with_body: bool) -> None:
    content, entry = target.read_bytes(), _entry(target)
    start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
    body = content[start:]
    self.send_response(206 if start else 200)
    if start:
      self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    self.send_header("Accept-Ranges", "bytes")
    self.send_header("Content-Length", str(len(body)))
    self.send_header("ETag", f'"{entry.get("lfs", entry)["oid"]}"')
    self.send_header("X-Repo-Commit", commit)
    if with_body and "lfs" in entry and self.server.cut_after:
      self.send_header("Connection", "close")
      self.end_headers()
      self.wfile.write(body[: self.server.cut_after.pop(0)])
      self.close_connection = True
      return
    self.end_headers()
    if with_body:
      if "lfs" in entry and self.server.spoilt:
        body = body[:-1] + bytes([body[-1] ^ 1])
      self.wfile.write(body)


def _entry(path: pathlib.Path) -> dict:
  """The hub's description of a file: git's digest, and for weights the SHA-256 of its contents."""
  content = path.read_bytes()
  git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
  entry = {"type": "file", "path": path.name, "size": len(content), "oid": git}
  if path.suffix in (".safetensors", ".bin"):
    sha256 = hashlib.sha256(content).hexdigest()
    entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
  return entry
