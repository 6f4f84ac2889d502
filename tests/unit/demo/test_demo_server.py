"""The page's server without a browser: what it refuses, who waits, what it never gives away."""

import asyncio
import base64
import http.client
import importlib.util
import io
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from igpt_jax.demo import __main__ as command
from igpt_jax.demo import serve
from igpt_jax.demo.limits import Full, Limits, Line
from igpt_jax.errors import UserError
from support import demo_server, own_checkpoint
from support.paths import ROOT
from support.tiny import compilations

QUERY = "/complete?model=0&keep=0.5&n=2&temperature=1&seed=3"

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  demo_server.need_extra()
  with demo_server.running(
    tmp_path_factory.mktemp("demo"), Limits(samples=4, waiting=1), names=("small", "bert")
  ) as server:
    yield server


def picture(side=12, seed=0) -> bytes:
  buffer = io.BytesIO()
  pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
  Image.fromarray(pixels).save(buffer, format="PNG")
  return buffer.getvalue()


def ask(server, path=QUERY, body=None, method="POST", **headers):
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
  names = {name.replace("_", "-"): value for name, value in headers.items()}
  connection.request(method, path, picture() if body is None else body, names)
  return connection.getresponse()


def message(response) -> str:
  return json.loads(response.read())["message"]


def events(response) -> list[dict]:
  return [json.loads(line) for line in response.read().splitlines()]


def free_again(server) -> bool:
  """Whether, in a while, all have left."""
  for _ in range(200):
    if not server.service._line._places and not server.service._line._queue:
      return True
    time.sleep(0.05)
  return False


def pixels_of(text, *shape) -> np.ndarray:
  return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


def test_rows_come_one_by_one_and_are_the_seeds(server):
  first = events(ask(server))
  assert [each["event"] for each in first] == ["preparing", "given", "drawn", "drawn", "done"]
  assert first[1]["resolution"] == 4
  np.testing.assert_array_equal(pixels_of(first[1]["known"], 4, 4)[:, 0], [1, 1, 0, 0])
  assert [(each["first"], each["done"], each["of"]) for each in first[2:4]] == [
    (2, 1, 2),
    (3, 2, 2),
  ]
  assert pixels_of(first[2]["settled"], 2, 1, 4).all()
  assert len(first[-1]["nats_per_token"]) == 2
  assert events(ask(server)) == first
  other = events(ask(server, QUERY.replace("seed=3", "seed=4")))
  assert other[1] == first[1] and other[2:] != first[2:]
  assert free_again(server)


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    (("keep=0.5", "keep=0"), "keep: 0.0; expected a share"),
    (("keep=0.5", "keep=1"), "keep: 1.0; expected a share"),
    (("keep=0.5", "keep=nan"), "keep: nan"),
    (("n=2", "n=0"), "n: 0; expected 1 to 4"),
    (("n=2", "n=5"), "n: 5; expected 1 to 4"),
    (("n=2", "n=two"), "n: 'two'; expected a number"),
    (("model=0", "model=2"), "model: 2; expected 0 to 1"),
    (("temperature=1", "temperature=-1"), "temperature: -1.0"),
    (("temperature=1", "temperature=inf"), "temperature: inf"),
    (("temperature=1", "temperature=nan"), "temperature: nan"),
    (("temperature=1", "temperature=1e-38"), "temperature: 1e-38; expected 0 (greedy), or"),
    (("seed=3", "seed=4294967296"), "seed: 4294967296; expected 0 to 4294967295"),
    (("seed=3", f"seed={'9' * 5_000}"), "expected a number"),
    (("seed=3", "seed=-1"), "seed: -1"),
    (("&seed=3", ""), "seed: None; expected a number"),
    (("&seed=3", "&seed=3&top_k=-1"), "top_k: -1; expected 0 to 65536"),
    (("&seed=3", "&seed=3&top_p=0"), "top_p: 0.0; expected a number from 1e-06"),
    (("&seed=3", "&seed=3&top_p=nan"), "top_p: nan"),
    (("&seed=3", "&seed=3&passes=0"), "passes: 0; expected 1 to 64"),
  ],
)
def test_settings_out_of_range_are_named(server, change, expected):
  response = ask(server, QUERY.replace(*change))
  assert response.status == 400 and expected in message(response)
  assert free_again(server)


