"""The web server: a page, a list of models, and completions as a stream of JSON lines.

  GET /          the page, its scripts and style, /examples/NAME: no other file can be reached
  GET /models    what to choose from, the limits, and how many programs are compiled
  POST /look?model=0      an image's bytes in; out, as the model sees it: {"picture": base64 of uint8 [R, R, 3]}
  POST /complete?model=0&keep=0.5&n=4&temperature=1&seed=0     an image's bytes in; lines out:
    {"event": "waiting", "ahead": 2}
    {"event": "preparing"}
    {"event": "given", "resolution": R, "picture": …, "known": base64 of uint8 [R, R], 1 where given}
    {"event": "drawn", "first": 8, "pixels": base64 of uint8 [n, rows, R, 3],
     "settled": base64 of uint8 [n, rows, R], 1 where drawn, "done": 1, "of": 8}   … row by row
    {"event": "done", "nats_per_token": [n numbers]}      or {"event": "error", "message": "…"}

Optional are &top_k=0&top_p=1. A BERT model takes &hidden=…&passes=16 instead of keep: R × R bits in URL-safe
base64, 1 where a pixel is to be drawn; it draws pass by pass.

One thread draws; requests queue for it. Leaving the page leaves the queue. All programs are compiled
once, from the start on, in between requests.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import functools
import importlib.resources
import importlib.util
import json
import logging
import math
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import numpy as np

from igpt_jax import extras
from igpt_jax.data.image_decoding import BadRecord
from igpt_jax.demo.limits import Full, Limits, Line
from igpt_jax.demo.models import Models
from igpt_jax.demo.request import (
  MAX_TEMPERATURE,
  CompletionRequest,
  Refused,
  check_origin,
  number,
)
from igpt_jax.errors import UserError
from igpt_jax.sampling.completer import InputImage, PartialSamples

# examples/README.md says where they are from, and under which licences.
_EXAMPLES = {
  "astronaut.jpg": "an astronaut",
  "cat.jpg": "a cat",
  "coffee.jpg": "a cup of coffee",
  "camera.jpg": "a man with a camera",
  "rocket.jpg": "a rocket",
  "three.jpg": "the digit three",
}
_PAGE = {
  "/": ("page.html", "text/html"),
  "/page.js": ("page.js", "text/javascript"),
  "/preview.js": ("preview.js", "text/javascript"),
  "/page.css": ("page.css", "text/css"),
  **{f"/examples/{name}": (f"examples/{name}", "image/jpeg") for name in _EXAMPLES},
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
_MAX_CONNECTIONS = 64

_log = logging.getLogger(__name__)


def check_installed() -> None:
  """Raises UserError if the extra `demo` isn't installed."""
  if not all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn")):
    raise UserError(f"the page needs starlette and uvicorn; fix: {extras.install('demo')}")


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

  class Server(uvicorn.Server):
    async def startup(self, sockets=None):
      await super().startup(sockets)
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
  Server(config).run(sockets=[sock])


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
    content = files.joinpath(*name.split("/")).read_bytes()

    async def send(request):
      return Response(content, media_type=kind, headers=_HEADERS)

    return Route(path, send, methods=["GET"])

  async def describe(request):
    return JSONResponse(service.describe(), headers=_HEADERS)

  async def answer(make, request):
    try:
      return await make(request)
    except Refused as refused:
      return JSONResponse({"message": str(refused)}, refused.status, headers=_HEADERS)

  async def look(request):
    return JSONResponse(await service.look(request), headers=_HEADERS)

  async def complete(request):
    events = await service.accept(request)
    return StreamingResponse(events, media_type="application/x-ndjson", headers=_HEADERS)

  @contextlib.asynccontextmanager
  async def lifespan(app):
    compiling = asyncio.create_task(service.compile())
    yield
    compiling.cancel()
    service.close()

  routes = [file_route(path, *file) for path, file in _PAGE.items()]
  routes += [Route("/models", describe)]
  for path, make in (("/look", look), ("/complete", complete)):
    routes.append(Route(path, functools.partial(answer, make), methods=["POST"]))
  middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)]
  return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)


