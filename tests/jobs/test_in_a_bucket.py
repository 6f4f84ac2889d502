"""The quickstart with --workdir=gs://…: what a disk would hold, number for number, and nothing on a disk."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from igpt_jax import buckets as buckets_lib
from igpt_jax import checkpoint, files
from igpt_jax.checkpoint import folders
from igpt_jax.errors import BucketError, UserError
from igpt_jax.jobs import convert, evaluate, finetune, pretrain, probe, sample
from igpt_jax.reporting import metrics
from igpt_jax.workspace import lock, places
from igpt_jax.workspace import workdir as workdir_lib
from support.quickstart import assert_same, call, params_of, shrunk, stop_at
from support.tiny import on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")

RUN = "gs://bucket/run"
_OF_THE_CLOCK = {"images_per_second", "data_wait", "elapsed_seconds", "tokens_per_second"}


@pytest.fixture(autouse=True)
def nothing_on_a_disk():
  """An address that is taken for a local path makes a folder gs: where the program runs."""
  yield
  made = os.path.abspath("gs:")
  there = os.path.lexists(made)
  shutil.rmtree(made, ignore_errors=True)
  assert not there


def numbers(workdir):
  """A run's metrics, without what is of the clock."""
  return [
    {name: value for name, value in record.items() if name in ("step", "loss", "validation_loss")}
    for record in metrics.read_jsonl(os.path.join(workdir, "metrics.jsonl"))
  ]


def result(workdir, name):
  """A job's results, without what names the place or is of the clock."""
  values = files.read_json(os.path.join(workdir, name))
  return {
    name: value for name, value in values.items() if name != "checkpoint" and "second" not in name
  }


def test_the_quickstart(buckets, tiny_run):
  """It is stopped and resumed, and becomes the run that a disk holds, bit for bit."""
  with pytest.MonkeyPatch.context() as patch:
    stop_at(patch, 5)
    on_one_device(pretrain, shrunk(), RUN)
  assert checkpoint.whole_steps(RUN) == [4, 5]
  on_one_device(pretrain, shrunk(), RUN)
  assert numbers(RUN) == numbers(str(tiny_run))
  assert_same(params_of(RUN), params_of(tiny_run))
  assert checkpoint.whole_steps(RUN)[-1] == 12 and not files.exists(f"{RUN}/.lock")
  ours, theirs = (result(each, "training.json") for each in (RUN, str(tiny_run)))
  assert (ours["step"], ours["loss"]) == (theirs["step"], theirs["loss"])
  made = {"config.json", "goodput.json", "loss.png", "palette.npy", "summary.md", "metrics.jsonl"}
  assert made <= set(files.names(RUN))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("job", "name"), [(evaluate, "evaluation.json"), (sample, "sample.json"), (probe, "probe.json")]
)
@pytest.mark.parametrize("mixed", [False, True], ids=["in the bucket", "read from the bucket"])
def test_jobs_of_a_checkpoint(buckets, tiny_run, tmp_path, job, name, mixed):
  """Results are those of the same checkpoint on a disk, wherever they are written."""
  convert.run(shrunk(convert__source=str(tiny_run), convert__target=RUN), "")
  job.run(shrunk(checkpoint=str(tiny_run)), str(tmp_path / "there"))
  here = str(tmp_path / "here") if mixed else RUN
  job.run(shrunk(checkpoint=RUN if mixed else ""), here)
  assert result(here, name) == result(str(tmp_path / "there"), name)
  if job is sample:
    with files.opened(os.path.join(here, "samples.png")) as file:
      assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_checkpoint_is_whole_with_its_last_object(buckets, tmp_path):
  """What a kill leaves while a checkpoint is written isn't one, and is gone when the run goes on."""
  with pytest.MonkeyPatch.context() as patch:
    stop_at(patch, 4)
    on_one_device(pretrain, shrunk(train__steps=8), RUN)
  last = f"{RUN}/checkpoints/4/{folders._LAST_FILE}"
  files.copy_folder(f"{RUN}/checkpoints/4", f"{RUN}/checkpoints/8")
  files.remove(f"{RUN}/checkpoints/8/{folders._LAST_FILE}")
  assert checkpoint.whole_steps(RUN) == [4] and checkpoint.newest(RUN).step == 4
  on_one_device(pretrain, shrunk(train__steps=8), RUN)
  assert checkpoint.whole_steps(RUN) == [4, 8]
  whole = str(tmp_path / "whole")
  on_one_device(pretrain, shrunk(train__steps=8), whole)
  assert numbers(RUN)[-1] == numbers(whole)[-1]
  files.remove(last)
  assert checkpoint.whole_steps(RUN) == [8]


