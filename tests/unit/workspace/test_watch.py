"""Watching a run: each whole checkpoint once, none by halves, and an end."""

import json
import os
import shutil
import threading
import time

import pytest

from igpt_jax import checkpoint
from igpt_jax.checkpoint import folders
from igpt_jax.config.fields import Settings
from igpt_jax.errors import UserError
from igpt_jax.workspace import checkpoint_tokens, provenance, rollbacks, watch
from support.tiny import settings_of


@pytest.fixture
def whole(monkeypatch):
  """A checkpoint is whole here when there is a file in it, which says what its parameters are; making
  real ones is other tests' matter."""

  def describe(path):
    try:
      with open(os.path.join(path, "whole"), encoding="utf-8") as file:
        return file.read()
    except FileNotFoundError:
      raise UserError(f"checkpoint: {path} can't be read") from None

  monkeypatch.setattr(
    folders, "is_whole", lambda folder: os.path.exists(os.path.join(folder, "whole"))
  )
  monkeypatch.setattr(checkpoint, "describe", describe)
  monkeypatch.setattr(checkpoint_tokens, "with_palette", lambda found, config: found)
  monkeypatch.setattr(provenance, "of_checkpoint", lambda found: {"parameters": found})
  monkeypatch.setattr(provenance, "of_run", lambda found: "a run")
  monkeypatch.setattr(provenance, "seeds_of", lambda found: (0, 0))


def write(workdir, step, whole=True, parameters="first"):
  folder = workdir / "checkpoints" / str(step)
  folder.mkdir(parents=True, exist_ok=True)
  if whole:
    (folder / "whole").write_text(parameters)
  return folder


def end(workdir, steps=100, at=100):
  (workdir / "config.json").write_text(json.dumps({"train": {"steps": steps}}))
  (workdir / "training.json").write_text(json.dumps({"step": at}))


def config_of(**changes) -> Settings:
  return settings_of(changes={"job": "evaluate", "watch": True, "watch_seconds": 0.01, **changes})


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
  def settings(config):
    return {"evaluate.images": config.evaluate.images}

  return watch.run(config, str(workdir), "evaluation.json", one, settings)


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
    (half / "whole").write_text("first")
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


def test_a_checkpoint_written_just_before_the_end_is_not_missed(tmp_path, whole, monkeypatch):
  """The last one appears, and the run ends, right after the checkpoints were looked at."""
  write(tmp_path, 20)
  (tmp_path / "evaluate").mkdir()
  list_steps, seen = checkpoint.whole_steps, []

  def whole_steps(workdir):
    steps = list_steps(workdir)
    if seen == [20] and steps == [20]:
      write(tmp_path, 100)
      end(tmp_path)
    return steps

  monkeypatch.setattr(checkpoint, "whole_steps", whole_steps)
  run(config_of(watch_seconds=0.0), tmp_path, recorder(seen))
  assert seen == [20, 100]


def test_a_step_that_was_written_again_is_done_again(tmp_path, whole, capsys):
  """After a rollback, or in a workdir made anew."""
  for step in (20, 40):
    write(tmp_path, step)
  end(tmp_path)
  seen = []
  run(config_of(), tmp_path, recorder(seen))
  old = tmp_path / "evaluate" / "40"
  (old / "probe_sgd").mkdir()
  write(tmp_path, 40, parameters="second")
  made_from = run(config_of(), tmp_path, recorder(seen))
  assert seen == [20, 40, 40]
  assert made_from["checkpoint"] == {"parameters": "second"}
  assert "parameters: first there, second here" in capsys.readouterr().out
  # Nothing of the other one is in the way; it is put aside.
  assert sorted(os.listdir(old)) == ["evaluation.json", "made_from.json"]
  assert (tmp_path / "evaluate" / "40.before" / "probe_sgd").is_dir()
  write(tmp_path, 40, parameters="third")
  run(config_of(), tmp_path, recorder(seen))
  run(config_of(), tmp_path, recorder(seen))
  assert seen == [20, 40, 40, 40]


def test_a_step_that_the_run_went_back_behind_has_no_numbers(tmp_path, whole, monkeypatch):
  """Until it is written again, also where retention deletes what was written before it is seen."""
  for step in (20, 40, 60):
    write(tmp_path, step)
  end(tmp_path)
  seen = []
  run(config_of(), tmp_path, recorder(seen))
  for step in (40, 60):
    shutil.rmtree(tmp_path / "checkpoints" / str(step))
  rollbacks.record(str(tmp_path), {"step": 65, "what": "rollback", "to": 20})
  order = rollbacks.order_seeds(str(tmp_path), 0)[-1]
  monkeypatch.setattr(provenance, "seeds_of", lambda found: (0, 0 if found == "first" else order))
  run(config_of(), tmp_path, recorder(seen))
  kept = sorted(os.listdir(tmp_path / "evaluate"))
  assert kept == ["20", "40.before", "60.before"] and seen == [20, 40, 60]
  write(tmp_path, 60, parameters="second")
  for _ in range(2):  # what was written since stays
    run(config_of(), tmp_path, recorder(seen))
  assert sorted(os.listdir(tmp_path / "evaluate")) == ["20", "40.before", "60", "60.before"]
  assert seen == [20, 40, 60, 60]