def test_what_is_no_picture_is_told_on_the_page(server):
  assert message(ask(server, body=b"")) == "no image came along; choose one first"
  last = events(ask(server, body=b"no image"))[-1]
  assert last == {
    "event": "error",
    "message": "this file: unreadable image (cannot identify image)",
  }
  assert free_again(server)


def test_a_bomb_is_not_unfolded(server):
  buffer = io.BytesIO()
  Image.new("1", (12_000, 12_000)).save(buffer, format="PNG")
  assert len(buffer.getvalue()) < 100_000
  assert (
    "implausible size 12000×12000" in events(ask(server, body=buffer.getvalue()))[-1]["message"]
  )


def test_too_large_an_upload_is_refused_told_or_not(server):
  most = Limits().upload_bytes
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
  connection.putrequest("POST", QUERY)
  connection.putheader("Content-Length", str(most + 1))
  connection.endheaders()
  response = connection.getresponse()  # before anything is sent
  assert response.status == 413 and "at most 10 MB" in message(response)

  def chunks():
    for _ in range(most // 2**20 + 1):
      yield bytes(2**20)

  try:
    response = ask(server, body=chunks())
    assert response.status == 413
  except ConnectionError:
    pass  # hung up on while it was still sending
  assert free_again(server)


def test_only_the_pages_files_can_be_reached(server):
  examples = json.loads(ask(server, "/models", b"", "GET").read())["examples"]
  assert len(examples) == 6
  names = [f"/examples/{example['name']}" for example in examples]
  for path in ("/", "/page.js", "/preview.js", "/page.css", "/models", *names):
    response = ask(server, path, b"", "GET")
    assert response.status == 200, path
    assert "default-src 'none'" in response.getheader("Content-Security-Policy")
    assert str(server.folder).encode() not in response.read()
  for path in (
    "/page.html", "/serve.py", "/../serve.py", "/%2e%2e/serve.py", "/..%2f..%2fsetup.py",
    "/static/page.js", "//etc/passwd", "/docs", "/openapi.json",
    "/examples", "/examples/", "/examples/README.md",
  ):  # fmt: skip
    assert ask(server, path, b"", "GET").status == 404, path
  assert ask(server, QUERY, b"", "GET").status == 405


def test_the_page_asks_no_other_server():
  for name in ("page.html", "page.js", "preview.js", "page.css"):
    text = (ROOT / "igpt_jax" / "demo" / name).read_text(encoding="utf-8")
    assert "://" not in text, name


def test_an_image_is_shown_as_the_model_sees_it(server):
  response = ask(server, "/look?model=0")
  seen = pixels_of(json.loads(response.read())["picture"], 4, 4, 3)
  given = events(ask(server))[1]
  np.testing.assert_array_equal(seen, pixels_of(given["picture"], 4, 4, 3))
  response = ask(server, "/look?model=0", body=b"no image")
  assert response.status == 400
  assert message(response) == "this file: unreadable image (cannot identify image)"
  assert message(ask(server, "/look?model=7")) == "model: 7; expected 0 to 1"
  assert ask(server, "/look?model=0", Origin="http://evil.example").status == 403
  assert not server.service._looking._places


def test_every_example_can_be_read_and_is_small(server):
  for example in json.loads(ask(server, "/models", b"", "GET").read())["examples"]:
    image = ask(server, f"/examples/{example['name']}", b"", "GET").read()
    assert len(image) <= 40_000 and example["title"]
    assert ask(server, "/look?model=0", body=image).status == 200


def test_what_is_asked_for_changes_no_program(server):
  """All are compiled before anyone asks."""
  with compilations() as found:
    for n, keep, way in itertools.product(
      (1, 4), (0.25, 0.75), ("temperature=0", "temperature=0.37&top_k=3", "temperature=1&top_p=0.7")
    ):
      asked = f"/complete?model=0&keep={keep}&n={n}&{way}&seed=5"
      assert events(ask(server, asked))[-1]["event"] == "done"
  assert not found


def test_a_bert_model_fills_any_region(server):
  hidden = np.zeros((6, 6), bool)
  hidden[1:3, 2:5] = True
  bits = base64.urlsafe_b64encode(np.packbits(hidden)).decode()
  asked = f"/complete?model=1&hidden={bits}&n=3&temperature=1&seed=3&passes=4"
  with compilations() as compiled:
    found = events(ask(server, asked))
    assert events(ask(server, asked.replace("passes=4", "passes=2")))[-1]["event"] == "done"
  assert not compiled
  assert [each["event"] for each in found] == ["preparing", "given", *["drawn"] * 4, "done"]
  np.testing.assert_array_equal(pixels_of(found[1]["known"], 6, 6), ~hidden)
  assert [(each["done"], each["of"]) for each in found[2:-1]] == [(i, 4) for i in range(1, 5)]
  images = np.tile(pixels_of(found[1]["picture"], 6, 6, 3), (3, 1, 1, 1))
  given = images.copy()
  settled = np.tile(~hidden, (3, 1, 1))
  for each in found[2:-1]:
    rows = slice(each["first"], each["first"] + len(base64.b64decode(each["settled"])) // 18)
    settled[:, rows] = pixels_of(each["settled"], 3, -1, 6)
    images[:, rows] = pixels_of(each["pixels"], 3, -1, 6, 3)
  assert settled.all()
  np.testing.assert_array_equal(images[:, ~hidden], given[:, ~hidden])
  assert (images != given).any() and len(found[-1]["nats_per_token"]) == 3


@pytest.mark.parametrize(
  ("hidden", "expected"),
  [
    ("", "hidden: ''; expected 6×6 bits in URL-safe base64"),
    ("AAAA", "hidden: 'AAAA'; expected 6×6 bits"),
    ("!!!!", "hidden: '!!!!'; expected 6×6 bits"),
    ("AAAAAAA=", "hidden: no pixel; expected one or more"),
    ("A" * 5_000, "expected 6×6 bits"),
  ],
)
def test_a_mask_that_is_none_is_refused(server, hidden, expected):
  response = ask(server, f"/complete?model=1&n=1&temperature=1&seed=3&hidden={hidden}")
  assert response.status == 400 and expected in message(response)
  assert free_again(server)


def test_other_sites_are_refused(server):
  response = ask(server, Origin="http://evil.example")
  assert response.status == 403
  assert ask(server, Origin=f"http://127.0.0.1:{server.port}").status == 200
  assert ask(server, "/", b"", "GET", Host="evil.example").status == 400


def test_who_comes_second_waits_and_a_third_is_told(server, monkeypatch):
  slow, first = demo_server.Slow(monkeypatch, seconds=0.4), []
  person = threading.Thread(target=lambda: first.extend(events(ask(server))))
  person.start()
  assert slow.begun.wait(20)
  second = ask(server)
  assert json.loads(second.readline()) == {"event": "waiting", "ahead": 1}
  third = ask(server)
  assert third.status == 503 and "2 people are in line already" in message(third)
  assert events(second)[-1]["event"] == "done"
  person.join(30)
  assert first[-1]["event"] == "done"
  assert free_again(server)


def test_who_leaves_makes_room(server, monkeypatch):
  slow = demo_server.Slow(monkeypatch, seconds=1)
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
  connection.request("POST", QUERY, picture())
  served = connection.getresponse()
  assert slow.begun.wait(20)
  waiting = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
  waiting.request("POST", QUERY, picture())
  line = waiting.getresponse()
  assert json.loads(line.readline()) == {"event": "waiting", "ahead": 1}
  for connected, response in ((waiting, line), (connection, served)):
    response.close()
    connected.close()
  assert free_again(server)
  assert events(ask(server, QUERY.replace("n=2", "n=1")))[-1]["event"] == "done"
  assert slow.finished == 1  # the last one


def test_time_is_limited(server, monkeypatch):
  demo_server.Slow(monkeypatch, seconds=0.05)
  monkeypatch.setattr(server.service, "_limits", Limits(samples=4, waiting=1, seconds=0.001))
  last = events(ask(server, QUERY.replace("keep=0.5", "keep=0.25")))[-1]
  assert last["event"] == "error" and "took longer than 0.001 s" in last["message"]
  assert free_again(server)


def test_an_upload_that_never_comes_is_given_up(server, monkeypatch):
  monkeypatch.setattr(server.service, "_limits", Limits(samples=4, waiting=1, upload_seconds=0.2))
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
  connection.putrequest("POST", QUERY)
  connection.putheader("Content-Length", "1000")
  connection.endheaders()
  connection.send(b"a few")
  assert connection.getresponse().status == 408
  assert free_again(server)


def test_a_mistake_of_ours_is_told_and_the_next_is_served(server, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(server.service._models, "draw", None)
    last = events(ask(server))[-1]
  assert last == {
    "event": "error",
    "message": "something went wrong here; the server's log says what",
  }
  assert events(ask(server))[-1]["event"] == "done"


# --- the line --------------------------------------------------------------------------------------


def test_a_line_is_served_in_order():
  async def scenario():
    line, order = Line(waiting=2), []

    async def person(name, work):
      line.take_place()
      try:
        async for ahead in line.turn(name):
          order.append((name, ahead))
        await asyncio.sleep(work)
      finally:
        line.leave(name)
        line.give_back_place()

    people = [asyncio.create_task(person(name, 0.05)) for name in "abc"]
    await asyncio.sleep(0.01)
    with pytest.raises(Full):
      line.take_place()
    people[1].cancel()  # b, who waits
    await asyncio.gather(*people, return_exceptions=True)
    line.take_place()
    return order

  assert asyncio.run(scenario()) == [("a", 0), ("b", 1), ("c", 2), ("c", 1), ("c", 0)]


# --- the command -----------------------------------------------------------------------------------


def test_mistakes_of_the_command(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(serve, "check_installed", lambda: None)
  assert command.main([f"--checkpoint={tmp_path}", "--port=0"]) == 2
  assert "holds nothing; expected" in capsys.readouterr().err
  assert command.main(["--checkpoint=x", "--port=70000"]) == 2
  assert "--port: 70000" in capsys.readouterr().err
  assert command.main(["--checkpoint=x", "--samples=0"]) == 2
  assert "samples: 0; expected 1 or more" in capsys.readouterr().err
  with serve.bind("127.0.0.1", 0) as taken:
    taken.listen()
    assert command.main(["--checkpoint=x", f"--port={taken.getsockname()[1]}"]) == 2
  assert "can't bind to 127.0.0.1" in capsys.readouterr().err


def test_without_the_extra_it_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e '.*\[demo\]'"):
    serve.check_installed()


def test_it_listens_before_it_says_so_and_ends_when_told(tmp_path):
  demo_server.need_extra()
  path = own_checkpoint.write(tmp_path / "small")
  command = [sys.executable, "-m", "igpt_jax.demo", f"--checkpoint={path}", "--port=0"]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    try:
      lines = []
      while not lines or not lines[-1].startswith("open "):
        lines.append(process.stdout.readline())
        assert lines[-1], lines  # it hasn't ended
      with urllib.request.urlopen(lines[-1].split()[1] + "/models", timeout=60) as response:
        assert json.load(response)["programs"] == 3
      process.send_signal(signal.SIGINT)
      rest = process.stdout.read()
      assert process.wait(120) == 130
    finally:
      process.kill()
  assert "compiling 1 of 3: small, 4 samples at a time\n" in [*lines, *rest.splitlines(True)]


ENDLESS = """
import runpy, time
from igpt_jax.demo import models
models.Models.compile = lambda *given: time.sleep(1_000)
runpy.run_module("igpt_jax.demo", run_name="__main__")
"""


def test_ctrl_c_does_not_wait_for_a_program_that_is_compiled(tmp_path):
  demo_server.need_extra()
  path = own_checkpoint.write(tmp_path / "small")
  command = [sys.executable, "-c", ENDLESS, f"--checkpoint={path}", "--port=0"]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    try:
      said = ""
      while "open " not in said or "compiling " not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
      process.send_signal(signal.SIGINT)
      assert process.wait(60) == 130
    finally:
      process.kill()


def test_it_binds_to_this_machine_alone():
  assert command.parse(["--checkpoint=x"]).host == "127.0.0.1"
  done = subprocess.run(
    [sys.executable, "-m", "igpt_jax.demo", "--help"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0 and "--checkpoint" in done.stdout
