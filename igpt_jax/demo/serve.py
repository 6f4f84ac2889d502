"""The web server: three files, a list of models, and completions as a stream of JSON lines.

  GET /          the page (and /page.js, /page.css: no other file can be reached)
  GET /models    what to choose from, and the limits
  POST /complete?model=0&keep=0.5&n=4&temperature=1&seed=0     an image's bytes in; lines out:
    {"event": "waiting", "ahead": 2}
    {"event": "preparing"}
    {"event": "given", "resolution": R, "rows_given": 8, "picture": base64 of uint8 [R, R, 3]}
    {"event": "rows", "first": 8, "pixels": base64 of uint8 [n, rows, R, 3]}   … until the last row
    {"event": "done", "nats_per_token": [n numbers]}      or {"event": "error", "message": "…"}

One thread draws; requests queue for it. Leaving the page leaves the queue.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import importlib.resources
import importlib.util
import json
import logging
import math
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from igpt_jax.data.image_decoding import BadRecord
from igpt_jax.data.order import MAX_SEED
from igpt_jax.demo.limits import Full, Limits, Line
from igpt_jax.demo.models import Models
from igpt_jax.errors import UserError
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.sampling.completer import InputImage, prompt_rows

_PAGE = {
  "/": ("page.html", "text/html"),
  "/page.js": ("page.js", "text/javascript"),
  "/page.css": ("page.css", "text/css"),
}
_HEADERS = {
  "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
  "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
  "frame-ancestors 'none'",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-store",
}
_LOOPBACK = ("127.0.0.1", "localhost")
_MAX_TEMPERATURE = 2.0
_MAX_CONNECTIONS = 64

_log = logging.getLogger(__name__)


class Refused(Exception):
  """A request that isn't served, with its HTTP status and a message for the person."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def check_installed() -> None:
  """Raises UserError if the extra `demo` isn't installed."""
  if not all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn")):
    raise UserError("the page needs starlette and uvicorn; fix: pip install 'igpt_jax[demo]'")


def bind(host: str, port: int) -> socket.socket:
  """Binds a socket, before anything that takes long.

  Raises:
    UserError: the address is in use, or isn't this machine's.
  """
  if not 0 <= port < 65536:
    raise UserError(f"--port: {port}; expected 0 to 65535")
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
  except OSError as error:
    raise UserError(
      f"--host, --port: can't bind to {host}:{port} ({error.strerror}); fix: another --port"
    ) from None
  return sock


def run(models: Models, limits: Limits, sock: socket.socket) -> None:
  """Serves until interrupted."""
  import uvicorn

  host, port = sock.getsockname()[:2]
  only_here = host in _LOOPBACK
  print(f"open http://{host}:{port} in a browser (Ctrl-C ends it)", flush=True)
  if not only_here:
    print("whoever reaches this machine can use it: there is no password", flush=True)
  app = make_app(models, limits, hosts=_LOOPBACK if only_here else ("*",))
  config = uvicorn.Config(
    app,
    log_level="warning",
    server_header=False,
    limit_concurrency=_MAX_CONNECTIONS,
    timeout_keep_alive=5,
    timeout_graceful_shutdown=2,
  )
  uvicorn.Server(config).run(sockets=[sock])


def make_app(models: Models, limits: Limits, hosts: tuple[str, ...] = ("*",)):
  """The ASGI application.

  Args:
    models: the models to offer.
    limits: limits of each request.
    hosts: allowed Host headers. On loopback only its own names, against DNS rebinding.
  """
  from starlette.applications import Starlette
  from starlette.middleware import Middleware
  from starlette.middleware.trustedhost import TrustedHostMiddleware
  from starlette.responses import JSONResponse, Response, StreamingResponse
  from starlette.routing import Route

  service = _Service(models, limits)
  files = importlib.resources.files("igpt_jax.demo")

  def file_route(path: str, name: str, kind: str) -> Route:
    content = files.joinpath(name).read_bytes()

    async def send(request):
      return Response(content, media_type=kind, headers=_HEADERS)

    return Route(path, send, methods=["GET"])

  async def describe(request):
    return JSONResponse(service.describe(), headers=_HEADERS)

  async def complete(request):
    try:
      events = await service.accept(request)
    except Refused as refused:
      return JSONResponse({"message": str(refused)}, refused.status, headers=_HEADERS)
    return StreamingResponse(events, media_type="application/x-ndjson", headers=_HEADERS)

  @contextlib.asynccontextmanager
  async def lifespan(app):
    yield
    service.close()

  routes = [file_route(path, *file) for path, file in _PAGE.items()]
  routes += [Route("/models", describe), Route("/complete", complete, methods=["POST"])]
  middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)]
  return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)