def test_a_decay_that_the_run_has_left_has_no_numbers(tmp_path, whole):
  """The run trains longer from before it, and makes those steps anew."""
  for step in (20, 40, 60):
    write(tmp_path, step)
  end(tmp_path)
  seen = []
  run(config_of(), tmp_path, recorder(seen))
  for step in (40, 60):
    target = tmp_path / "decays" / "30-60-1-sqrt" / "checkpoints" / str(step)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(tmp_path / "checkpoints" / str(step), target)
  write(tmp_path, 60, parameters="second")
  for _ in range(2):
    run(config_of(), tmp_path, recorder(seen))
  kept = sorted(os.listdir(tmp_path / "evaluate"))
  assert kept == ["20", "40.before", "60", "60.before"] and seen == [20, 40, 60, 60]


def test_a_step_that_vanishes_into_a_decay_is_done_when_it_is_made_again(tmp_path, whole):
  """Moved away while it is read, it is passed over, but not what the run then makes in its place."""
  for step in (20, 40, 60):
    write(tmp_path, step)
  seen, aside = [], tmp_path / "decays" / "30-60-1-sqrt" / "checkpoints"

  def leave(step):
    if step == 40 and not aside.exists():
      aside.mkdir(parents=True)
      for each in (40, 60):
        os.rename(tmp_path / "checkpoints" / str(each), aside / str(each))
      raise UserError("it can't be read")
    if step == 80:
      end(tmp_path)

  passed_over = watch._Watch.pass_over

  def pass_over(self, step):
    passed_over(self, step)
    write(tmp_path, 40, parameters="second")
    write(tmp_path, 80)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(watch._Watch, "pass_over", pass_over)
    run(config_of(), tmp_path, recorder(seen, leave))
  assert seen == [20, 40, 80]


def test_other_settings_are_other_results(tmp_path, whole):
  write(tmp_path, 20)
  end(tmp_path)
  seen = []
  run(config_of(**{"evaluate.images": 5}), tmp_path, recorder(seen))
  run(config_of(**{"evaluate.images": 5}), tmp_path, recorder(seen))
  assert seen == [20]
  run(config_of(**{"evaluate.images": 7}), tmp_path, recorder(seen))
  assert seen == [20, 20]


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("evaluation.json", '{"nats'),
    ("evaluation.json", "[]"),
    ("made_from.json", '{"checkpoint": '),
    ("made_from.json", "{}"),
    ("made_from.json", None),  # as an older version left it
  ],
)
def test_what_is_damaged_or_doesnt_say_what_it_is_of_is_done_again(tmp_path, whole, name, text):
  write(tmp_path, 20)
  end(tmp_path)
  seen = []
  run(config_of(), tmp_path, recorder(seen))
  kept = tmp_path / "evaluate" / "20" / name
  kept.unlink() if text is None else kept.write_text(text)
  run(config_of(), tmp_path, recorder(seen))
  assert seen == [20, 20]


@pytest.mark.parametrize("text", ['{"step": ', "[]", "{}", '{"step": "x"}'])
def test_a_damaged_end_is_said(tmp_path, whole, text):
  write(tmp_path, 20)
  end(tmp_path)
  (tmp_path / "training.json").write_text(text)
  with pytest.raises(UserError, match=r"config\.watch: .*training\.json is damaged.*fix: "):
    run(config_of(), tmp_path, recorder([]))


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
  with pytest.raises(UserError, match=r"config\.watch: .* doesn't exist"):
    run(config_of(watch_patience=0.05, watch_seconds=0.01), tmp_path / "absent", recorder([]))


def test_a_run_that_begins_later_is_waited_for(tmp_path, whole, monkeypatch, capsys):
  late = tmp_path / "late"

  def begin(seconds):
    write(late, 20)
    end(late)

  monkeypatch.setattr("igpt_jax.workspace.watch.time.sleep", begin)
  seen = []
  run(config_of(watch_patience=3_600.0), late, recorder(seen))
  assert seen == [20]
  assert f"waiting for a run to begin in {late}" in capsys.readouterr().out


def test_results_that_name_settings_as_an_older_version_stand(tmp_path, whole):
  write(tmp_path, 20)
  end(tmp_path)
  seen = []

  def watched(per_image):
    decisive = {"sample.per_image": per_image, "train.max_to_keep": 3}
    watch.run(
      config_of(), str(tmp_path), "evaluation.json", recorder(seen), lambda settings: decisive
    )

  watched(4)
  path = tmp_path / "evaluate" / "20" / watch.MADE_FROM
  made_from = json.loads(path.read_text())
  made_from["settings"] = {"sample.per_picture": 4, "train.keep": 3}
  path.write_text(json.dumps(made_from))
  watched(4)
  assert seen == [20]
  watched(5)
  assert seen == [20, 20]
