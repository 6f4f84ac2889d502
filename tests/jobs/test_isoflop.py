"""Job isoflop on the digits: from one command to a config file, killed and gone on with, and what it refuses."""

import csv
import importlib.util
import json
import math
import os
import shutil

import pytest

from igpt_jax import checkpoint
from igpt_jax.ablation import sequence
from igpt_jax.config import saved
from igpt_jax.config.fields import FIELDS
from igpt_jax.config.read import settings_of
from igpt_jax.errors import UserError
from igpt_jax.isoflop import config_file, report
from igpt_jax.isoflop.ladder import LADDER
from igpt_jax.jobs import isoflop, pretrain
from igpt_jax.runner import loop
from igpt_jax.training.bad_numbers import BadNumbers
from support.quickstart import load_config, shrunk, stop_at
from support.tiny import Killed, on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")

SHAPES = ("2x12", "2x16", "3x16")
BUDGETS = (1e9, 2e9)


def study(**changes):
  """Three shapes at two budgets of some 50 to 250 steps of four images, and one of them at a third."""
  return shrunk(**{
    "job": "isoflop", "model.n_layer": 0, "model.n_head": 0, "model.n_embd": 0, "palette.size": 8,
    "train.steps": 1_000_000, "train.schedule": "wsd", "train.optimizer": "muon", "train.learning_rate": 8e-3,
    "train.batch_size": 4, "train.warmup_steps": 5, "train.eval_every": 0, "train.log_every": 5,
    "train.checkpoint_every": 50, "train.max_to_keep": 1, "isoflop.shapes": SHAPES,
    "isoflop.per_budget": 3, "isoflop.budgets": BUDGETS, "isoflop.held_out": 3e9,
    "isoflop.seeds": (0,), "isoflop.draws": 20, **changes,
  })  # fmt: skip


def rows_of(workdir):
  with open(workdir / report.RUNS, encoding="utf-8") as file:
    return list(csv.DictReader(file))


