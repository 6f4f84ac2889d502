"""SIGTERM and Ctrl-C to the command: before there is anything to save, while it trains, and again."""

import os
import signal
import subprocess

import jax
import pytest

from igpt_jax import checkpoint
from igpt_jax.jobs import pretrain
from igpt_jax.runner import loop
from igpt_jax.training import compilation
from support.faults import SECONDS
from support.paths import ROOT
from support.processes import started
from support.quickstart import command, shrunk
from support.tiny import on_one_device


@pytest.mark.parametrize("job", ["pretrain", "evaluate"])
def test_ctrl_c_while_the_program_starts(tmp_path, job):
  config = tmp_path / "config.py"
  config.write_text("import time\nprint('ready', flush=True)\ntime.sleep(1_000)\n")
  process = started(*command(config, tmp_path / "run", f"--config.job={job}"))
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=SECONDS)
  assert process.returncode == 130
  assert errors.startswith("igpt_jax: stopped by Ctrl-C") and errors.count("\n") == 1


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
