"""Metrics on disk after any crash, and the numbers of the progress line by a fake clock."""

import json
import os
import sys
import time

import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.reporting import metrics, progress
from igpt_jax.reporting.metrics import JsonlWriter, Writers, read_jsonl
from igpt_jax.reporting.progress import Countdown, Progress, doing, format_seconds


class Clock:
  def __init__(self):
    self.now = 1_000.0

  def monotonic(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  fake = Clock()
  monkeypatch.setattr(progress, "time", fake)
  return fake


def write(path, resume_step, *records):
  writer = JsonlWriter(path, resume_step)
  for step, values in records:
    writer.write(step, values)
  writer.close()


def steps_of(path):
  return [record["step"] for record in read_jsonl(path)]


def test_one_record_a_line(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  write(path, 0, (1, {"loss": 0.1 + 0.2}), (2, {"loss": 1e-30, "name": "é"}))
  with open(path, encoding="utf-8") as file:
    lines = file.read().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"step": 1, "loss": 0.1 + 0.2},  # to the last bit
    {"step": 2, "loss": 1e-30, "name": "é"},
  ]
  assert read_jsonl(path) == [json.loads(line) for line in lines]


def test_a_record_is_on_disk_when_it_is_written(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  writer = JsonlWriter(path, 0)
  writer.write(1, {"loss": 2.0})
  assert steps_of(path) == [1]
  writer.close()


def test_resuming_drops_what_comes_after(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  write(path, 0, *((step, {"loss": float(step)}) for step in (10, 20, 20, 30, 40)))
  write(path, 20, (30, {"loss": -1.0}))
  assert steps_of(path) == [10, 20, 20, 30]
  assert read_jsonl(path)[-1]["loss"] == -1.0
  write(path, 0)  # a run whose first checkpoint was never written begins anew
  assert steps_of(path) == []
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_line_cut_short_is_dropped_wherever_it_was_cut(tmp_path, cut):
  """Also when nothing is missing but the line's end: what follows gets a line of its own."""
  path = str(tmp_path / "metrics.jsonl")
  write(path, 0, (1, {"loss": 1.5}), (2, {"loss": 2.5}))
  with open(path, "rb+") as file:
    file.truncate(os.path.getsize(path) - cut)
  before = steps_of(path)
  assert before in ([1], [1, 2])
  write(path, 2, (3, {"loss": 3.5}))
  assert steps_of(path) == [*before, 3]
  with open(path, encoding="utf-8") as file:
    for line in file.read().splitlines():
      json.loads(line)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"tensorboard.*pip install -e '.*\[tensorboard\]'"):
    metrics.TensorBoardWriter(str(tmp_path), 0)
  with pytest.raises(UserError, match=r"wandb.*pip install -e '.*\[wandb\]'"):
    metrics.WandbWriter(str(tmp_path), {}, "project")


class FakeTensorBoard:
  def __init__(self, folder, purge_step):
    self.folder, self.purge_step, self.scalars = folder, purge_step, []

  def SummaryWriter(self, folder, purge_step):
    self.__init__(folder, purge_step)
    return self

  def add_scalar(self, name, value, step):
    self.scalars.append((name, value, step))

  def add_image(self, name, image, step, dataformats):
    self.scalars.append((name, image.shape, step, dataformats))

  def flush(self):
    pass

  def close(self):
    self.scalars.append("closed")


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
  fake = FakeTensorBoard(None, None)
  monkeypatch.setitem(sys.modules, "tensorboardX", fake)
  writer = metrics.TensorBoardWriter(str(tmp_path), 40)
  writer.write(50, {"loss": 1.5, "images": 3, "name": "x"})
  writer.close()
  assert fake.folder == str(tmp_path / "tensorboard")
  assert fake.purge_step == 41  # what comes after the checkpoint is computed again
  assert fake.scalars == [("loss", 1.5, 50), ("images", 3, 50), "closed"]


def test_images_go_to_those_that_show_them(tmp_path, monkeypatch):
  board, wandb = FakeTensorBoard(None, None), FakeWandb()
  monkeypatch.setitem(sys.modules, "tensorboardX", board)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  writers = metrics.Writers([
    metrics.JsonlWriter(str(tmp_path / "metrics.jsonl"), 0),
    metrics.TensorBoardWriter(str(tmp_path), 0),
    metrics.WandbWriter(str(tmp_path), {}, "igpt"),
  ])  # fmt: skip
  writers.image(5, "progress", np.zeros((4, 6, 3), np.uint8))
  assert board.scalars == [("progress", (4, 6, 3), 5, "HWC")]
  assert wandb.logged == [({"progress": ("image", (4, 6, 3))}, 5)]
  assert metrics.read_jsonl(str(tmp_path / "metrics.jsonl")) == []


class FakeWandb:
  def __init__(self):
    self.calls, self.logged = [], []
    self.id = "abc"

  def init(self, **settings):
    self.calls.append(settings)
    return self

  def log(self, values, step):
    self.logged.append((values, step))

  def Image(self, image):
    return "image", image.shape

  def finish(self):
    self.logged.append("finished")


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  workdir = tmp_path / "digits"
  workdir.mkdir()
  for _ in range(2):
    writer = metrics.WandbWriter(str(workdir), {"seed": 0}, "igpt")
    writer.write(3, {"loss": 1.0})
    writer.close()
  assert [call["id"] for call in fake.calls] == [None, "abc"]
  assert fake.calls[1]["project"] == "igpt" and fake.calls[1]["name"] == "digits"
  assert fake.logged == [({"loss": 1.0}, 3), "finished"] * 2


@pytest.mark.parametrize(
  "error", ["UsageError: No API key configured.\nUse `wandb login`", "CommError: Timed out"]
)
def test_wandb_without_a_key_or_a_network_is_one_line(tmp_path, monkeypatch, error):
  class Failing(FakeWandb):
    class errors:  # as wandb has it
      class Error(Exception):
        pass

    def init(self, **settings):
      raise self.errors.Error(error)

  monkeypatch.setitem(sys.modules, "wandb", Failing())
  with pytest.raises(UserError, match=r"log.wandb: True.*WANDB_MODE=offline") as told:
    metrics.WandbWriter(str(tmp_path), {"seed": 0}, "igpt")
  assert "\n" not in str(told.value) and error.split()[0] in str(told.value)
  assert told.value.status == 2  # launchers don't try again
  assert not list(tmp_path.iterdir())


def test_writers_all_get_everything(tmp_path):
  paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
  writers = Writers([JsonlWriter(path, 0) for path in paths])
  writers.write(7, {"loss": 1.0})
  writers.close()
  assert all(read_jsonl(path) == [{"step": 7, "loss": 1.0}] for path in paths)


def test_speed_mfu_and_time_left(clock):
  progress = Progress(1_000, images_per_step=32, flops_per_image=5e9, peak_flops=1e12)
  assert progress.measure(10) == {}  # nothing to measure from
  progress.start(100)
  assert progress.measure(100) == {}  # no step made
  clock.now += 4.0
  found = progress.measure(150)
  assert found["images_per_second"] == pytest.approx(50 * 32 / 4)
  assert found["mfu"] == pytest.approx(400 * 5e9 / 1e12)
  assert found["eta_seconds"] == pytest.approx(850 * 4 / 50)
  clock.now += 10.0  # the next interval is measured by itself
  assert progress.measure(175)["images_per_second"] == pytest.approx(25 * 32 / 10)


def test_pauses_are_no_training_time(clock):
  progress = Progress(100, 8, 1e9, None)
  progress.start(0)
  clock.now += 3.0
  progress.pause(2.0)
  found = progress.measure(10)
  assert found["images_per_second"] == pytest.approx(80)
  assert "mfu" not in found  # the peak isn't known
  clock.now += 1.0  # and a pause counts once
  assert progress.measure(20)["images_per_second"] == pytest.approx(80)


def test_share_of_waiting_is_of_the_interval(clock):
  progress = Progress(100, 8, 1e9, None)
  progress.start(0, waited=5.0)  # filling the pipeline isn't counted
  clock.now += 4.0
  progress.measure(10)
  assert progress.share_waited(6.0) == pytest.approx(0.25)
  clock.now += 2.0
  progress.measure(20)
  assert progress.share_waited(7.0) == pytest.approx(0.5)
  clock.now += 1.0
  progress.measure(30)
  assert progress.share_waited(99.0) == 1.0


def test_progress_line():
  progress = Progress(1_000, 8, 1e9, None)
  values = {
    "loss": 2.83321,
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "images_per_second": 12_345.6,
    "mfu": 0.456,
    "data_wait": 0.021,
    "eta_seconds": 3_723.4,
  }
  assert progress.line(50, values) == (
    "step   50/1000  loss 2.8332 nats/token  12,346 images/s  MFU 45.6%  data wait 2%  ETA 1:02:03"
  )
  assert progress.line(1_000, {"validation_loss": 1.5}) == "step 1000/1000  validation 1.5000"


def test_countdown_speaks_now_and_then(clock):
  lines = []
  countdown = Countdown("evaluation", 1_000, lines.append, every=5.0)
  countdown.tick(10)  # too early
  clock.now += 6.0
  countdown.tick(120)
  clock.now += 4.0
  countdown.tick(200)  # too early again
  clock.now += 10.0
  countdown.tick(1_000)  # done: the caller says so
  assert lines == ["evaluation: 120/1,000  18.3/s  ETA 0:00:48"]


def test_countdown_of_long_work_speaks_as_soon_as_its_speed_is_known(clock):
  """Compiling, before the first batch is done, doesn't count; what comes after the work does."""
  lines = []
  countdown = Countdown("test", 1_000, lines.append, then=("baselines", 54.0))
  clock.now += 2.0
  for _ in countdown.over(["a", "b", "c"], 100):
    clock.now += 1.0
  assert lines == ["test: 200/1,000  100/s  ETA 0:01:02, baselines included"]


def test_progress_speaks_by_time_and_counts_evaluations(clock):
  progress = Progress(1_000, 8, 1e9, None, eval_every=400)
  progress.start(0)
  clock.now += 2.0
  assert progress.due()  # the first step
  assert progress.line(1, progress.speed(1)).endswith("ETA 0:33:18")
  clock.now += 10.0
  assert not progress.due()
  progress.pause(100.0, evaluated=True)
  clock.now += 100.0
  measured = progress.measure(6)
  assert measured["eta_seconds"] == pytest.approx(994 * 2)  # as recorded: training alone
  assert progress.line(6, measured).endswith("ETA 0:38:08")  # and evaluations at 400, 800, 1,000
  clock.now += 1_000.0
  progress.line(7, {})
  clock.now += 59.0
  assert not progress.due()
  clock.now += 1.0
  assert progress.due()


def test_progress_speaks_more_often_at_first(clock):
  progress = Progress(1_000, 8, 1e9, None)
  progress.start(0)
  progress.line(1, {})
  clock.now += 14.0
  assert not progress.due()
  clock.now += 1.0
  assert progress.due()


def test_long_work_tells_that_it_goes_on():
  lines = []
  with doing("a moment", lines.append, after=60.0):
    pass
  assert not lines
  with doing("told by the caller", lines.append, after=0.0, ends=False):
    while not lines:
      time.sleep(0.001)
  assert lines == ["told by the caller …"]
  lines.clear()
  with doing("compiling", lines.append, after=0.01):
    while not lines:
      time.sleep(0.001)
  assert lines[0] == "compiling …" and lines[1].startswith("compiling: 0.") and len(lines) == 2
  with pytest.raises(KeyError), doing("failing", lines.append, after=0.0):
    raise KeyError
  assert not [line for line in lines if line.startswith("failing:")]


def test_slow_work_has_a_speed_above_0(clock):
  lines = []
  countdown = Countdown("samples", 9, lines.append)
  clock.now += 80.0
  countdown.tick(1)
  assert lines == ["samples: 1/9  0.0125/s  ETA 0:10:40"]
  line = Progress(1_000, 8, 1e9, None).line(1_000, {"images_per_second": 0.0125})
  assert line == "step 1000/1000  0.0125 images/s"


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0, "0:00:00"), (59.6, "0:01:00"), (3_723, "1:02:03"), (86_399, "23:59:59"),
    (86_400, "1d 0:00:00"), (1_000_000, "11d 13:46:40"),
  ],
)  # fmt: skip
def test_format_seconds(seconds, text):
  assert format_seconds(seconds) == text


def test_bytes_that_are_no_text_end_nothing(tmp_path):
  """As a torn block leaves them where the power went."""
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\xfe{"step\n3\n{"step": 2, "loss": 1.0}\n')
  assert [record["step"] for record in metrics.read_jsonl(str(path))] == [1, 2]
  assert metrics.newest(str(path)) == {"loss": 1.0}
  metrics.JsonlWriter(str(path), 1).close()
  assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n'
