"""One of two hosts is killed, stopped or cut off, or comes to other numbers: the others end, and say why.

Short: one of each kind. IGPT_JAX_FAULTS=long: every signal to every host.
"""

import os
import signal
import time

import numpy as np
import pytest

from igpt_jax import checkpoint, watchdog
from igpt_jax.reporting import metrics
from support import networks
from support.hosts import HOSTS, hosts
from support.paths import TESTS

LONG = os.environ.get("IGPT_JAX_FAULTS") == "long"
FAULTY = str(TESTS / "support" / "faulty_main.py")
long = pytest.mark.skipif(not LONG, reason="of the long form: IGPT_JAX_FAULTS=long")
HOST_SECONDS = 10
BOUND = HOST_SECONDS + 60  # that the others may live on
LAST_WORDS_SECONDS = 30
SIGNALS = (
  [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)]
  if LONG
  else [(signal.SIGSTOP, 1)]
)
ENDLESS = {
  "train.steps": 100_000, "train.eval_every": 0, "train.checkpoint_every": 50_000, "host_seconds": HOST_SECONDS,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def shared_folders(tmp_path_factory):
  """Programs are compiled once, and kept apart: processes that are killed may leave halves of them."""
  folder = tmp_path_factory.mktemp("shared")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    yield


def assert_ends_with_words(started, host):
  status = started.processes[host].wait(BOUND)
  assert status not in (0, 2), started.said(host, "err")
  # A shell says the last words, after the process that they are of has ended.
  end = time.monotonic() + LAST_WORDS_SECONDS
  while "another host was probably lost" not in started.said(host, "err"):
    assert time.monotonic() < end, started.said(host, "err")
    time.sleep(0.05)
  assert "config.host_seconds: 10" in started.said(host, "err")


@pytest.mark.parametrize("number, lost", SIGNALS)
def test_the_others_end_when_a_host_is_lost(tmp_path, number, lost):
  with hosts(tmp_path / "said", tmp_path / "run", ENDLESS) as started:
    started.wait_for("/100000  loss")
    started.processes[lost].send_signal(number)
    assert_ends_with_words(started, 1 - lost)


@pytest.mark.slow
def test_both_end_when_they_are_cut_off_from_each_other(tmp_path):
  with (
    networks.two_networks(tmp_path / "net") as cable,
    hosts(
      tmp_path / "said",
      tmp_path / "run",
      ENDLESS,
      before=cable.before,
      address=networks.ADDRESSES[0],
    ) as started,
  ):
    started.wait_for("/100000  loss")
    cable.cut()
    for host in range(HOSTS):
      assert_ends_with_words(started, host)


@long
def test_a_host_that_hangs_ends_both(tmp_path):
  """It still answers the first host, which only gets nowhere with it."""
  settings = ENDLESS | {"hang_seconds": 15}
  with hosts(
    tmp_path / "said", tmp_path / "run", settings, program=(FAULTY, "hang_second")
  ) as started:
    started.wait_for("step      4/100000  loss")
    statuses = [each.wait(15 + 60) for each in started.processes]
    assert watchdog.STATUS in statuses and not {0, 2} & set(statuses), statuses
    assert "igpt_jax: hung: in phase step" in started.everything()


def both_say(started, status, *texts):
  assert started.statuses() == [status] * HOSTS, started.everything()
  for host in range(HOSTS):
    for text in texts:
      assert text in started.said(host, "err")
    assert "Traceback" not in started.said(host, "err")


@long
def test_another_config_on_one_host_is_a_mistake(tmp_path):
  with hosts(
    tmp_path / "said", tmp_path / "run", {}, per_host={1: {"train.learning_rate": 0.5}}
  ) as started:
    both_say(started, 2, "config.train.learning_rate: host 0 has 0.003, host 1 0.5")
  assert not (tmp_path / "run").exists()


@long
def test_another_order_of_the_data_on_one_host_is_a_mistake(tmp_path):
  with hosts(tmp_path / "said", tmp_path / "run", {}, program=(FAULTY, "other_order")) as started:
    both_say(
      started, 2, "hosts: they differ at step 0: order: host 0 has records 0 to 15 by seed 0"
    )


def test_parameters_that_differ_are_not_saved(tmp_path):
  """Every host has a copy, which a fault on one of them changes."""
  overrides = {"mesh.fsdp": 1, "train.eval_every": 0}
  with hosts(
    tmp_path / "said", tmp_path / "run", overrides, program=(FAULTY, "diverge")
  ) as started:
    both_say(started, 1, "hosts: their parameters differ at step 4: checksum: host 0 has ")
  assert checkpoint.whole_steps(str(tmp_path / "run")) == []


@pytest.mark.slow
def test_both_leave_a_decay_for_a_longer_run(tmp_path):
  recipe = {"train.schedule": "wsd", "train.decay_steps": 2, "train.progress_images": 0}
  workdir = tmp_path / "run"
  for steps in (8, 12):
    with hosts(tmp_path / f"said{steps}", workdir, recipe | {"train.steps": steps}) as started:
      started.succeed()
  assert "going back to step 6, before the decay" in started.said(0)
  assert checkpoint.whole_steps(str(workdir)) == [8, 10, 12]
  assert checkpoint.whole_steps(str(workdir / "decays" / "6-8-1-sqrt")) == [8]
  told = [r for r in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  assert [r["learning_rate"] for r in told[2:11]] == [pytest.approx(3e-3)] * 9


@pytest.mark.slow
def test_both_go_back_to_one_checkpoint_with_the_same_other_data(tmp_path):
  overrides = {"guard.in_row": 2, "train.steps": 12, "train.checkpoint_every": 4}
  workdir = tmp_path / "run"
  with hosts(tmp_path / "said", workdir, overrides, program=(FAULTY, "bad_once")) as started:
    started.succeed()
    assert "going back to step 4, with other data (rollback 1)" in started.said(0)
    assert "NOT SAVED" not in started.everything()
  what = metrics.read_jsonl(workdir / "incidents.jsonl")
  assert [each["what"] for each in what] == ["not finite", "rollback"]
  kept = [np.load(path)["index"] for path in sorted(workdir.glob("incidents/*/batch*.npz"))]
  assert len(kept) == 2 and not set(kept[0]) & set(kept[1]), "each host's images of the bad batch"
  told = [r for r in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  assert [r["step"] for r in told] == list(range(1, 13))
  assert all(np.isfinite(r["loss"]) for r in told) and told[-1]["skipped_updates"] == 0
  assert checkpoint.whole_steps(str(workdir)) == [4, 8, 12]