def test_removing_a_checkpoint_begins_with_its_last_object(buckets):
  """Orbax removes the oldest in an order that a kill can't make look whole, without bucket rights."""
  buckets.refusing = {"bucket": {"bucket"}}  # the bucket's own description
  on_one_device(pretrain, shrunk(train__max_to_keep=1), RUN)
  assert checkpoint.whole_steps(RUN) == [12]
  marker = f"bucket/run/checkpoints/4/{folders._LAST_FILE}"
  since = buckets.requests[buckets.requests.index(("write", marker)) :]
  removed = [name for what, name in since if what == "delete" and "/checkpoints/4/" in name]
  assert removed[0] == marker and len(removed) > 5


def test_models_are_converted_from_and_into_a_bucket(buckets, tiny_run, tmp_path):
  def to(source, target, kind):
    convert.run(
      shrunk(convert__source=str(source), convert__target=str(target), convert__format=kind), ""
    )

  to(tiny_run, f"{RUN}/model", "orbax")
  to(f"{RUN}/model", f"{RUN}/model.safetensors", "safetensors")
  to(f"{RUN}/model.safetensors", tmp_path / "model", "orbax")
  assert_same(params_of(tmp_path / "model"), params_of(tiny_run))
  for kind in ("safetensors", "orbax"):
    with pytest.raises(UserError, match="model exists; fix: name another"):
      to(tiny_run, f"{RUN}/model", kind)
  with pytest.raises(UserError, match="expected a local path for format huggingface"):
    to(tiny_run, f"{RUN}/hf", "huggingface")


@pytest.mark.slow
def test_fine_tuning_begins_from_a_bucket(buckets, tiny_run, tmp_path):
  settings = {"finetune__steps": 4, "finetune__batch_size": 16}
  convert.run(shrunk(convert__source=str(tiny_run), convert__target=RUN), "")
  finetune.run(shrunk(checkpoint=RUN, **settings), "gs://bucket/tuned")
  finetune.run(shrunk(checkpoint=str(tiny_run), **settings), str(tmp_path))
  theirs = {"start_checkpoint", "checkpoint"}
  ours, expected = (
    {
      k: v
      for k, v in result(os.path.join(each, "finetune"), "finetune.json").items()
      if k not in theirs
    }
    for each in ("gs://bucket/tuned", str(tmp_path))
  )
  assert ours["test_accuracy"] == expected["test_accuracy"]


def test_no_second_run_in_a_workdir(buckets, monkeypatch):
  """Another owner is refused with the command that frees the lock; the same owner goes on at once."""
  monkeypatch.setenv(lock.OWNER, "ours")
  with lock.held(RUN) as first:
    first.check()
    monkeypatch.setenv(lock.OWNER, "theirs")
    with (
      pytest.raises(UserError, match=r"in use by another run \(owner ours") as refused,
      lock.held(RUN),
    ):
      pass
    assert f"gcloud storage rm {RUN}/.lock" in str(refused.value)
    monkeypatch.setenv(lock.OWNER, "ours")
    with lock.held(RUN) as second:
      second.check()
      with pytest.raises(UserError, match="another start has taken this run's lock over"):
        first.check()
    assert not files.exists(f"{RUN}/.lock")
  assert not files.exists(f"{RUN}/.lock")


def test_without_an_owner_a_dead_process_lock_is_taken_over(buckets, monkeypatch):
  monkeypatch.delenv(lock.OWNER, raising=False)
  with lock.held(RUN):
    with pytest.raises(UserError, match="in use by another run"), lock.held(RUN):  # it lives
      pass
    with files.opened(f"{RUN}/.lock") as file:
      left = json.loads(file.read())
  for change, taken in (
    ({"process": 2**22 + 1}, True),
    ({"process": 2**22 + 1, "place": "another boot"}, False),
    ({"process": 2**22 + 1, "host": "another"}, False),
    ({"process": 2**22 + 1, "owner": "launcher"}, False),
  ):
    buckets_lib.write(f"{RUN}/.lock", json.dumps(left | change).encode())
    if taken:
      with lock.held(RUN) as mine:
        mine.check()
    else:
      with pytest.raises(UserError, match="fix: wait until that has ended, or"), lock.held(RUN):
        pass
  buckets_lib.write(f"{RUN}/.lock", b"no JSON")
  with pytest.raises(UserError, match=r"\(unknown\)"), lock.held(RUN):
    pass


