"""SIGTERM and Ctrl-C: a process with nothing to save leaves at once, in one line; a loop saves first."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from igpt_jax import checkpoint
from igpt_jax.jobs import pretrain
from igpt_jax.runner import loop
from igpt_jax.training import compilation
from support.paths import ROOT
from support.quickstart import command, shrunk
from support.tiny import on_one_device

SECONDS = 60  # that a process may take to do as it is told

# Native code, in which no handler of Python's is called.
NATIVE = """
import hashlib
from igpt_jax import stopping
stopping.listen()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
"""


def started(*arguments):
  """A process of Python that has said "ready"."""
  process = subprocess.Popen(
    arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "ready\n"
  return process


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


@pytest.mark.parametrize("job", ["pretrain", "evaluate"])
def test_ctrl_c_while_the_program_starts(tmp_path, job):
  config = tmp_path / "config.py"
  config.write_text("import time\nprint('ready', flush=True)\ntime.sleep(1_000)\n")
  process = started(*command(config, tmp_path / "run", f"--config.job={job}"))
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=SECONDS)
  assert process.returncode == 130
  assert errors.startswith("igpt_jax: stopped by Ctrl-C") and errors.count("\n") == 1


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


@pytest.fixture
def endless(tmp_path):
  """A run of long steps, begun: the process and what it has said, line by line."""
  config = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32, "train.batch_size": 2048,
    "train.steps": 10_000, "train.eval_every": 0, "train.checkpoint_every": 10_000,
    "train.log_every": 1,
  }  # fmt: skip
  process = subprocess.Popen(
    command(
      "configs/quickstart.py",
      tmp_path / "run",
      *(f"--config.{name}={value}" for name, value in config.items()),
    ),
    cwd=ROOT,
    env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  yield process
  process.kill()
  process.communicate()


def until(process, beginning):
  """Reads its lines up to one with this beginning, which is returned."""
  for line in process.stdout:
    if line.startswith(beginning):
      return line
  raise AssertionError(f"it has ended without {beginning!r}")


@pytest.mark.slow
def test_ctrl_c_again_leaves_at_once(endless, tmp_path):
  until(endless, "step")
  endless.send_signal(signal.SIGINT)
  assert "saving; Ctrl-C again leaves at once" in until(endless, "stopping after step")
  endless.send_signal(signal.SIGINT)
  rest, _ = endless.communicate(timeout=SECONDS)
  assert endless.returncode == 130, rest
  last = rest.splitlines()[-1]
  assert last.startswith("igpt_jax: left at once by Ctrl-C: there is no checkpoint yet"), rest
  assert checkpoint.latest_step(str(tmp_path / "run")) is None


@pytest.mark.slow
def test_sigterm_again_changes_nothing(endless, tmp_path):
  until(endless, "step")
  endless.send_signal(signal.SIGTERM)
  line = until(endless, "stopping after step")
  endless.send_signal(signal.SIGTERM)
  rest, _ = endless.communicate(timeout=SECONDS)
  assert endless.returncode == 0, rest
  step = int(line.split("after step ")[1].split(":")[0])
  assert f"stopped by SIGTERM at step {step}: saved" in rest
  assert checkpoint.latest_step(str(tmp_path / "run")) == step


def test_two_steps_are_in_flight_at_most(tmp_path, monkeypatch, quick_compile):
  """Step N isn't dispatched before N - 2 has been waited for, logged or not."""
  waited, dispatched = [], []
  call, wait = compilation.CompiledStep.__call__, jax.block_until_ready

  def dispatch(self, *arguments):
    number = len(dispatched) + 1
    assert number <= 2 or number - 2 in waited, (number, waited)
    state, values = call(self, *arguments)
    dispatched.append(values)
    return state, values

  def waiting(tree):
    waited.extend(n for n, values in enumerate(dispatched, 1) if values is tree)
    return wait(tree)

  monkeypatch.setattr(compilation.CompiledStep, "__call__", dispatch)
  monkeypatch.setattr(loop.jax, "block_until_ready", waiting)
  settings = shrunk(**{"train.log_every": 50, "train.eval_every": 0, "train.checkpoint_every": 50})
  on_one_device(pretrain, settings, str(tmp_path / "run"))
  assert len(dispatched) == 12


def test_a_request_during_a_step_is_the_last_of_the_next(monkeypatch):
  """What it says is what it does: the step that may be dispatched already counts."""
  said = []
  monkeypatch.setattr("igpt_jax.runner.stop_signal.say", said.append)
  stop = loop.StopSignal(lambda: 4)
  assert stop.asked(6) is None
  assert stop._answer("SIGTERM") == "" and stop._answer("SIGTERM") == ""
  assert said == ["stopping after step 7: saving; Ctrl-C leaves at once"]
  assert stop.asked(7) == "SIGTERM"
  assert stop._answer("Ctrl-C") == (
    "left at once by Ctrl-C: the newest checkpoint is that of step 4; the same command goes on from it"
  )
