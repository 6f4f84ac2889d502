"""Restarts of several hosts compile nothing, and hosts that evaluate stop together: real processes."""

import json
import signal

import pytest

from igpt_jax import checkpoint
from igpt_jax.reporting import metrics
from support.hosts import HOSTS, hosts
from support.paths import TESTS

pytestmark = pytest.mark.slow

FAULTY = str(TESTS / "support" / "faulty_main.py")
ENDLESS = {
  "train.steps": 100_000, "train.warmup_steps": 2, "train.eval_every": 2, "train.progress_images": 2,
  "train.checkpoint_every": 50_000, "compilation_cache": "workdir",
}  # fmt: skip


def programs_of(folder, workdir, fault):
  """What each host has compiled and read until it has evaluated and drawn, and was stopped."""
  with hosts(folder, workdir, ENDLESS, program=(FAULTY, fault)) as started:
    started.wait_for(
      "wrote progress/"
    )  # maybe before its first step, of an evaluation that was left
    started.wait_for(" images/s")
    started.processes[1].send_signal(signal.SIGTERM)
    started.succeed()
    return [
      json.loads(line.removeprefix("programs: "))
      for host in range(HOSTS)
      for line in started.said(host).splitlines()
      if line.startswith("programs: ")
    ]


def test_a_restart_compiles_nothing_on_any_host(tmp_path):
  """Gives all hosts one key, as TPUs do: what the first one keeps, every host reads.

  But for what other hosts compute on their own devices alone: tiny programs, whose keys name the devices.
  """
  workdir = tmp_path / "run"
  first = programs_of(tmp_path / "first", workdir, "keep_all")
  assert all(host["compiled"] > 5 for host in first)
  again = programs_of(tmp_path / "again", workdir, "keep_all")
  shared = {"jit_train_step", "jit_eval_step", "jit_complete", "jit__psum"}
  # Each on one host at least: the other may come later, and read it already.
  assert shared <= set(first[0]["missed"]) | set(first[1]["missed"])
  for host in again:
    assert not shared & set(host["missed"]) and host["read"] > 5, again
  # Comparisons among hosts that only a restart makes.
  assert set(again[0]["missed"]) <= {"jit__identity_fn"}, again
  goodput = json.loads((workdir / "goodput.json").read_text())
  assert goodput["starts"] == 2
  assert (
    goodput["programs"]["compiled"] <= len(again[0]["missed"]) and goodput["programs"]["read"] > 5
  )
  assert goodput["leaving"]["step_seconds"] > 0 and goodput["leaving"]["save_seconds"] > 0


def test_jax_names_the_process_in_a_cpus_keys(tmp_path):
  """What makes hosts without accelerators compile at every start; if it changes, `of_hosts` is to tell."""
  workdir = tmp_path / "run"
  programs_of(tmp_path / "first", workdir, "keep")
  again = programs_of(tmp_path / "again", workdir, "keep")
  assert "jit_train_step" not in again[0]["missed"] and "jit_train_step" in again[1]["missed"]


def test_hosts_leave_an_evaluation_together(tmp_path):
  """One of them is told, in the middle of it; both save that step, and evaluate it when they go on."""
  workdir = tmp_path / "run"
  slow = {"train.eval_images": 200}
  with hosts(tmp_path / "said", workdir, slow, program=(FAULTY, "slow_evaluation")) as started:
    started.wait_for("evaluating 2")
    started.processes[1].send_signal(signal.SIGTERM)
    started.succeed()
    said = started.said(0)
  assert "stopping after step 4: saving" in said and "stopped by SIGTERM at step 4: saved" in said
  left_after = max(int(word.split()[0]) for word in said.split("evaluating ")[1:])
  assert left_after <= 6 < 200 // 16
  assert checkpoint.whole_steps(str(workdir)) == [4]
  with hosts(tmp_path / "again", workdir, slow) as started:
    started.succeed()
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  assert [r["step"] for r in records] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
  assert [r["step"] for r in records if "validation_loss" in r] == [4, 8]
