"""The demo's server, in a thread of this process, for tests of it and of its page."""

import contextlib
import dataclasses
import importlib.util
import pathlib
import threading
import time

import pytest

from igpt_jax.demo import models, serve
from igpt_jax.demo.limits import Limits
from igpt_jax.sampling import completer as completer_lib
from support import own_checkpoint
from support.tiny import mesh_of


@dataclasses.dataclass
class Running:
  """A server that runs: its port, what it does the work with, and where its checkpoint lies."""

  port: int
  service: serve._Service
  folder: pathlib.Path

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.port}"


def need_extra() -> None:
  """Skips where starlette and uvicorn aren't there."""
  for name in ("starlette", "uvicorn"):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f"the page is NOT tested: no {name}; fix: pip install -e '.[demo]'")


@contextlib.contextmanager
def running(folder, limits: Limits, resolution: int = 4, names=("small",)):
  """A server with random weights, on a free port, all programs compiled; a model named "bert" is one."""
  import uvicorn

  paths = [
    own_checkpoint.write(
      folder / name, resolution=resolution + 2 * i, seed=i, causal=name != "bert"
    )
    for i, name in enumerate(names)
  ]
  made = []
  with pytest.MonkeyPatch.context() as patch:
    service_class = serve._Service
    patch.setattr(serve, "_Service", lambda *args: made.append(service_class(*args)) or made[0])
    app = serve.make_app(models.Models(paths, mesh=mesh_of()), limits, hosts=("127.0.0.1",))
  sock = serve.bind("127.0.0.1", 0)
  server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
  thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
  thread.start()
  while not server.started or made[0].describe()["compiled"] < made[0].describe()["programs"]:
    time.sleep(0.01)
  yield Running(sock.getsockname()[1], made[0], folder)
  server.should_exit = True
  thread.join(10)
  sock.close()


class Slow:
  """Makes every row take longer.

  Attributes:
    begun: set once the first row is there.
    finished: images that were drawn to their end.
  """

  def __init__(self, monkeypatch, seconds: float):
    self.begun, self.finished = threading.Event(), 0
    draw = completer_lib.Completer.draw

    def slow(completer, *args, **kwargs):
      for drawn in draw(completer, *args, **kwargs):
        self.begun.set()
        time.sleep(seconds)
        yield drawn
      self.finished += 1

    monkeypatch.setattr(completer_lib.Completer, "draw", slow)
