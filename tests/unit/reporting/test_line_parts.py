"""metrics.jsonl in a bucket: whole after any kill, whichever request it comes at; and any failure of one."""

import json
import os
import sys
import time

import numpy as np
import pytest

from igpt_jax import files
from igpt_jax.errors import BucketError
from igpt_jax.reporting import curves, line_parts, metrics

PATH = "gs://bucket/run/metrics.jsonl"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_scratch", str(tmp_path / "scratch"))


def steps(path=PATH):
  return [record["step"] for record in metrics.read_jsonl(path)]


def write(writer, *numbers):
  for step in numbers:
    writer.write(step, {"loss": float(step)})


def objects(buckets):
  return buckets.names("bucket", "run/metrics.jsonl")


def killed(writer):
  """Leaves a writer as SIGKILL does: what wasn't uploaded is gone."""
  writer._lines._thread.shutdown()


def test_a_run_that_ends_leaves_one_file(buckets):
  writer = metrics.JsonlWriter(PATH, 0)
  write(writer, 1, 2)
  writer.sync()
  assert steps() == [1, 2] and len(objects(buckets)) == 2
  write(writer, 3)
  writer.close()
  assert objects(buckets) == ["run/metrics.jsonl"]
  lines = [json.dumps({"step": step, "loss": float(step)}) + "\n" for step in (1, 2, 3)]
  assert buckets.content("bucket", "run/metrics.jsonl").decode() == "".join(lines)


def test_lines_are_uploaded_now_and_then_and_parts_are_sealed(buckets, monkeypatch):
  """Not at every line; and a part isn't written again once it is large."""
  writer = metrics.JsonlWriter(PATH, 0)
  write(writer, 1, 2, 3)
  assert buckets.count("write", "*parts*") == 0 and steps() == []
  monkeypatch.setattr(line_parts, "_SECONDS", 0.0)
  write(writer, 4)
  while steps() != [1, 2, 3, 4]:
    time.sleep(0.01)
  monkeypatch.setattr(line_parts, "_SECONDS", 1e9)
  monkeypatch.setattr(line_parts, "_LARGE", 200)
  for step in range(5, 21):
    write(writer, step)
    writer.sync()
  assert steps() == list(range(1, 21))
  parts = [name for name in objects(buckets) if ".parts/" in name]
  sizes = [len(buckets.content("bucket", name)) for name in parts]
  assert len(parts) == 3 and [200 <= size < 240 for size in sizes] == [True, True, False]
  assert buckets.count("write", "*-000001") == 1 + 4  # lines 1 to 4, and with each of 5 to 8
  writer.close()
  assert steps() == list(range(1, 21))


def test_resuming_drops_what_comes_again(buckets):
  """Whether the checkpoint's step lies in the file, at its end, or in the parts."""
  for resumed, wanted in (
    (0, []),
    (4, [1, 2, 3, 4]),
    (4, [1, 2, 3, 4]),
    (6, [*range(1, 7)]),
    (1, [1]),
  ):
    writer = metrics.JsonlWriter(PATH, resumed)
    assert steps() == wanted
    assert objects(buckets) == ["run/metrics.jsonl"]
    write(writer, *range(resumed + 1, resumed + 5))
    writer.sync()
    killed(writer)
    assert steps() == [*wanted, *range(resumed + 1, resumed + 5)]


class Killed(BaseException):
  """Ends the process, at a request."""


def _run(buckets, kill_at: int | None) -> None:
  """Two lives, which are killed at that request, and then a third one that isn't."""
  for first, resumed in enumerate((0, 4, 4)):
    left = kill_at if first < 2 else None

    def counted(function, given=left):
      def wrapped(*args, **kwargs):
        nonlocal left
        if left is not None:
          if left == 0:
            raise Killed
          left -= 1
        return function(*args, **kwargs)

      return wrapped

    with pytest.MonkeyPatch.context() as patch:
      for name in ("upload", "remove"):
        patch.setattr(files.buckets, name, counted(getattr(files.buckets, name)))
      writer = None
      try:
        writer = metrics.JsonlWriter(PATH, resumed if saved(buckets) else 0)
        begin = (resumed if saved(buckets) else 0) + 1
        for step in range(begin, 10):
          write(writer, step)
          if step == 4:
            writer.sync()
            buckets.put(
              "bucket", "run/saved", b""
            )  # the checkpoint that the next life resumes from
        writer.close()
      except Killed:
        if writer is not None:
          killed(writer)
    found = steps()
    assert found == list(range(1, len(found) + 1)), (kill_at, first, found)
    if saved(buckets):
      assert len(found) >= 4, (kill_at, first, found)