def test_a_run_whose_lock_was_taken_saves_nothing_more(buckets, monkeypatch):
  real = lock._BucketLock.check

  def taken(self):
    if checkpoint.whole_steps(RUN):
      buckets_lib.write(self._path, b"{}")
    real(self)

  monkeypatch.setattr(lock._BucketLock, "check", taken)
  with pytest.raises(UserError, match="nothing more is saved here"):
    on_one_device(pretrain, shrunk(), RUN)
  assert checkpoint.whole_steps(RUN) == [4]
  with files.opened(f"{RUN}/.lock") as file:
    assert file.read() == b"{}"  # it isn't this run's to remove


@pytest.mark.parametrize(
  ("workdir", "settings", "refusing", "why"),
  [
    ("gs://other/run", {}, (), r"--workdir: gs://other/run: there is no bucket other; fix: "),
    (RUN, {}, ("list",), r"--workdir: gs://bucket/run: no right to do this .*fix: grant"),
    (
      RUN, {"init_from": "gs://missing/x"}, (),
      r"config\.init_from: gs://missing/x: there is no bucket",
    ),
    ("gs://bucket/file", {}, (), r"--workdir: gs://bucket/file: gs://bucket/file isn't a folder"),
  ],
)  # fmt: skip
def test_a_bucket_is_looked_at_before_anything_else(buckets, workdir, settings, refusing, why):
  buckets_lib.write("gs://bucket/file", b"in the way")
  buckets.refusing = {"bucket": set(refusing)}
  with pytest.raises(UserError, match=why) as refused:
    places.check(shrunk(**settings), workdir)
  assert "\n" not in str(refused.value)
  assert buckets.names("bucket") == ["file"]


@pytest.mark.parametrize("operation", ["write", "delete"])
def test_no_right_to_write_is_told_before_training(buckets, operation):
  buckets.refusing = {"bucket": {operation}}
  with pytest.raises(BucketError, match="workdir: gs://bucket/run: no right to do this"):
    on_one_device(pretrain, shrunk(), RUN)
  assert all(".writable." in name for name in buckets.names("bucket"))


def test_a_clock_that_differs_is_told(buckets, monkeypatch, capsys):
  for ahead, told in (
    (30.0, ""),
    (300.0, "ahead of the bucket's"),
    (-7200.0, "behind the bucket's"),
  ):
    monkeypatch.setattr(buckets_lib, "check_writable", lambda folder, ahead=ahead: ahead)
    workdir_lib.open_workdir(RUN)
    said = capsys.readouterr().out
    assert told in said if told else not said


def test_the_command_ends_in_a_line(buckets):
  """Runs the command as a person does: a bucket that isn't there, and a typo, end with 2, in one line."""
  for workdir, why in (
    ("gs://nowhere/run", "there is no bucket nowhere"),
    ("gs:/bucket/run", "two slashes after gs:"),
    ("gs://", "there is no bucket in it"),
  ):
    ended = call("configs/quickstart.py", workdir)
    assert ended.returncode == 2 and why in ended.stderr, ended.stderr
    assert len(re.findall(r"\n", ended.stderr.strip())) == 0 and "Traceback" not in ended.stderr
  assert buckets.names("bucket") == []


@pytest.mark.slow
def test_parameters_start_from_a_bucket(buckets, tiny_run):
  convert.run(shrunk(convert__source=str(tiny_run), convert__target=f"{RUN}/start"), "")
  on_one_device(pretrain, shrunk(init_from=f"{RUN}/start", train__steps=2), f"{RUN}/new")
  moved = np.abs(params_of(f"{RUN}/new")["wpe"] - params_of(tiny_run)["wpe"]).max()
  assert moved < 0.1
