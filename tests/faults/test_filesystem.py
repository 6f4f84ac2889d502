"""A file system that fails at any file or page of a save, is full, or is slow: no good checkpoint is lost,
the run says what is wrong, goes on when it is mended, and ends in words when it isn't.

The small file systems are tmpfs, which root may mount; elsewhere a limit on the size of files fails the
writes of Python and of tensorstore alike.
"""

import contextlib
import fcntl
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.checkpoint import Checkpoints, writing
from igpt_jax.config.read import settings_of
from igpt_jax.errors import SaveFailed, UserError
from igpt_jax.jobs import pretrain
from igpt_jax.reporting import metrics
from igpt_jax.runner import saving
from igpt_jax.workspace import lock
from support import small_checkpoints as small
from support.hosts import hosts

pytestmark = pytest.mark.usefixtures("quick_compile")

LONG = os.environ.get("IGPT_JAX_FAULTS") == "long"


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch):
  monkeypatch.setattr(saving, "_FIRST_PAUSE", 0.1)


@contextlib.contextmanager
def tmpfs(folder, size="1m"):
  folder.mkdir(exist_ok=True)
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=100000", "tmpfs", str(folder)],
    capture_output=True, text=True, check=False,
  ) if shutil.which("mount") else None  # fmt: skip
  if mounted is None or mounted.returncode:
    pytest.skip(f"a tmpfs can't be mounted here: {mounted and mounted.stderr.strip()}")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder, option):
  subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


@contextlib.contextmanager
def files_limited(size: int):
  """No file can be written beyond `size` bytes; gives what ends that."""
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  end = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # noqa: E731
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield end
  finally:
    end()
    signal.signal(signal.SIGXFSZ, before)


def saver_of(workdir, seconds):
  checkpoints = Checkpoints(str(workdir), keep=1)

  def begin(state, step):
    checkpoints.save(state, palette=small.PALETTE, run=small.make_run(step))

  return saving.Saver(checkpoints, begin, seconds)


def save(saver, step):
  state = small.random_state(step)
  saver(state, step)
  saver.finish(state, step)


def assert_good(workdir, *steps):
  """These are there, and read to what was saved."""
  assert checkpoint.whole_steps(str(workdir)) == list(steps)
  for step in steps:
    found = checkpoint.describe(checkpoint.path_of(str(workdir), step))
    params = checkpoint.load_host_params(found)
    expected = small.random_state(step).params
    assert small.same(params, {k: v for k, v in expected.items() if k != "clf"})


def used(folder):
  stat = os.statvfs(folder)
  return stat.f_blocks - stat.f_bfree, stat.f_files - stat.f_ffree


