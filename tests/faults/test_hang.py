"""What gets nowhere is ended, and says where it was; what only takes long is left alone."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from igpt_jax import watchdog
from support.hosts import ROOT, SMALL
from support.paths import TESTS

FAULTY = str(TESTS / "support" / "faulty_main.py")
long = pytest.mark.skipif(
  os.environ.get("IGPT_JAX_FAULTS") != "long", reason="of the long form: IGPT_JAX_FAULTS=long"
)
SECONDS = 120  # that any of these processes may live


@pytest.fixture
def idle(monkeypatch):
  """A process that hasn't done anything yet."""
  monkeypatch.setattr(watchdog, "_begun", set())
  watchdog.enter("start")


def test_a_silent_phase_hangs_and_a_beat_begins_anew(idle):
  dog = watchdog.Watchdog(10, "hang_seconds")
  for _ in range(2):
    watchdog.enter("step")
    watchdog.beat("waiting for data")
    watchdog.beat("computing")
    assert not dog.hangs(1)
  watchdog.beat("waiting for data")
  for _ in range(3):
    assert not dog.hangs(1)
    assert not any(dog.hangs(1) for _ in range(10))
    assert dog.hangs(1)
    watchdog.beat("computing")


def test_what_is_done_for_the_first_time_may_compile(idle):
  dog = watchdog.Watchdog(10, "hang_seconds")
  watchdog.enter("evaluation")
  watchdog.beat("computing")
  assert not dog.hangs(0)
  assert not dog.hangs(watchdog.FIRST_SECONDS - 1)
  assert dog.hangs(2)
  watchdog.beat("waiting for data")
  watchdog.beat("computing")
  assert not dog.hangs(0)
  assert dog.hangs(11)


def test_a_longer_limit_is_for_the_first_time_too(idle):
  dog = watchdog.Watchdog(2 * watchdog.FIRST_SECONDS, "hang_seconds")
  watchdog.enter("compile")
  assert not dog.hangs(0)
  assert not dog.hangs(1.5 * watchdog.FIRST_SECONDS)
  assert dog.hangs(watchdog.FIRST_SECONDS)


def test_without_a_limit_nothing_is_watched():
  with watchdog.Watchdog(0, "hang_seconds") as dog:
    assert not dog._thread.is_alive()
  with watchdog.Watchdog(1_000, "hang_seconds") as dog:
    assert dog._thread.is_alive()
  dog._thread.join(SECONDS)
  assert not dog._thread.is_alive()


class Run:
  """One process of the command."""

  def __init__(self, folder, shared, overrides, program=("-m", "igpt_jax.main")):
    self._said = folder / "said"
    settings = {**SMALL, "mesh.fsdp": 1, **overrides}
    environment = {
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with open(self._said, "w") as said:
      self.process = subprocess.Popen(
        [
          sys.executable, *program, "--config=configs/quickstart.py", f"--workdir={folder / 'run'}",
          *(f"--config.{name}={value}" for name, value in settings.items()),
        ],
        cwd=ROOT, env={**os.environ, **environment}, stdout=said, stderr=said,
      )  # fmt: skip

  def said(self):
    return self._said.read_text()

  def wait_for(self, text):
    end = time.monotonic() + SECONDS
    while text not in self.said():
      assert self.process.poll() is None and time.monotonic() < end, self.said()
      time.sleep(0.05)

  def workers(self):
    """Processes that this one has started to load data."""
    found = []
    for each in pathlib.Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):
        parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
        command = (each / "cmdline").read_text()
        if parent == self.process.pid and "spawn_main" in command:
          found.append(each)
    return found


def wait_until_gone(processes):
  end = time.monotonic() + SECONDS
  while any(each.exists() for each in processes):
    assert time.monotonic() < end, processes
    time.sleep(0.05)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp("shared")


@pytest.fixture
def start(tmp_path, shared):
  with contextlib.ExitStack() as stack:

    def begin(overrides, **settings):
      run = Run(tmp_path, shared, overrides, **settings)
      stack.callback(run.process.wait)
      stack.callback(run.process.kill)
      return run

    yield begin


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize(
  "fault, where, workers",
  [
    ("hang_data", "in phase step, waiting for data: no progress for", 1),
    pytest.param("hang_step", "in phase step, computing: no progress for", 0, marks=long),
  ],
)
def test_a_hang_ends_with_its_phase_and_all_stacks(start, fault, where, workers):
  run = start(
    {"hang_seconds": 10, "data.workers": workers, "train.eval_every": 0}, program=(FAULTY, fault)
  )
  run.wait_for("compiled in")
  processes = run.workers()
  assert len(processes) == workers
  assert run.process.wait(SECONDS) == watchdog.STATUS
  said = run.said()
  assert f"igpt_jax: hung: {where}" in said and "config.hang_seconds: 10" in said
  assert "Current thread" in said and "faulty_main.py" in said  # the place it hangs at
  assert "step 4/8" in said and "step 6/8" not in said
  wait_until_gone(processes)


@needs_proc
def test_stacks_are_told_on_request_and_workers_end_with_a_killed_run(start):
  run = start({"data.workers": 1, "train.steps": 100_000, "train.eval_every": 0})
  run.wait_for("/100000  loss")
  processes = run.workers()
  assert processes
  run.process.send_signal(signal.SIGUSR1)
  run.wait_for('runner/loop.py", line')
  steps = run.said().count("  loss ")
  while run.said().count("  loss ") <= steps:
    assert run.process.poll() is None
    time.sleep(0.05)
  run.process.kill()
  run.process.wait()
  wait_until_gone(processes)
