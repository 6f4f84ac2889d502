"""A run that has ended has left its results, whenever it was killed; one that goes on again has none."""

import gc
import json
import shutil

import pytest

from igpt_jax import checkpoint
from igpt_jax.checkpoint.process_wide import ignore_followup_errors
from igpt_jax.jobs import pretrain
from igpt_jax.reporting import metrics, summary
from igpt_jax.runner import goodput, loop, pretraining
from igpt_jax.workspace import watch
from support.quickstart import shrunk
from support.tiny import Killed, on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")

RESULTS = ("training.json", "loss.png", "summary.md")


def training(workdir):
  return json.loads((workdir / "training.json").read_text())


def results(workdir):
  return {name: (workdir / name).read_bytes() for name in RESULTS}


# What is called after the last checkpoint is there, in order.
AFTER = {
  "the clock": (goodput.Clock, "end"),
  "the curve": (pretraining, "draw_curve"),
  "training.json": (summary, "write_json"),
  "the summary": (summary, "write_summary"),
}


@pytest.mark.parametrize("place", AFTER)
def test_what_a_killed_run_has_not_left_is_left_by_the_next_start(
  tiny_run, tmp_path, monkeypatch, place
):
  """And then no start changes it any more."""
  with monkeypatch.context() as patch:
    owner, name = AFTER[place]
    original = getattr(owner, name)

    def killed(*arguments):
      # goodput.json is written by write_json, too.
      if place == "training.json" and not str(arguments[0]).endswith("training.json"):
        return original(*arguments)
      raise Killed

    patch.setattr(owner, name, killed)
    with pytest.raises(Killed):
      on_one_device(pretrain, shrunk(), str(tmp_path))
  assert checkpoint.latest_step(str(tmp_path)) == 12
  assert watch._training_has_ended(str(tmp_path)) == (place == "the summary")

  on_one_device(pretrain, shrunk(), str(tmp_path))
  assert watch._training_has_ended(str(tmp_path))
  values, expected = training(tmp_path), training(tiny_run)
  assert values.keys() >= {"goodput", "seconds", "starts"} and values["elapsed_seconds"] > 0
  assert values.keys() - {"data_wait"} == expected.keys() - {"data_wait"}
  assert values["starts"] == (2 if place == "the clock" else 1)
  written = metrics.newest(tmp_path / "metrics.jsonl")
  assert written.items() <= values.items()
  for name in ("step", "parameters", "loss", "validation_loss", "grad_norm"):
    assert values[name] == expected[name], name
  assert f"validation {values['validation_loss']:.4f}" in (tmp_path / "summary.md").read_text()

  before = results(tmp_path)
  on_one_device(pretrain, shrunk(), str(tmp_path))
  assert results(tmp_path) == before


def test_a_damaged_training_json_is_written_again(tiny_run, tmp_path):
  shutil.copytree(tiny_run, tmp_path / "run")
  (tmp_path / "run" / "training.json").write_text('{"step": 1')
  on_one_device(pretrain, shrunk(), str(tmp_path / "run"))
  found, expected = training(tmp_path / "run"), training(tiny_run)
  assert found.pop("elapsed_seconds") > 0 and expected.pop("elapsed_seconds") > 0
  assert found == expected


def test_a_run_that_goes_on_again_has_not_ended(tiny_run, tmp_path, monkeypatch, recwarn):
  """Its last checkpoint is damaged: nobody is told that it ended until it has, with the same numbers."""
  workdir = tmp_path / "run"
  shutil.copytree(tiny_run, workdir)
  for path in (workdir / "checkpoints" / "12" / "params").glob("**/d/*"):
    path.write_bytes(b"")
  seen, asked = [], loop.StopSignal.asked

  def looked_at(self, at_step):
    seen.append((at_step, watch._training_has_ended(str(workdir))))
    if at_step == 10 and len(seen) < 4:
      self.requested = "SIGTERM"
    return asked(self, at_step)

  monkeypatch.setattr(loop.StopSignal, "asked", looked_at)
  on_one_device(pretrain, shrunk(), str(workdir))
  assert seen == [(8, False), (9, False), (10, False)]
  assert not (workdir / "training.json").exists()
  gc.collect()
  assert not [each for each in recwarn if "never awaited" in str(each.message)]
  on_one_device(pretrain, shrunk(), str(workdir))
  assert seen[3:] == [(10, False), (11, False)]
  assert watch._training_has_ended(str(workdir))
  for name in ("step", "loss", "validation_loss", "grad_norm"):
    assert training(workdir)[name] == training(tiny_run)[name], name


def test_an_error_leaves_the_process_as_it_was(tmp_path, monkeypatch):
  """Nothing stays replaced or open for the next run in the process."""
  blocks, closed = ignore_followup_errors._blocks, []  # other tests may have left some

  def failing(*args):
    assert ignore_followup_errors._blocks == blocks + 1
    raise RuntimeError("out of memory")

  close = metrics.Writers.close
  monkeypatch.setattr(loop, "run", failing)
  monkeypatch.setattr(metrics.Writers, "close", lambda self: (close(self), closed.append(self)))
  with pytest.raises(RuntimeError, match="out of memory"):
    on_one_device(pretrain, shrunk(), str(tmp_path))
  assert ignore_followup_errors._blocks == blocks and len(closed) == 1
