"""SIGTERM and Ctrl-C: a process with nothing to save leaves at once, in one line; a loop saves first."""

import os
import signal
import subprocess
import sys

import pytest

from igpt_jax.runner import loop
from support.faults import SECONDS
from support.paths import ROOT
from support.processes import started

# Native code, in which no handler of Python's is called.
NATIVE = """
import hashlib
from igpt_jax import stopping
stopping.listen()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
"""


@pytest.mark.parametrize(
  "number, status, name", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_process_in_native_code_leaves_at_once(number, status, name):
  process = started(sys.executable, "-c", NATIVE)
  process.send_signal(number)
  _, errors = process.communicate(timeout=SECONDS)
  assert process.returncode == status
  assert errors == (
    f"igpt_jax: stopped by {name}: there is nothing to save; the same command starts again\n"
  )


def test_what_a_shell_has_ignored_stays_ignored():
  """A shell's background commands ignore Ctrl-C, as do those under nohup."""
  ignoring = "trap '' INT; exec \"$@\""
  process = started("sh", "-c", ignoring, "sh", sys.executable, "-c", NATIVE)
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGTERM)
  assert process.wait(SECONDS) == 143


def test_ctrl_c_while_the_package_itself_is_imported(tmp_path):
  """Before a module of it runs: here on its way through an import of its own."""
  (tmp_path / "sitecustomize.py").write_text(f"""
import sys
class Slow:
  def find_spec(self, name, path=None, target=None):
    if name == "igpt_jax.cpu_compiler":
      print("ready", flush=True)
      import time
      time.sleep(1_000)
sys.meta_path.insert(0, Slow())
sys.path.insert(0, {str(ROOT)!r})
""")
  process = started("env", f"PYTHONPATH={tmp_path}", sys.executable, "-m", "igpt_jax.main")
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=SECONDS)
  assert process.returncode == 130
  assert errors.startswith("igpt_jax: stopped by Ctrl-C") and errors.count("\n") == 1


def test_a_system_without_posix_can_import_and_listen():
  """Windows has no fork, no fcntl, and before Python 3.12 no blocking to set."""
  program = """
import os, sys
import jax  # and what Python itself imports by these names
sys.modules["fcntl"] = None
del os.register_at_fork, os.set_blocking
import warnings
from igpt_jax import stopping
from igpt_jax.parallel import locking
with locking.locked(sys.argv[1], "it", "go"):
  print("held")
stopping.take_back()
"""
  done = subprocess.run(
    [sys.executable, "-c", program, os.devnull],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=SECONDS,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == (
    "it can't be locked (this system has no such locks): take care that no other run uses it\nheld\n"
  )


def test_a_forked_worker_leaves_ctrl_c_to_its_parent():
  """Otherwise the parent would hear it twice, and leave without saving."""
  program = """
import os, signal, time
from igpt_jax import stopping
heard = []
stopping.listen()
stopping.answer_by(lambda name: heard.append(name) or "")
child = os.fork()
if not child:
  time.sleep(1_000)
time.sleep(0.2)
os.kill(child, signal.SIGINT)
time.sleep(0.2)
assert os.waitpid(child, os.WNOHANG) == (0, 0)
assert not heard, heard
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM
"""
  subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=SECONDS)


@pytest.mark.parametrize("begun, last", [(True, 7), (False, 6)])
def test_a_request_names_the_step_that_it_stops_after(monkeypatch, begun, last):
  """What it says is what it does: the step that may be dispatched already counts, no other does."""
  said = []
  monkeypatch.setattr("igpt_jax.runner.stop_signal.say", said.append)
  stop = loop.StopSignal(lambda: 4)
  assert stop.asked(6) is None
  if begun:
    assert stop.begins(6)
  assert stop._answer("SIGTERM") == "" and stop._answer("SIGTERM") == ""
  assert said == [f"stopping after step {last}: saving; Ctrl-C leaves at once"]
  assert stop.asked(last) == "SIGTERM" and not stop.begins(last)
  assert stop._answer("Ctrl-C") == (
    "left at once by Ctrl-C: the newest checkpoint is that of step 4; the same command goes on from it"
  )