def saved(buckets) -> bool:
  return "run/saved" in buckets.names("bucket")


def test_no_step_is_lost_or_doubled_by_a_kill_at_any_request(buckets, monkeypatch):
  """After each, what is there is the beginning of the run, up to the checkpoint at least."""
  monkeypatch.setattr(line_parts, "_LARGE", 60)
  monkeypatch.setattr(line_parts, "_SECONDS", 0.0)
  for kill_at in range(16):
    buckets.reset("bucket")
    _run(buckets, kill_at)
    assert steps() == list(range(1, 10))
    assert objects(buckets) == ["run/metrics.jsonl"]


@pytest.mark.parametrize("kind", ["503", "lost", "cut", "timeout"])
@pytest.mark.parametrize("operation", ["write", "read", "list", "delete"])
def test_one_failure_of_any_request_loses_nothing(buckets, monkeypatch, operation, kind):
  write(writer := metrics.JsonlWriter(PATH, 0), 1, 2, 3, 4)
  writer.sync()
  killed(writer)
  monkeypatch.setattr(buckets, "hold_s", 0.1)
  buckets.fail(operation, "bucket/*", kind)
  write(writer := metrics.JsonlWriter(PATH, 3), 4, 5)
  writer.close()
  assert steps() == [1, 2, 3, 4, 5]
  assert buckets.unspent() == 0
  assert objects(buckets) == ["run/metrics.jsonl"]


def test_a_bucket_that_is_away_costs_nothing_but_time(buckets, monkeypatch):
  """`sync` tells, so that no checkpoint comes before its metrics; the lines wait in memory, in order."""
  writer = metrics.JsonlWriter(PATH, 0)
  buckets.refusing["bucket"] = {"write"}
  monkeypatch.setattr(line_parts, "_SECONDS", 0.0)
  write(writer, 1, 2, 3)
  with pytest.raises(BucketError, match=r"metrics.jsonl.*no right"):
    writer.sync()
  assert steps() == []
  buckets.refusing.clear()
  write(writer, 4)
  writer.sync()
  assert steps() == [1, 2, 3, 4]
  writer.close()


def test_a_process_that_was_given_up_and_lives_on_changes_nothing(buckets):
  """It began before, and what it still uploads isn't read, though both follow the same lines."""
  write(given_up := metrics.JsonlWriter(PATH, 0), 1)
  given_up.sync()
  write(writer := metrics.JsonlWriter(PATH, 0), 1, 2)
  writer.sync()
  write(given_up, 2, 3)
  given_up.sync()
  assert steps() == [1, 2]
  write(writer, 3)
  writer.close()
  assert steps() == [1, 2, 3]
  killed(given_up)


def test_a_reader_beside_a_run_that_ends(buckets, monkeypatch):
  """What it has listed is joined before it is read: it reads again."""
  write(writer := metrics.JsonlWriter(PATH, 0), 1, 2)
  writer.sync()
  names, ended = files.names, []

  def listed(folder):
    found = names(folder)
    if not ended:
      ended.append(True)
      writer.close()
    return found

  monkeypatch.setattr(files, "names", listed)
  assert steps() == [1, 2] and ended


def test_a_folder_copied_from_a_bucket_goes_on_on_a_disk(buckets, tmp_path):
  write(writer := metrics.JsonlWriter(PATH, 0), 1, 2, 3)
  writer.sync()
  killed(writer)
  for name in objects(buckets):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buckets.content("bucket", name))
  local = tmp_path / "run" / "metrics.jsonl"
  assert steps(local) == [1, 2, 3]
  write(writer := metrics.JsonlWriter(str(local), 2), 3, 4)
  writer.close()
  assert steps(local) == [1, 2, 3, 4]
  assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


def test_copies_have_the_parts_too(buckets):
  write(writer := metrics.JsonlWriter(PATH, 0), 1, 2)
  writer.sync()
  metrics.copy(PATH, "gs://bucket/branch/metrics.jsonl")
  assert steps("gs://bucket/branch/metrics.jsonl") == [1, 2]
  assert buckets.names("bucket", "branch/") == ["branch/metrics.jsonl"]
  metrics.copy("gs://bucket/none/metrics.jsonl", "gs://bucket/other/metrics.jsonl")
  assert not buckets.names("bucket", "other/")
  writer.close()


