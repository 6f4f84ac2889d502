"""Watching a run: each whole checkpoint once, none by halves, and an end."""

import json
import os
import shutil
import threading
import time

import pytest
from ml_collections import ConfigDict

from igpt_jax import config as config_lib
from igpt_jax.checkpoint import folders
from igpt_jax.errors import UserError
from igpt_jax.jobs import watch


@pytest.fixture
def whole(monkeypatch):
  """A checkpoint is whole here when there is a file in it; making real ones is other tests' matter."""
  monkeypatch.setattr(
    folders, "is_whole", lambda folder: os.path.exists(os.path.join(folder, "whole"))
  )


def write(workdir, step, whole=True):
  folder = workdir / "checkpoints" / str(step)
  folder.mkdir(parents=True, exist_ok=True)
  if whole:
    (folder / "whole").touch()
  return folder


def end(workdir, steps=100, at=100):
  (workdir / "config.json").write_text(json.dumps({"train": {"steps": steps}}))
  (workdir / "training.json").write_text(json.dumps({"step": at}))


def config_of(**changes) -> ConfigDict:
  config = config_lib.base()
  config.job, config.watch, config.watch_seconds = "evaluate", True, 0.01
  config.update_from_flattened_dict(changes)
  return config


def recorder(seen, then=None):
  def one(config, workdir, out):
    step = int(os.path.basename(config.checkpoint))
    assert os.path.exists(os.path.join(config.checkpoint, "whole"))
    assert out == os.path.join(workdir, "evaluate", str(step))
    if then is not None:
      then(step)
    seen.append(step)
    with open(os.path.join(out, "evaluation.json"), "w", encoding="utf-8") as file:
      file.write("{}")

  return one


def run(config, workdir, one):
  watch.run(config, str(workdir), "evaluation.json", one)


def test_without_watching_the_job_is_done_once(tmp_path):
  seen = []
  run(config_of(watch=False), tmp_path, lambda config, workdir, out: seen.append((workdir, out)))
  assert seen == [(str(tmp_path), str(tmp_path))]


def test_every_checkpoint_of_a_running_training(tmp_path, whole):
  write(tmp_path, 20), write(tmp_path, 40)

  def train():
    time.sleep(0.1)
    half = write(tmp_path, 60, whole=False)
    time.sleep(0.1)
    (half / "whole").touch()
    time.sleep(0.05)
    write(tmp_path, 100)
    end(tmp_path)

  training = threading.Thread(target=train)
  training.start()
  seen = []
  run(config_of(), tmp_path, recorder(seen))
  training.join()
  assert seen == [20, 40, 60, 100]
  run(config_of(), tmp_path, recorder(seen))  # again: all are done
  assert seen == [20, 40, 60, 100]


def test_one_that_is_deleted_while_it_is_read_is_passed_over(tmp_path, whole):
  for step in (20, 40):
    write(tmp_path, step)
  end(tmp_path)

  def retention(step):
    if step == 20:
      shutil.rmtree(tmp_path / "checkpoints" / "20")
      raise UserError("checkpoint: 20 can't be read")

  seen = []
  run(config_of(), tmp_path, recorder(seen, retention))
  assert seen == [40]


def test_another_mistake_ends_it(tmp_path, whole):
  write(tmp_path, 20)

  def refuse(step):
    raise UserError("data.resolution: 9")

  with pytest.raises(UserError, match="resolution"):
    run(config_of(), tmp_path, recorder([], refuse))


def test_a_training_that_was_stopped_is_waited_for_until_patience_ends(tmp_path, whole):
  write(tmp_path, 20)
  end(tmp_path, at=20)
  seen = []
  began = time.monotonic()
  run(config_of(watch_patience=0.2), tmp_path, recorder(seen))
  assert seen == [20]
  assert time.monotonic() - began >= 0.2


def test_another_workdirs_run(tmp_path, whole):
  write(tmp_path / "run", 20)
  end(tmp_path / "run")
  seen = []
  run(config_of(checkpoint=str(tmp_path / "run")), tmp_path / "results", recorder(seen))
  assert seen == [20]
  assert (tmp_path / "results" / "evaluate" / "20" / "evaluation.json").exists()
  assert not (tmp_path / "run" / "evaluate").exists()


def test_nothing_to_watch(tmp_path):
  with pytest.raises(UserError, match=r"config\.watch: .* doesn't exist"):
    run(config_of(), tmp_path / "absent", recorder([]))