@pytest.mark.parametrize("kind", ["page", "file"])
def test_every_write_of_a_save_fails_in_turn(tmp_path, kind):
  """The nth page, or the nth file, of a save doesn't fit: the checkpoint before stays; with room, it is
  saved after all, by the same run."""
  with tmpfs(tmp_path / "disk", "64m") as disk:
    saver = saver_of(disk, 0)
    save(saver, 1)
    pages, files = used(disk)
    saver._checkpoints.close()
    n_writes = (pages if kind == "page" else files) - 2
    assert n_writes > 20
    turns = range(n_writes) if LONG else range(0, n_writes, -(-n_writes // 5))
    failed = 0
    for n in turns:
      saver = saver_of(disk, 0)
      size, inodes = used(disk)
      page = os.statvfs(disk).f_bsize
      remount(disk, f"size={(size + n) * page}" if kind == "page" else f"nr_inodes={inodes + n}")
      try:
        with pytest.raises(
          SaveFailed, match=r"step 2 can't be written.*whole ones: 1; fix: "
        ) as error:
          save(saver, 2)
        assert os.strerror(28) in str(error.value) or "directory" in str(error.value), error.value
        failed += 1
      finally:
        remount(disk, "size=64m" if kind == "page" else "nr_inodes=100000")
      assert_good(disk, 1)
      saver = saver_of(disk, 0)
      save(saver, 2)
      assert_good(disk, 2)
      saver._checkpoints.close()
      shutil.rmtree(disk / "checkpoints")
      saver = saver_of(disk, 0)
      save(saver, 1)
      saver._checkpoints.close()
    print(f"{failed} of {n_writes} writes of a {kind} have failed, each with a clear error")
    assert failed == len(turns)


@pytest.mark.parametrize("size", [0, 200, 3_000])
def test_a_save_is_tried_again_until_it_fits(tmp_path, capsys, size):
  saver = saver_of(tmp_path, 30)
  save(saver, 1)
  state = small.random_state(2)
  with files_limited(size) as end:
    saver(state, 2)
    until = time.monotonic() + 20
    while not saver.failed():
      assert time.monotonic() < until
      time.sleep(0.01)
    threading.Timer(0.4, end).start()
    saver.finish(state, 2)
  said = capsys.readouterr().out
  assert "checkpoint: NOT SAVED at step 2: File too large; training waits" in said
  assert "older checkpoints are untouched" in said and "step 2 is saved, at try" in said
  assert_good(tmp_path, 2)


def test_it_ends_in_words_after_the_time_given(tmp_path, capsys):
  saver = saver_of(tmp_path, 3.0)  # two tries on a loaded machine, too
  save(saver, 1)
  with (
    files_limited(0),
    pytest.raises(
      SaveFailed,
      match=r"step 2 can't be written to .*checkpoints \(File too large\); tried \d+ times",
    ) as error,
  ):
    save(saver, 2)
  assert "save_retry_seconds: 3" in str(error.value) and error.value.status == 1
  again = capsys.readouterr().out.count("NOT SAVED")
  assert again >= 2 and f"tried {again + 1} times" in str(error.value)
  assert_good(tmp_path, 1)


def test_a_slow_disk_delays_the_next_save_only(tmp_path, monkeypatch):
  """It is written beside the training; the next one waits for it; none is lost."""
  slow = threading.Event()
  sync = writing.sync

  def slowly(path):
    slow.set()
    time.sleep(0.03)
    sync(path)

  monkeypatch.setattr(writing, "sync", slowly)
  saver = saver_of(tmp_path, 0)
  state = small.random_state(1)
  saver(state, 1)
  assert slow.wait(20) and not checkpoint.whole_steps(str(tmp_path)) and not saver.failed()
  save(saver, 2)
  assert_good(tmp_path, 2)


def config_of(**changes):
  config = runpy.run_path("configs/quickstart.py")["get_config"]()
  config.update_from_flattened_dict({
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "train.batch_size": 16, "train.steps": 12,
    "train.warmup_steps": 2, "train.log_every": 1, "train.eval_every": 6, "train.eval_images": 16,
    "train.checkpoint_every": 3, "train.max_to_keep": 1, "mesh.data": 8, **changes,
  })  # fmt: skip
  return settings_of(config)


def told(workdir):
  return [
    {name: each[name] for name in ("step", "loss", "validation_loss") if name in each}
    for each in metrics.read_jsonl(workdir / "metrics.jsonl")
  ]


@pytest.mark.slow
def test_a_run_outlives_a_full_disk(tmp_path, monkeypatch, capsys):
  """Full from step 4 on, until a save has failed: numbers and metrics are those of a run with room."""
  pretrain.run(config_of(), str(tmp_path / "roomy"))
  with tmpfs(tmp_path / "disk", "64m") as disk:
    fill, page = Checkpoints.save, 4096

    def with_little_room(self, state, **settings):
      if int(state.step) == 3:
        self.wait()
        remount(disk, f"size={(used(disk)[0] + 4) * page}")
        threading.Timer(3.0, remount, (disk, "size=64m")).start()
      fill(self, state, **settings)

    monkeypatch.setattr(Checkpoints, "save", with_little_room)
    workdir = disk / "run"
    pretrain.run(config_of(), str(workdir))
    said = capsys.readouterr().out
    assert "NOT SAVED at step" in said and os.strerror(28) in said
    assert told(workdir) == told(tmp_path / "roomy")
    ours, theirs = (
      checkpoint.load_host_params(checkpoint.describe(str(each)))
      for each in (workdir, tmp_path / "roomy")
    )
    assert small.same(ours, theirs)


def test_metrics_wait_for_room(tmp_path):
  """Whole lines, each once, in order; `sync` tells that there is none."""
  writer = metrics.JsonlWriter(str(tmp_path / "metrics.jsonl"), 0)
  writer.write(1, {"loss": 1.0})
  with files_limited((tmp_path / "metrics.jsonl").stat().st_size + 10) as end:
    writer.write(2, {"loss": 2.0})
    writer.write(3, {"loss": 3.0})
    assert [each["step"] for each in metrics.read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    with pytest.raises(OSError):
      writer.sync()
    end()
    writer.write(4, {"loss": 4.0})
  writer.sync()
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_workdir_holds_one_run_at_a_time(tmp_path, capfd):
  """Until the process that holds it ends, however it does."""
  program = (
    "import sys, time; from igpt_jax.workspace import lock\n"
    f"with lock.held({str(tmp_path)!r}):\n  print('held', flush=True); time.sleep(600)"
  )
  other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
  try:
    assert other.stdout.readline() == "held\n"
    with (
      pytest.raises(
        UserError,
        match=rf"in use by another run \(host .*, process {other.pid}, since 20.*fix: wait",
      ),
      lock.held(str(tmp_path)),
    ):
      pass
  finally:
    other.kill()
    other.wait()
  with lock.held(str(tmp_path)):
    assert f"process {os.getpid()}," in (tmp_path / lock.FILE).read_text()
    # A forked child that outlives its parent doesn't keep it.
    told, tell = os.pipe()
    child = os.fork()
    if not child:
      os.write(tell, b"!")
      time.sleep(60)
      os._exit(0)
  try:
    assert os.read(told, 1) == b"!"
    with lock.held(str(tmp_path)):
      pass
  finally:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_without_locks_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
  def unsupported(*unused):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", unsupported)
  with lock.held(str(tmp_path)):
    pass
  assert "can't be locked (Operation not supported)" in capsys.readouterr().out


def test_a_second_run_is_refused(tmp_path):
  with lock.held(str(tmp_path)), pytest.raises(UserError, match="in use by another run"):
    pretrain.run(config_of(), str(tmp_path))
  assert np.all(os.listdir(tmp_path) == [lock.FILE])


@pytest.mark.skipif(not LONG, reason="of the long form: IGPT_JAX_FAULTS=long")
def test_two_processes_outlive_a_full_disk_and_a_damaged_checkpoint(tmp_path):
  """Together they try again, and together they go back to the one before."""
  settings = {"train.steps": 12, "train.checkpoint_every": 2, "train.save_retry_seconds": 20}
  with hosts(tmp_path / "said0", tmp_path / "roomy", settings) as started:
    started.succeed()
  with tmpfs(tmp_path / "disk", "64m") as disk:
    workdir = disk / "run"
    with hosts(tmp_path / "said1", workdir, settings) as started:
      started.wait_for("step  2/12")
      remount(disk, f"size={(used(disk)[0] + 4) * 4096}")
      started.wait_for("NOT SAVED")
      remount(disk, "size=64m")
      started.succeed()
    assert told(workdir) == told(tmp_path / "roomy")
    newest = disk / "run" / "checkpoints" / "12"
    before = checkpoint.describe(str(workdir)).sums
    for path in (newest / "training").rglob("d/*"):
      path.write_bytes(path.read_bytes()[:-7])
    with hosts(tmp_path / "said2", workdir, settings) as started:
      started.succeed()
      assert f"checkpoint 12 is set aside as {newest}.damaged" in started.said(0)
    assert told(workdir) == told(tmp_path / "roomy")
    assert checkpoint.describe(str(workdir)).sums == before