def folder_of(workdir, row):
  return workdir / "isoflop" / row["shape"] / row["seed"] / row["budget"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """The workdir of a study that nothing has interrupted. To be copied, not written to."""
  workdir = tmp_path_factory.mktemp("isoflop") / "study"
  on_one_device(isoflop, study(), str(workdir))
  return workdir


def settings_of_json(path):
  return settings_of(saved.get_config(str(path)))


def load(path):
  """The config of a file that a study has written, and the file's docstring."""
  spec = importlib.util.spec_from_file_location("written", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return settings_of(module.get_config()), module.__doc__


# --- from begin to end -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_numbers(done, tmp_path):
  """Killed in a run that goes on from a trunk, and again before the run held out begins."""
  workdir = shutil.copytree(done, tmp_path / "study")
  for row in rows_of(done)[3:]:
    shutil.rmtree(folder_of(workdir, row))
  for name in (report.RUNS, report.NUMBERS, report.PAGE, "isoflop_3e9.py"):
    (workdir / name).unlink()
  began, pretraining = [], sequence.pretrain

  def tell(self, step, *rest, original=loop.Instruments.tell_training):
    if len(began) == 1 and step > 80:
      raise Killed
    original(self, step, *rest)

  def killed(settings, folder, *others, **named):
    began.append((os.path.relpath(folder, workdir / "isoflop"), checkpoint.latest_step(folder)))
    if len(began) == 5:
      raise Killed
    return pretraining(settings, folder, *others, **named)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sequence, "pretrain", killed)
    patch.setattr(loop.Instruments, "tell_training", tell)
    for _ in range(2):
      with pytest.raises(Killed):
        on_one_device(isoflop, study(), str(workdir))
    assert [row["status"] for row in rows_of(workdir)] == ["finished"] * 6
    on_one_device(isoflop, study(), str(workdir))
  folders = [folder for folder, _ in began]
  assert folders[0] == folders[1] and folders[4] == folders[5] and len(set(folders)) == 4
  assert all(begins for _, begins in began)  # none at step 0: each goes on from a trunk
  for name in (report.RUNS, report.NUMBERS, report.PAGE):
    assert (workdir / name).read_text() == (done / name).read_text()


@pytest.mark.slow
def test_budgets_are_met_and_trunks_shared(done):
  rows, before = rows_of(done), {}
  assert [row["shape"] for row in rows[:6]] == [*SHAPES, *SHAPES]
  assert [row["fitted"] for row in rows] == ["1"] * 6 + ["0"]
  for row in rows:
    steps = int(row["steps"])
    assert float(row["flops"]) == pytest.approx(float(row["budget"]), rel=0.01)
    assert float(row["flops"]) == steps * float(row["flops_per_step"])
    assert int(row["tokens"]) == steps * 4 * 64
    shared = before.get(row["shape"], 0)
    own = (steps - shared) * float(row["flops_per_step"])
    assert float(row["flops_beyond_trunk"]) == pytest.approx(own)
    before[row["shape"]] = steps - steps // 5  # where its decay begins
    result = json.loads((folder_of(done, row) / "training.json").read_text())
    assert (result["step"], result["parameters"]) == (steps, int(row["parameters"]))
    assert float(row["validation_loss"]) == result["validation_loss"] < math.log(8)
    assert row["status"] == "finished"


@pytest.mark.slow
def test_the_config_of_the_run_held_out_is_that_run(done, tmp_path):
  """Job pretrain makes of it, from step 0, what the study has made by branches from two trunks, bit for bit."""
  values, row = json.loads((done / report.NUMBERS).read_text()), rows_of(done)[-1]
  held, forecast = values["held_out"], values["held_out"]["forecast"]
  assert (held["budget"], held["shape"]) == (float(row["budget"]), row["shape"])
  assert held["reached"] == float(row["validation_loss"])
  assert forecast["low"] < forecast["value"] < forecast["high"]
  assert held["inside"] == (forecast["low"] <= held["reached"] <= forecast["high"])
  own, docstring = load(done / "isoflop_3e9.py")
  told = f"{forecast['value']:.4f} nats per token of validation, 90% interval {forecast['low']:.4f}"
  assert "3e9 FLOPs" in docstring and told in " ".join(docstring.split())
  on_one_device(pretrain, own, str(tmp_path / "plain"))
  ours, theirs = (
    checkpoint.describe(str(each)).sums for each in (folder_of(done, row), tmp_path / "plain")
  )
  assert ours["params"] == theirs["params"] and ours["training"] == theirs["training"]


@pytest.mark.slow
def test_the_page_and_the_pictures(done):
  text, values = (done / report.PAGE).read_text(), json.loads((done / report.NUMBERS).read_text())
  for part in ("## How to spend a budget", "## The run held out", "Chinchilla", "200 to 400"):
    assert part in text
  # Two budgets are never enough for an exponent.
  assert values["exponents"] is None and "no exponent is told: the minimum lies inside" in text
  assert values["fitted_runs"] == 6 and len(values["parabolas"]) == 2
  for name in ("slices", "frontier", "residuals", "compute"):
    assert (done / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_same_command_trains_nothing_and_writes_the_config_of_a_budget(
  done, tmp_path, monkeypatch, capsys
):
  workdir = shutil.copytree(done, tmp_path / "study")
  monkeypatch.setattr(sequence, "pretrain", None)
  on_one_device(isoflop, study(**{"isoflop.budget": 6e9}), str(workdir))
  own, _ = load(workdir / "isoflop_6e9.py")
  assert f"{own.model.n_layer}x{own.model.n_embd}" in [shape.name for shape in LADDER]
  assert own.job == "pretrain"
  said = capsys.readouterr().out
  assert said.count("7 of 7 trainings ended before") == 1 == said.count("ended before")
  assert "0:00:00 for what hasn't ended" in said
  assert (workdir / report.RUNS).read_text() == (done / report.RUNS).read_text()


@pytest.mark.slow
def test_a_signal_stops_it_and_is_told(tmp_path, monkeypatch, capsys):
  stop_at(monkeypatch, 20)
  on_one_device(isoflop, study(), str(tmp_path))
  assert "stopped by SIGTERM: saved; the same command goes on" in capsys.readouterr().out
  assert not (tmp_path / "isoflop_3e9.py").exists()


# --- what is refused, or isn't fitted --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"train.learning_rate": 4e-3}, r"holds another config's run:\n  train\.learning_rate: 0\.008 th"),
    ({"model.qk_norm": True}, r"model\.qk_norm: False there, True here"),
    ({"train.decay_shape": "linear"}, r"train\.decay_shape: 1-sqrt there, linear here"),
    ({"train.eval_images": 20}, r"train\.eval_images: 32 there, 20 here"),
    ({"data.validation": 0.2}, r"data\.validation: 0\.1 there, 0\.2 here"),
  ],
)  # fmt: skip
def test_another_study_in_its_workdir_is_refused(done, tmp_path, monkeypatch, changes, expected):
  """Nothing that was made otherwise is reported as this study's, or changed: the palette neither."""
  workdir = shutil.copytree(done, tmp_path / "study")
  monkeypatch.setattr(sequence, "pretrain", None)
  before = {path: path.read_bytes() for path in workdir.rglob("[!.]*") if path.is_file()}
  with pytest.raises(UserError, match=expected):
    on_one_device(isoflop, study(**changes), str(workdir))
  assert before == {path: path.read_bytes() for path in workdir.rglob("[!.]*") if path.is_file()}