class _Service:
  """Turns requests into streams of events."""

  def __init__(self, models: Models, limits: Limits):
    self._models, self._limits = models, limits
    self._line, self._looking = Line(limits.waiting), Line(limits.waiting)
    # Images are read by a thread of their own: what the model sees is shown while it draws, too.
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "igpt_jax.demo")
    self._reading = concurrent.futures.ThreadPoolExecutor(1, "igpt_jax.demo.reading")
    self._drawing = asyncio.Lock()  # held while a request is drawn, or a program compiled
    self._programs = models.programs(limits.samples)
    self._compiled = 0

  def close(self) -> None:
    for executor in (self._worker, self._reading):
      executor.shutdown(wait=False, cancel_futures=True)

  def describe(self) -> dict[str, Any]:
    return {
      "models": self._models.describe(),
      "examples": [{"name": name, "title": title} for name, title in _EXAMPLES.items()],
      "samples": self._limits.samples,
      "upload_bytes": self._limits.upload_bytes,
      "temperature": MAX_TEMPERATURE,
      "programs": len(self._programs),
      "compiled": self._compiled,
    }

  async def compile(self) -> None:
    """Compiles all programs, one after the other; requests are served in between."""
    began = time.monotonic()
    for index, samples in self._programs:
      what = f"{self._models.name(index)}, {samples} sample{'s' * (samples > 1)} at a time"
      print(f"compiling {self._compiled + 1} of {len(self._programs)}: {what}", flush=True)
      try:
        async with self._drawing:
          await self._call(self._models.compile, index, samples)
      except UserError as error:
        print(f"{self._models.name(index)}: {error}", file=sys.stderr, flush=True)
      except Exception:
        _log.exception("a program can't be compiled: %s", what)
      self._compiled += 1
    print(f"done compiling ({time.monotonic() - began:.1f} s)", flush=True)

  async def look(self, request) -> dict[str, Any]:
    """Receives an image and returns it as a model sees it.

    Raises:
      Refused: the request is invalid, the image can't be read, or too many wait for theirs.
    """
    check_origin(request)
    index = number(request.query_params, "model", int, 0, len(self._models) - 1)
    data = await self._receive(request, self._looking)
    try:
      image = await self._read(index, data)
    except BadRecord as error:
      raise Refused(400, str(error)) from None
    finally:
      self._looking.give_back_place()
    return {"picture": _base64(self._models.reader(index).paint(image.tokens[None]))}

  async def accept(self, request) -> AsyncIterator[bytes]:
    """Checks a request and receives its image; returns the lines of the response.

    Raises:
      Refused: the request is invalid, or the queue is full.
    """
    check_origin(request)
    wanted = CompletionRequest(request.query_params, self._models, self._limits.samples)
    data = await self._receive(request, self._line)
    lines = self._lines(wanted, data)
    # Started here, so that it gives the place back even if the response is never sent.
    return _with_first(await anext(lines), lines)

  async def _receive(self, request, line: Line) -> bytes:
    """Takes a place in a line and receives an image, or gives the place back.

    Raises:
      Refused: there is no place, or no image that may be received.
    """
    try:
      line.take_place()
    except Full:
      raise Refused(
        503, f"{self._limits.waiting + 1} people are in line already; try again in a minute"
      ) from None
    try:
      return await self._upload(request)
    except BaseException:
      line.give_back_place()
      raise

  async def _upload(self, request) -> bytes:
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

  async def _lines(self, wanted: CompletionRequest, data: bytes) -> AsyncIterator[bytes]:
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
    self, wanted: CompletionRequest, data: bytes
  ) -> AsyncGenerator[dict[str, Any], None]:
    yield {"event": "preparing"}
    image, reader = await self._read(wanted.model, data), self._models.reader(wanted.model)
    picture = _base64(reader.paint(image.tokens[None]))
    known, side = wanted.known, reader.resolution
    yield {"event": "given", "resolution": side, "picture": picture, "known": _base64(known)}
    settled, deadline = np.broadcast_to(known, (wanted.n, side, side)), math.inf
    async with self._drawing, contextlib.aclosing(self._drawn(wanted, image)) as results:
      async for done, drawn in results:
        before = settled
        settled = reader.spec.whole_pixels(drawn.settled).reshape(settled.shape)
        changed = np.flatnonzero((settled & ~before).any((0, 2)))
        first, rows = int(changed[0]), slice(changed[0], changed[-1] + 1)
        pixels = _base64(reader.paint(drawn.tokens)[:, rows])
        yield {
          "event": "drawn", "first": first, "pixels": pixels, "settled": _base64(settled[:, rows]),
          "done": done, "of": wanted.steps,
        }  # fmt: skip
        if deadline == math.inf:  # compiling is done
          deadline = time.monotonic() + self._limits.seconds
        if settled.all():
          nats = drawn.nll[:, reader.spec.of_pixels(~known)].mean(1)
          yield {"event": "done", "nats_per_token": [round(float(value), 4) for value in nats]}
        elif time.monotonic() > deadline:
          raise Refused(
            503,
            f"drawing took longer than {self._limits.seconds:.3g} s and was stopped; fewer samples, or "
            "a smaller model, are faster",
          )

  async def _drawn(
    self, wanted: CompletionRequest, image: InputImage
  ) -> AsyncGenerator[tuple[int, PartialSamples], None]:
    """Yields the samples after every row or pass, and the number of these."""
    start = functools.partial(
      self._models.draw, wanted.model, image, wanted.n, wanted.known, wanted.sampling,
      seed=wanted.seed, passes=wanted.passes,
    )  # fmt: skip
    growing = await self._call(start)
    try:
      done = 0
      while (drawn := await self._call(next, growing, None)) is not None:
        done += 1
        yield done, drawn
    finally:
      # In the worker, which may still be running the generator.
      with contextlib.suppress(RuntimeError):  # the server is ending
        self._worker.submit(growing.close)

  async def _read(self, index: int, data: bytes) -> InputImage:
    read = self._models.reader(index).read
    return await asyncio.get_running_loop().run_in_executor(self._reading, read, data, "this file")

  async def _call(self, function, *args):
    """Calls a function in the worker thread."""
    return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)


async def _with_first(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
  yield first
  async for line in rest:
    yield line


def _base64(array: np.ndarray) -> str:
  return base64.b64encode(array.astype(np.uint8).tobytes()).decode()


def _line(**event) -> bytes:
  return json.dumps(event).encode() + b"\n"