def test_a_workdir_that_lost_the_file_has_none_of_its_parts(buckets):
  """A start was forgotten: its parts, which follow nothing now, aren't those of the next one."""
  write(writer := metrics.JsonlWriter(PATH, 0), 1, 2)
  writer.sync()
  killed(writer)
  files.remove(PATH)
  assert steps() == []
  write(writer := metrics.JsonlWriter(PATH, 0), 1)
  writer.close()
  assert steps() == [1] and objects(buckets) == ["run/metrics.jsonl"]


def test_curves_of_a_run_in_a_bucket_that_goes_on(buckets, tmp_path):
  write(writer := metrics.JsonlWriter(PATH, 0), 1, 2, 3)
  writer.sync()
  assert curves.draw_curve("gs://bucket/run", str(tmp_path / "loss.png"))
  assert not curves.draw_curve("gs://bucket/other", str(tmp_path / "none.png"))
  writer.close()


class FakeBoard:
  def __init__(self, folder, purge_step=None):
    os.makedirs(folder)
    self.path = os.path.join(folder, f"events.{purge_step}")

  SummaryWriter = __init__

  def add_scalar(self, name, value, step):
    with open(self.path, "a") as file:
      file.write(f"{name} {step}\n")

  add_image = flush = close = lambda self, *args, **kwargs: None


def test_tensorboard_in_a_bucket_has_the_events_up_to_every_checkpoint(buckets, monkeypatch):
  module = type("tensorboardX", (), {"SummaryWriter": FakeBoard})
  monkeypatch.setitem(sys.modules, "tensorboardX", module)
  for resumed in (0, 2):  # a life that is killed, and the next, whose files are its own
    writers = metrics.Writers([metrics.TensorBoardWriter("gs://bucket/run", resumed)])
    writers.write(resumed + 1, {"loss": 1.0})
    writers.write(resumed + 2, {"loss": 1.0})
    writers.sync()
    writers.write(resumed + 3, {"loss": 1.0})
  assert buckets.names("bucket") == ["run/tensorboard/events.1", "run/tensorboard/events.3"]
  assert buckets.content("bucket", "run/tensorboard/events.1") == b"loss 1\nloss 2\n"
  writers.close()
  assert buckets.content("bucket", "run/tensorboard/events.3") == b"loss 3\nloss 4\nloss 5\n"


def test_wandb_of_a_run_in_a_bucket_goes_on_with_the_same_run(buckets, monkeypatch, tmp_path):
  calls = []

  class Fake:
    id = "abc"

    def init(self, **settings):
      calls.append(settings)
      return self

    def finish(self):
      pass

  monkeypatch.setitem(sys.modules, "wandb", Fake())
  for _ in range(2):
    metrics.WandbWriter("gs://bucket/runs/digits", {}, "igpt").close()
  assert [call["id"] for call in calls] == [None, "abc"]
  assert calls[0]["name"] == "digits" and calls[0]["dir"].startswith(str(tmp_path / "scratch"))
  assert buckets.names("bucket") == ["runs/digits/wandb_run_id"]


def test_all_kinds_of_numbers_come_back(buckets):
  writer = metrics.JsonlWriter(PATH, 0)
  writer.write(1, {"loss": 0.1, "nan": float("nan"), "large": 1e300, "whole": 2**60})
  writer.close()
  (record,) = metrics.read_jsonl(PATH)
  assert np.isnan(record.pop("nan"))
  assert record == {"step": 1, "loss": 0.1, "large": 1e300, "whole": 2**60}


@pytest.mark.parametrize("resumed_at", [0, 2])
def test_a_writer_that_was_given_up_takes_nothing_from_the_one_that_goes_on(buckets, resumed_at):
  """A process may live on whose lock another start has taken over."""
  given_up = metrics.JsonlWriter(PATH, 0)
  write(given_up, 1, 2)
  given_up.sync()
  writer = metrics.JsonlWriter(PATH, resumed_at)
  write(writer, *range(resumed_at + 1, 5))
  writer.sync()
  write(given_up, 3)
  given_up.close()
  write(writer, 5, 6)
  writer.sync()
  assert steps() == [1, 2, 3, 4, 5, 6]
  writer.close()
  assert steps() == [1, 2, 3, 4, 5, 6]
