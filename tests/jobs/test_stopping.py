"""SIGTERM and Ctrl-C to the command: before there is anything to save, while it trains, and again."""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from igpt_jax import checkpoint
from igpt_jax.jobs import pretrain
from igpt_jax.reporting import metrics
from igpt_jax.runner import loop
from igpt_jax.training import compilation
from support.faults import SECONDS, args_of
from support.paths import ROOT, TESTS
from support.processes import started
from support.quickstart import assert_same, command, params_of, shrunk
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


def metrics_of(workdir):
  names = ("step", "loss", "validation_loss", "grad_norm")
  return [
    {name: record[name] for name in names if name in record}
    for record in metrics.read_jsonl(workdir / "metrics.jsonl")
  ]


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("at_step, stopped_at", [(6, 6), (12, 12)])
def test_an_evaluation_is_left_and_made_by_who_goes_on(
  tiny_run, tmp_path, monkeypatch, capsys, at_step, stopped_at
):
  """Told to stop after the first of two batches, it saves that very step; the numbers are the same."""
  through, workdir = loop.StopSignal.through, tmp_path / "run"

  def told_after_one(self, batches):
    for n, batch in enumerate(through(self, batches)):
      yield batch
      if n == 0 and self._last_step == at_step:
        self._answer("SIGTERM")

  with monkeypatch.context() as patch:
    patch.setattr(loop.StopSignal, "through", told_after_one)
    on_one_device(pretrain, shrunk(), str(workdir))
  said = capsys.readouterr().out
  assert f"stopping after step {stopped_at}: saving" in said
  assert f"stopped by SIGTERM at step {stopped_at}: saved" in said
  assert checkpoint.latest_step(str(workdir)) == stopped_at
  assert not [r for r in metrics_of(workdir) if r["step"] == at_step and "validation_loss" in r]
  assert not (workdir / "training.json").exists()
  on_one_device(pretrain, shrunk(), str(workdir))
  assert metrics_of(workdir) == metrics_of(tiny_run)
  assert_same(params_of(workdir, 12), params_of(tiny_run, 12))
  assert (workdir / "training.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_wait_for_data_is_left(tmp_path, number):
  """Threads that read never come back: the steps made are saved, and the process ends none the less."""
  config = {"train.checkpoint_every": 100, "train.eval_every": 0, "train.log_every": 1}
  process = subprocess.Popen(
    [
      sys.executable, TESTS / "support" / "faulty_main.py", "stuck_reader",
      *args_of(tmp_path / "run", **config),
    ],
    cwd=ROOT,
    env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )  # fmt: skip
  try:
    until(process, "step  4/24")
    time.sleep(3)  # it takes the few batches that were read ahead
    process.send_signal(number)
    rest, _ = process.communicate(timeout=SECONDS)
  finally:
    process.kill()
  assert process.returncode == 0, rest
  step = int(rest.split("stopping after step ")[1].split(":")[0])
  assert 4 < step < 24 and f"at step {step}: saved" in rest
  assert checkpoint.latest_step(str(tmp_path / "run")) == step
  assert [record["step"] for record in metrics_of(tmp_path / "run")] == list(range(1, step + 1))


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