@pytest.mark.slow
def test_a_budget_more_uses_what_is_there(done, tmp_path, monkeypatch):
  """One between two others goes on from the smaller one's trunk; a second seed begins by itself."""
  workdir, began = shutil.copytree(done, tmp_path / "study"), []

  def counted(settings, folder, *others, **named):
    began.append((os.path.relpath(folder, workdir / "isoflop"), checkpoint.latest_step(folder)))
    raise Killed

  monkeypatch.setattr(sequence, "pretrain", counted)
  more = {"isoflop.budgets": (1e9, 1.5e9, 2.5e9), "isoflop.held_out": 0.0}
  for changes in (more, {"isoflop.seeds": (0, 1)}):
    with pytest.raises(Killed):
      on_one_device(isoflop, study(**changes), str(workdir))
  (between, step), (seeded, start) = began
  row = next(row for row in rows_of(done) if row["shape"] == between.split("/")[0])
  assert between.endswith("/0/1.5e9") and step == int(row["steps"]) - int(row["steps"]) // 5
  assert seeded == "2x16/1/1e9" and start is None


@pytest.mark.slow
def test_results_stay_until_a_study_that_goes_on_tells_as_much(done, tmp_path, monkeypatch):
  """The first run that ends of a study with a seed more leaves those of the other budgets in the results."""
  workdir = shutil.copytree(done, tmp_path / "study")

  def diverges(settings, folder, *others, **named):
    if folder.endswith("1e9"):
      os.makedirs(folder)
      raise BadNumbers("not finite", 7, 0, False)
    raise Killed

  monkeypatch.setattr(sequence, "pretrain", diverges)
  with pytest.raises(Killed):
    on_one_device(isoflop, study(**{"isoflop.seeds": (0, 1)}), str(workdir))
  for name in (report.RUNS, report.NUMBERS, report.PAGE):
    assert (workdir / name).read_text() == (done / name).read_text()
  monkeypatch.undo()
  on_one_device(isoflop, study(**{"isoflop.seeds": (0, 1), "isoflop.held_out": 0.0}), str(workdir))
  statuses = [row["status"] for row in rows_of(workdir)]
  assert statuses.count("diverged at step 7") == 1 and statuses.count("finished") == 7


@pytest.mark.slow
def test_a_run_that_diverged_is_marked_and_not_fitted(done, tmp_path, capsys):
  workdir = shutil.copytree(done, tmp_path / "study")
  row = rows_of(done)[2]
  result = workdir / "isoflop" / row["shape"] / row["seed"] / row["budget"] / "training.json"
  values = json.loads(result.read_text())
  result.write_text(json.dumps({**values, "validation_loss": float("nan")}))
  on_one_device(isoflop, study(**{"isoflop.held_out": 0.0}), str(workdir))
  rows = rows_of(workdir)
  assert rows[2]["status"] == f"diverged at step {row['steps']}"
  assert rows[2]["validation_loss"] == "" and rows[2]["fitted"] == "0"
  assert json.loads((workdir / report.NUMBERS).read_text())["fitted_runs"] == 5
  # The run held out of the plan before.
  held = os.path.relpath(folder_of(done, rows_of(done)[-1]), done)
  assert f"1 run of {workdir}/isoflop are no part of this plan" in (said := capsys.readouterr().out)
  assert f"aren't fitted: {held}" in said


def test_unknown_shapes_and_small_budgets_are_refused_before_anything_is_trained(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(sequence, "pretrain", None)
  for changes, expected in (
    (
      {"isoflop.shapes": ("2x12", "2x16", "2x17")},
      r"shapes: '2x17'; expected shapes of the ladder",
    ),
    ({"isoflop.budgets": (1e5, 1e9)}, r"budgets: 1e5 on 2x12: less than one batch of 4 images"),
    (
      {"isoflop.beyond": "refuse", "isoflop.max_epochs": 0.1},
      r"epochs of .* images; expected isof",
    ),
    (
      {"isoflop.beyond": "refuse", "isoflop.max_epochs": 5.0, "isoflop.held_out": 1e11},
      r"held_out: 1e11 on .*: .* epochs of .* images; expected isof",
    ),
    ({"isoflop.budget": 1e5}, r"budget: 1e5 on 2x12: less than one batch of 4 images"),
    (
      {"train.warmup_steps": 999},
      r"warmup_steps: 999; .*; fix: larger budgets, or fewer train\.warm",
    ),
  ):
    with pytest.raises(UserError, match=expected):
      on_one_device(isoflop, study(**changes), str(tmp_path / "study"))


def test_it_reads_what_job_ablate_trains_with():
  reads = {name for name, declared in FIELDS.items() if "pretrain" in declared.jobs}
  ours = {name for name, declared in FIELDS.items() if "isoflop" in declared.jobs}
  assert reads - ours == {name for name in FIELDS if name.startswith("sizing.")}
  assert {name.split(".")[0] for name in ours - reads} == {"isoflop"}


def test_the_study_of_the_project_is_readable():
  settings = settings_of(load_config("isoflop_cifar10_16"))
  assert settings.isoflop.budgets == (3e11, 1e12, 3e12, 1e13)
  assert settings.isoflop.held_out == 3e13 and settings.train.schedule == "wsd"
  assert config_file.name_of(3e13) == "isoflop_3e13.py"