class _Service:
  """Turns requests into streams of events."""

  def __init__(self, models: Models, limits: Limits):
    self._models, self._limits = models, limits
    self._line = Line(limits.waiting)
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "igpt_jax.demo")

  def close(self) -> None:
    self._worker.shutdown(wait=False, cancel_futures=True)

  def describe(self) -> dict[str, Any]:
    return {
      "models": self._models.describe(),
      "samples": self._limits.samples,
      "upload_bytes": self._limits.upload_bytes,
      "temperature": _MAX_TEMPERATURE,
    }

  async def accept(self, request) -> AsyncIterator[bytes]:
    """Checks a request and receives its image; returns the lines of the response.

    Raises:
      Refused: the request is invalid, or the queue is full.
    """
    origin = request.headers.get("origin")
    if origin and urlsplit(origin).netloc != request.headers.get("host"):
      raise Refused(403, "another site's page may not ask for completions")
    wanted = _CompletionRequest(request.query_params, len(self._models), self._limits.samples)
    try:
      self._line.take_place()
    except Full:
      raise Refused(
        503, f"{self._limits.waiting + 1} people are in line already; try again in a minute"
      ) from None
    try:
      data = await self._receive(request)
    except BaseException:
      self._line.give_back_place()
      raise
    lines = self._lines(wanted, data)
    # Started here, so that it gives the place back even if the response is never sent.
    return _with_first(await anext(lines), lines)

  async def _receive(self, request) -> bytes:
    most = self._limits.upload_bytes
    too_large = Refused(413, f"the file is too large; at most {most / 2**20:.3g} MB can be sent")
    if int(request.headers.get("content-length", 0)) > most:
      raise too_large
    data = bytearray()
    try:
      async with asyncio.timeout(self._limits.upload_seconds):
        async for chunk in request.stream():
          data += chunk
          if len(data) > most:
            raise too_large
    except TimeoutError:
      raise Refused(408, "the image took too long to arrive") from None
    if not data:
      raise Refused(400, "no image came along; choose one first")
    return bytes(data)

  async def _lines(self, wanted: "_CompletionRequest", data: bytes) -> AsyncIterator[bytes]:
    """Yields events as lines; the last one is always "done" or "error"."""
    me = object()
    try:
      async for ahead in self._line.turn(me):
        if ahead:
          yield _line(event="waiting", ahead=ahead)
      async with contextlib.aclosing(self._events(wanted, data)) as events:
        async for event in events:
          yield _line(**event)
    except (Refused, UserError, BadRecord) as error:
      yield _line(event="error", message=str(error))
    except Exception:
      _log.exception("a completion failed")
      yield _line(event="error", message="something went wrong here; the server's log says what")
    finally:
      self._line.leave(me)
      self._line.give_back_place()

  async def _events(
    self, wanted: "_CompletionRequest", data: bytes
  ) -> AsyncGenerator[dict[str, Any], None]:
    yield {"event": "preparing"}
    completer = await self._call(self._models.completer, wanted.model)
    reader = completer.reader
    image: InputImage = await self._call(reader.read, data, "this file")
    side = reader.resolution
    rows = prompt_rows(wanted.keep, side)
    whole = reader.paint(image.tokens[None])
    yield {"event": "given", "resolution": side, "rows_given": rows, "picture": _base64(whole)}
    growing = completer.draw(
      [image], range(wanted.n), rows, wanted.sampling, seed=wanted.seed, rows_at_a_time=1
    )
    first, deadline = rows, math.inf
    try:
      while (drawn := await self._call(next, growing, None)) is not None:
        until = drawn.position // side
        pixels = reader.paint(drawn.tokens)[:, first:until]
        yield {"event": "rows", "first": first, "pixels": _base64(pixels)}
        first = until
        if deadline == math.inf:  # compiling is done
          deadline = time.monotonic() + self._limits.seconds
        if until == side:
          nats = drawn.nll[:, rows * side :].mean(1)
          yield {"event": "done", "nats_per_token": [round(float(value), 4) for value in nats]}
        elif time.monotonic() > deadline:
          raise Refused(
            503,
            f"drawing took longer than {self._limits.seconds:.3g} s and was stopped; fewer samples, or "
            "a smaller model, are faster",
          )
    finally:
      # In the worker, which may still be running the generator.
      with contextlib.suppress(RuntimeError):  # the server is ending
        self._worker.submit(growing.close)

  async def _call(self, function, *args):
    """Calls a function in the worker thread."""
    return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)


class _CompletionRequest:
  """Parameters of a completion. Raises Refused if one is invalid."""

  def __init__(self, query, n_models: int, most_samples: int):
    def number(name: str, kind, least, most):
      try:
        value = kind(query[name])
      except (KeyError, ValueError):
        raise Refused(400, f"{name}: {query.get(name)!r}; expected a number") from None
      if not least <= value <= most:
        raise Refused(400, f"{name}: {value}; expected {least} to {most}")
      return value

    self.model: int = number("model", int, 0, n_models - 1)
    self.keep: float = number("keep", float, 0, 1)
    if not 0 < self.keep < 1:
      raise Refused(400, f"keep: {self.keep}; expected a share of the rows within (0, 1)")
    self.n: int = number("n", int, 1, most_samples)
    self.seed: int = number("seed", int, 0, MAX_SEED)
    temperature = number("temperature", float, 0, _MAX_TEMPERATURE)
    try:
      SamplingConfig(temperature)
    except UserError as error:
      raise Refused(400, str(error)) from None
    # Rounded, as each temperature compiles a program; only 0 itself is greedy.
    self.sampling = SamplingConfig(max(round(temperature, 1), 0.1) if temperature else 0.0)


async def _with_first(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
  yield first
  async for line in rest:
    yield line


def _base64(array) -> str:
  return base64.b64encode(array.tobytes()).decode()


def _line(**event) -> bytes:
  return json.dumps(event).encode() + b"\n"
