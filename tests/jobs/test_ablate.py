"""Job ablate: which runs it trains and in what order, what it refuses, and the numbers of its comparison."""

import csv
import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.ablation import comparison, entries, measuring, outcomes, sequence, workdirs
from igpt_jax.ablation import results as results_lib
from igpt_jax.ablation.comparison import Run
from igpt_jax.ablation.outcomes import FINISHED, Point, Result
from igpt_jax.config import base, choices, overrides
from igpt_jax.config.fields import FIELDS
from igpt_jax.data.palette import Palette
from igpt_jax.errors import UserError
from igpt_jax.jobs import ablate, fit_palette, pretrain
from igpt_jax.runner import loop
from igpt_jax.training.compilation import flops_per_image, optimizer_flops
from igpt_jax.workspace import weights
from support import own_checkpoint
from support.quickstart import load_config, shrunk
from support.tiny import Killed, changed, mesh_of, on_one_device, settings_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

RUNS = ("original:", "short: train.steps=3 train.warmup_steps=1")


def study(**changes):
  return shrunk(**{
    "job": "ablate", "ablate.runs": RUNS, "ablate.seeds": (0, 1), "train.steps": 6,
    "train.learning_rate": 1e-2, "train.log_every": 1, "train.eval_every": 3,
    "train.checkpoint_every": 3, "evaluate.images": 32, "features.images": 60,
    "features.eval_images": 40, "features.layers": (2,), "ablate.probe": "layers", **changes,
  })  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """A finished study's workdir, killed at the third run's first checkpoint and gone on with.

  To be copied, not written to.
  """
  workdir = tmp_path_factory.mktemp("ablate") / "study"
  order = []

  def killed(settings, folder, *others, **named):
    order.append(os.path.relpath(folder, workdir / "runs"))
    if len(order) == 3:
      original = loop.Instruments.tell_training

      def tell(self, step, *rest):
        if step == 5:
          raise Killed
        original(self, step, *rest)

      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Instruments, "tell_training", tell)
        return pretraining(settings, folder, *others, **named)
    return pretraining(settings, folder, *others, **named)

  pretraining = sequence.pretrain
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sequence, "pretrain", killed)
    with pytest.raises(Killed):
      on_one_device(ablate, study(), str(workdir))
    (workdir / "order.json").write_text(json.dumps(order))
    on_one_device(ablate, study(), str(workdir))
    (workdir / "order.json").write_text(json.dumps(order))
  return workdir


def rows_of(workdir):
  with open(workdir / "ablate.csv", encoding="utf-8") as file:
    return {(row["name"], int(row["seed"])): row for row in csv.DictReader(file)}


# --- training --------------------------------------------------------------------------------------


def test_the_smallest_come_first_and_a_killed_one_goes_on(done):
  order = json.loads((done / "order.json").read_text())
  assert order == ["short/0", "short/1", "original/0", "original/0", "original/1"]
  goodput = json.loads((done / "runs/original/0/goodput.json").read_text())
  assert goodput["starts"] == 2


def test_a_run_is_that_of_job_pretrain(done, tmp_path):
  """Job pretrain with the same settings makes the same numbers, and ablate takes its workdir as finished."""
  on_one_device(pretrain, study(**{"job": "pretrain", "seed": 0}), str(tmp_path / "plain"))
  row = rows_of(done)["original", 0]
  trained = json.loads((tmp_path / "plain" / "training.json").read_text())
  assert float(row["validation_loss"]) == trained["validation_loss"]
  assert float(row["train_loss"]) == trained["validation_loss"] - trained["validation_gap"]

  moved = tmp_path / "study" / "runs" / "original" / "0"
  shutil.move(tmp_path / "plain", moved)
  before = sorted(os.listdir(moved))
  settings = study(**{"ablate.runs": ("original:",), "ablate.seeds": (0,), "ablate.probe": "none"})
  on_one_device(ablate, settings, str(tmp_path / "study"))
  assert sorted(os.listdir(moved)) == before
  ours, theirs = rows_of(tmp_path / "study")["original", 0], row
  for name in ("validation_loss", "train_loss", "test_loss", "flops", "status"):
    assert ours[name] == theirs[name]


def test_every_number_of_the_csv(done):
  rows = rows_of(done)
  assert list(rows) == [(name, seed) for name in ("original", "short") for seed in (0, 1)]
  for (name, seed), row in rows.items():
    folder = done / "runs" / name / str(seed)
    trained = json.loads((folder / "training.json").read_text())
    info = weights.describe(str(folder), study())
    steps = 3 if name == "short" else 6
    assert (int(row["parameters"]), int(row["steps"])) == (trained["parameters"], steps)
    assert float(row["flops_per_step"]) == 16 * flops_per_image(info.config)
    assert float(row["flops"]) == steps * float(row["flops_per_step"])
    assert float(row["validation_loss"]) == trained["validation_loss"]
    assert 2 < float(row["test_loss"]) < math.log(20) and 0 < float(row["probe_accuracy"]) <= 1
    assert float(row["step_seconds"]) > 0 and row["status"] == FINISHED
  assert rows["original", 0]["overrides"] == ""
  assert rows["short", 1]["overrides"] == "train.steps=3 train.warmup_steps=1"
  assert rows["original", 0]["validation_loss"] != rows["original", 1]["validation_loss"]


def test_the_same_command_changes_nothing(done, tmp_path, capsys):
  """What is measured is kept too: neither the loss on test nor a probe is computed again."""
  workdir = shutil.copytree(done, tmp_path / "study")
  on_one_device(ablate, study(), str(workdir))
  printed = capsys.readouterr().out
  assert "4 of 4 trainings ended before" in printed and "checkpoint:" not in printed
  for name in ("ablate.csv", "ablate.md"):
    assert (workdir / name).read_text() == (done / name).read_text()
  assert (workdir / "ablate.png").stat().st_size > 10_000
  assert not (workdir / "features").exists() or not any((workdir / "features").iterdir())


def test_a_run_that_diverges_is_marked_and_the_others_go_on(done, tmp_path, capsys):
  workdir = shutil.copytree(done, tmp_path / "study")
  settings = study(**{
    "ablate.runs": ("wild: train.learning_rate=1e30 train.clip_norm=0.5", *RUNS),
    "ablate.baseline": "original", "guard.in_row": 1, "guard.then": "stop", "ablate.probe": "none",
  })  # fmt: skip
  on_one_device(ablate, settings, str(workdir))
  rows = rows_of(workdir)
  assert list(rows)[::2] == [("original", 0), ("wild", 0), ("short", 0)]  # the baseline first
  for seed in (0, 1):
    assert rows["wild", seed]["status"].startswith("diverged at step ")
    assert rows["wild", seed]["validation_loss"] == rows["wild", seed]["test_loss"] == ""
    assert rows["original", seed] == {**rows_of(done)["original", seed], "probe_accuracy": ""}
  text = (workdir / "ablate.md").read_text()
  assert "| wild | 0 of 2: seed 0 diverged at step" in text
  capsys.readouterr()
  on_one_device(ablate, settings, str(workdir))
  assert "6 of 6 trainings ended before" in capsys.readouterr().out


def test_a_signal_after_the_last_step_of_a_run_stops_before_the_next(tmp_path, monkeypatch, capsys):
  outcome = dataclasses.make_dataclass("Outcome", ["stopped_by", "asked_by"])
  began = []

  def finishes(settings, folder, *others, **named):
    began.append(folder)
    return outcome(None, "SIGTERM")

  monkeypatch.setattr(sequence, "pretrain", finishes)
  on_one_device(ablate, study(), str(tmp_path))
  assert len(began) == 1
  assert "stopped by SIGTERM: saved; the same command goes on" in capsys.readouterr().out


def test_a_folder_of_another_run_is_refused_before_anything_is_trained(done, tmp_path, monkeypatch):
  workdir = shutil.copytree(done, tmp_path / "study")
  monkeypatch.setattr(sequence, "pretrain", None)
  for runs, expected in (
    (
      ("original: train.b2=0.9",),
      r"runs/original/0 holds .*run:\n  train\.b2: 0\.95 there, 0\.9 here",
    ),
    (
      ("original: train.steps=8",),
      r"runs/original/0 holds another run:\n  train\.steps: 6 there, 8 h",
    ),
  ):
    with pytest.raises(UserError, match=expected):
      on_one_device(ablate, study(**{"ablate.runs": runs}), str(workdir))
  config = workdir / "runs/short/1/config.json"
  config.unlink()
  with pytest.raises(UserError, match=r"runs/short/1 holds checkpoints without config\.json"):
    on_one_device(ablate, study(), str(workdir))


def test_it_measures_on_its_own_devices_not_on_those_of_the_run(done, tmp_path, monkeypatch):
  """A run may have been trained on a mesh that doesn't divide what is here."""
  workdir = shutil.copytree(done, tmp_path / "study")
  shutil.rmtree(workdir / measuring.FOLDER)
  entry = entries.planned(study(), str(workdir), mesh_of())[0]
  elsewhere = dataclasses.replace(entry, settings=changed(entry.settings, {"mesh.fsdp": 3}))
  seen = []

  def test_loss(settings, *_):
    seen.append(settings.mesh)
    return 1.0

  monkeypatch.setattr(measuring, "_test_loss", test_loss)
  settings = study(**{"ablate.probe": "none"})
  measuring.measure(settings, str(workdir), outcomes.result_of(elsewhere), None)
  assert seen == [settings.mesh]


@pytest.mark.parametrize(
  ("begun", "now", "expected"),
  [
    ("train.decay_steps=1 train.decay_shape=linear", "train.decay_steps=3 train.decay_shape=1-sqrt",
     r"train\.decay_shape: linear there, 1-sqrt here\n  train\.decay_steps: 1 there, 3 here"),
    ("model.dtype=bfloat16", "model.dtype=float32", r"model\.dtype: bfloat16 there, float32 here"),
    ("train.log_every=2", "train.accumulate=2", r"train\.accumulate: 1 there, 2 here"),
  ],
)  # fmt: skip
def test_a_finished_run_is_not_reported_under_other_settings(tmp_path, begun, now, expected):
  """Neither those that a resumed run may change nor those that decide no run's numbers."""

  def one(values):
    return study(**{
      "ablate.runs": ("original:", f"w: train.schedule=wsd {values}"), "ablate.seeds": (0,),
      "ablate.probe": "none", "train.steps": 5, "train.checkpoint_every": 5, "train.eval_every": 5,
      "train.warmup_steps": 1,
    })  # fmt: skip

  _, run = overrides.named_runs(one(begun))
  on_one_device(pretrain, run.settings(one(begun), 0), str(tmp_path / "runs/w/0"))
  with pytest.raises(UserError, match=rf"runs/w/0 holds another run:\n  {expected}"):
    entries.planned(one(now), str(tmp_path), mesh_of())
  if (
    "decay" in begun
  ):  # nor once it has gone on with the other decay, with two changes of its length
    longer = changed(run.settings(one(now), 0), {"train.steps": 6, "train.decay_steps": 1})
    for settings in (longer, changed(longer, {"train.decay_shape": "1-sqrt", "train.steps": 7})):
      on_one_device(pretrain, settings, str(tmp_path / "runs/w/0"))
    seven = changed(one("train.decay_steps=1 train.decay_shape=1-sqrt"), {"train.steps": 7})
    with pytest.raises(UserError, match=r"decay_shape: linear there.*\n  train\.steps: 5 there, 7"):
      entries.planned(seven, str(tmp_path), mesh_of())


def test_a_run_that_another_differs_from_keeps_its_own_settings(done, tmp_path):
  """The base's dtype has changed, too: the csv would tell of a difference in dtype that isn't there."""
  workdir = shutil.copytree(done, tmp_path / "study")
  settings = study(**{"model.dtype": "bfloat16", "ablate.runs": (*RUNS, "w: model.dtype=float32")})
  with pytest.raises(
    UserError, match=r"original/0 holds .*\n  model\.dtype: float32 there, bfloat16 here"
  ):
    entries.planned(settings, str(workdir), mesh_of())


def test_a_run_on_other_images_is_refused(done, tmp_path, monkeypatch):
  """By the contents that its checkpoint was trained on, whatever config.json says."""
  workdir = shutil.copytree(done, tmp_path / "study")
  newest = entries.checkpoint.newest
  monkeypatch.setattr(sequence, "pretrain", None)

  def elsewhere(folder):
    info = newest(folder)
    data = info and {**info.run["data"], "fingerprint": "other"}
    return info and dataclasses.replace(info, run={**info.run, "data": data})

  monkeypatch.setattr(entries.checkpoint, "newest", elsewhere)
  with pytest.raises(UserError, match=r"another run:\n  data: other there, digits/.* here"):
    entries.planned(study(), str(workdir), mesh_of())


@pytest.mark.parametrize(
  ("run", "expected"),
  [
    ("original:", r"data\.validation: 0\.1 there, 0\.2 here"),
    ("new: train.accumulate=3", r"train\.batch_size: 16"),
    ("new: init_from={folder}", r"init_from: .*runs/original/0, of new, has other colours than the palette"),
  ],
)  # fmt: skip
def test_what_is_refused_leaves_the_palette(tmp_path, run, expected):
  """On other images, to which another one is fitted: afterwards the first command still goes on."""
  one = {
    "ablate.runs": ("original:",), "ablate.seeds": (0,), "ablate.probe": "none", "palette.size": 8,
    "ablate.test": False, "train.steps": 2, "train.eval_every": 2, "train.warmup_steps": 1,
  }  # fmt: skip
  fit_palette.run(study(**{**one, "job": "fit_palette", "palette.images": 7}), str(tmp_path))
  on_one_device(ablate, study(**one), str(tmp_path))
  before = {path: path.read_bytes() for path in tmp_path.rglob("[!.]*") if path.is_file()}
  run = run.format(folder=tmp_path / "runs/original/0")
  with pytest.raises(UserError, match=expected):
    on_one_device(
      ablate, study(**{**one, "ablate.runs": (run,), "data.validation": 0.2}), str(tmp_path)
    )
  assert before == {path: path.read_bytes() for path in tmp_path.rglob("[!.]*") if path.is_file()}
  (entry,) = entries.planned(study(**one), str(tmp_path), mesh_of())
  assert outcomes.result_of(entry).finished
  assert entry.settings.palette.path == str(tmp_path / "palette.npy")


def test_runs_of_other_colours_are_not_added(done, tmp_path):
  """The first runs' palette would be written over, and what they were trained on be lost."""
  workdir = shutil.copytree(done, tmp_path / "study")
  before = (workdir / "palette.npy").read_bytes()
  add = {"ablate.runs": ("new:",), "ablate.probe": "none", "palette.size": 0}
  other = str(tmp_path / "other.npy")
  Palette(np.linspace(-1, 1, 96, dtype=np.float32).reshape(32, 3)).save(other)
  shutil.rmtree(workdir / "runs/short")
  with pytest.raises(UserError, match=r"other\.npy has other colours than .*palette\.npy"):
    entries.planned(study(**add, **{"palette.path": other}), str(workdir), mesh_of())
  begun = {
    "init_from": own_checkpoint.write(tmp_path / "weights", resolution=8),
    "data.resolution": 8,
  }
  begun |= {"model.n_layer": 0, "model.n_head": 0, "model.n_embd": 0}
  with pytest.raises(UserError, match=r"the runs in .*study have other colours"):
    entries.planned(study(**add, **begun), str(workdir), mesh_of())
  assert (workdir / "palette.npy").read_bytes() == before
  entries.planned(study(), str(workdir), mesh_of())


# --- finished workdirs -----------------------------------------------------------------------------


def test_finished_workdirs_are_compared(done, tmp_path):
  """Seeds of one config are one run; nothing is written to the workdirs."""
  folders = [
    str(done / "runs" / name) for name in ("original/0", "short/1", "short/0", "original/1")
  ]
  before = {folder: sorted(os.listdir(folder)) for folder in folders}
  settings = study(**{
    "ablate.runs": (), "ablate.workdirs": tuple(folders), "ablate.probe": "none"
  })  # fmt: skip
  on_one_device(ablate, settings, str(tmp_path / "both"))
  assert {folder: sorted(os.listdir(folder)) for folder in folders} == before
  ours, theirs = rows_of(tmp_path / "both"), rows_of(done)
  assert list(ours) == [("original", 0), ("original", 1), ("short", 1), ("short", 0)]
  for key, row in ours.items():
    assert row == {**theirs[key], "probe_accuracy": ""}
  text = (tmp_path / "both" / "ablate.md").read_text()
  assert "| `train.steps` | `6` | `3` |" in text and "Not comparable" not in text
  assert text.count("\n| `") == 2  # and the warm-up


def test_workdirs_that_can_not_be_compared(done, tmp_path):
  def compare(*folders):
    return study(**{"ablate.runs": (), "ablate.workdirs": tuple(map(str, folders))})

  original = done / "runs/original/0"
  copy = shutil.copytree(original, tmp_path / "copy")
  for settings, expected in (
    (compare(original, tmp_path), r"has no config\.json; expected the workdir of a finished run"),
    (compare(original, copy), rf"{copy}: the same settings and seed as {original}"),
  ):
    with pytest.raises(UserError, match=expected):
      workdirs.finished(settings)
  _, notes = workdirs.finished(compare(original, done / "runs/short/0"))
  assert notes == []  # the same images, tokens and limits
  (copy / "config.json").write_text(
    (copy / "config.json").read_text().replace('"eval_images": 32', '"eval_images": 31')
    .replace('"learning_rate": 0.01', '"learning_rate": 0.02')
  )  # fmt: skip
  _, notes = workdirs.finished(compare(original, copy))
  assert notes == ["train.eval_images: 32, 31"]
  (copy / "training.json").unlink()
  with pytest.raises(UserError, match=r"copy has made 6 of 6 steps; expected a finished run"):
    workdirs.finished(compare(original, copy))


def beside(done, folder, seed, **values):
  """Settings that compare a seed of the finished run with a copy of one that had other settings."""
  other = shutil.copytree(done / "runs/original" / str(seed), folder / str(seed))
  config = json.loads((other / "config.json").read_text())
  for name, value in values.items():
    group, _, field = name.rpartition(".")
    (config[group] if group else config)[field] = value
  (other / "config.json").write_text(json.dumps(config))
  folders = str(done / "runs/original/0"), str(other)
  return study(**{"ablate.runs": (), "ablate.workdirs": folders})


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("train.accumulate", 2), ("model.attention", "blocked"), ("model.remat", "full"),
  ],
)  # fmt: skip
def test_workdirs_that_compute_otherwise_are_other_runs(done, tmp_path, seed, name, value):
  """Neither seeds of one run, over which a mean would be taken, nor the same run twice."""
  found, _ = workdirs.finished(beside(done, tmp_path / "other", seed, **{name: value}))
  assert [(entry.name, entry.seed) for entry in found] == [("original", 0), ("other", seed)]
  assert entries.differences(found) == {name: [FIELDS[name].default, value]}


@pytest.mark.parametrize("given", ["", "float32"])
def test_a_dtype_is_that_of_the_machine_if_none_was_given(done, tmp_path, given, monkeypatch):
  """Settings that are the same may have been computed otherwise, and others alike."""
  settings = beside(done, tmp_path / "other", 1, **{"model.dtype": given})
  describe = checkpoint.describe
  found, _ = workdirs.finished(settings)
  assert [(entry.name, entry.seed) for entry in found] == [("original", 0), ("original", 1)]

  def on_a_gpu(folder):
    info = describe(folder)
    dtype = "bfloat16" if folder.startswith(str(tmp_path)) else info.config.dtype
    return dataclasses.replace(info, config=dataclasses.replace(info.config, dtype=dtype))

  monkeypatch.setattr(checkpoint, "describe", on_a_gpu)
  found, _ = workdirs.finished(settings)
  assert [(entry.name, entry.seed) for entry in found] == [("original", 0), ("other", 1)]
  assert entries.differences(found) == {"model.dtype": ["float32", "bfloat16"]}


@pytest.mark.parametrize(
  ("name", "value"), [("train.log_every", 7), ("hang_seconds", 99.0), ("train.max_to_keep", 4)]
)
def test_what_changes_no_number_leaves_seeds_of_one_run(done, tmp_path, name, value):
  found, _ = workdirs.finished(beside(done, tmp_path / "other", 1, **{name: value}))
  assert [(entry.name, entry.seed) for entry in found] == [("original", 0), ("original", 1)]
  with pytest.raises(UserError, match=r"0: the same settings and seed as"):
    workdirs.finished(beside(done, tmp_path / "again", 0, **{name: value}))


def test_workdirs_of_other_images_are_other_runs(done, monkeypatch):
  """Though their settings are the same: a path, or what lies there, has changed."""
  folders, describe = [str(done / "runs/original" / seed) for seed in "01"], checkpoint.describe

  def elsewhere(folder):
    info = describe(folder)
    data = {**info.run["data"], "fingerprint": f"images of {folder}"}
    return dataclasses.replace(info, run={**info.run, "data": data})

  monkeypatch.setattr(checkpoint, "describe", elsewhere)
  settings = study(**{"ablate.runs": (), "ablate.workdirs": tuple(folders)})
  found, notes = workdirs.finished(settings)
  assert [(entry.name, entry.seed) for entry in found] == [("0", 0), ("1", 1)]
  assert notes == [f"data: images of {folders[0]}, images of {folders[1]}"]


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"runs": ()}, r"runs: \(\); expected 'NAME: SETTING=VALUE …'"),
    ({"runs": ("original",)}, r"runs: 'original'; expected 'NAME: SETTING=VALUE …'"),
    ({"runs": ("a/b: train.b2=0.9",)}, r"where NAME has letters"),
    ({"runs": ("..:",)}, r"where NAME has letters"),
    ({"runs": ("a: train.b3=0.9",)}, r"a: config\.train\.b3: .*did you mean config\.train\.b[12]\?"),
    ({"runs": ("a: train.b2",)}, r"a: 'train\.b2'; expected SETTING=VALUE"),
    ({"runs": ("a: train.b2=x",)}, r"a: train\.b2='x'; expected a value such as 0\.95"),
    ({"runs": ("a: train.b2=1.5",)}, r"a: config\.train\.b2: 1\.5; expected 0 to below 1; fix: that"),
    ({"runs": ("a: train.b2=.9 train.b2=.8",)}, r"a: train\.b2 twice"),
    ({"runs": ("a: train.warmup_steps=99",)}, r"a: train\.warmup_steps: 99; expected between 0"),
    ({"runs": ("a: 'train.b2=0.9",)}, r"No closing quotation\); expected SETTING=VALUE"),
    ({"runs": ("a: seed=3",)}, r"a: seed is the same for all runs.* fix: ablate\.seeds"),
    ({"runs": ("a: data.resolution=4",)}, r"fix: --config\.data\.resolution=, for all runs"),
    ({"runs": ("a: mesh.data=2",)}, r"mesh\.data is the same for all runs.* fix: --config\.mesh\.data="),
    ({"runs": ("a: hang_seconds=2",)}, r"a: hang_seconds is the same for all runs"),
    ({"runs": ("a: host_seconds=2",)}, r"a: host_seconds is the same for all runs"),
    ({"runs": ("a: compilation_cache=off",)}, r"a: compilation_cache is the same for all runs"),
    ({"runs": ("a: quality.images=4",)}, r"a: quality\.images isn't read by job pretrain; expected"),
    ({"runs": ("a:", "a: train.b2=0.9")}, r"'a' names two runs"),
    ({"runs": ("a: train.b2=0.95", "b:")}, r"b: the same settings as a"),
    ({"runs": ("a:",), "baseline": "b"}, r"baseline: 'b'; expected one of a"),
    ({"runs": ("a:",), "seeds": (1, 1)}, r"seeds: 1 twice"),
    ({"workdirs": ("runs/a",)}, r"workdirs: 'runs/a'; expected two or more"),
  ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_opened(changes, expected):
  values = {f"ablate.{name}": value for name, value in changes.items()}
  with pytest.raises(UserError, match=rf"config\.ablate\.{expected}" if "runs" not in changes else
                     expected):  # fmt: skip
    settings_of(changes={"job": "ablate", "train.steps": 20, **values})


def test_values_have_the_types_of_their_settings():
  texts = ("a: log.wandb=true train.steps=7 'model.remat=none' train.b1=1e-1 profile.start=0",)
  settings = settings_of(changes={"job": "ablate", "ablate.runs": texts})
  (run,) = overrides.named_runs(settings)
  assert run.values == {
    "log.wandb": True, "train.steps": 7, "model.remat": "none", "train.b1": 0.1, "profile.start": 0
  }  # fmt: skip
  own = run.settings(settings, 5)
  assert (own.job, own.seed, own.train.steps, own.train.b2) == ("pretrain", 5, 7, 0.95)
  assert own.ablate == settings_of().ablate


def test_it_reads_what_job_pretrain_reads():
  reads = {name for name, declared in FIELDS.items() if "pretrain" in declared.jobs}
  ours = {name for name, declared in FIELDS.items() if "ablate" in declared.jobs}
  assert reads - ours == {name for name in FIELDS if name.startswith("sizing.")}
  assert {name.split(".")[0] for name in ours - reads} == {
    "ablate",
    "evaluate",
    "features",
    "probe",
  }


def test_the_study_of_the_project_is_readable():
  settings = settings_of(load_config("ablate_cifar10_16"))
  runs = overrides.named_runs(settings)
  assert runs[0].name == "original" and len(runs) > 2


def test_flops_are_the_models_and_the_optimizers_own():
  adam, muon = make_entry("a", 0), make_entry("b", 0, **{"train.optimizer": "muon"})
  assert adam.flops_per_step == 16 * flops_per_image(adam.model)
  own = optimizer_flops(muon.model, choices.optimizer_config(muon.settings))
  assert own > 0 and muon.flops_per_step == adam.flops_per_step + own
  assert muon.flops == 100 * muon.flops_per_step


# --- the comparison's numbers ----------------------------------------------------------------------


def make_entry(name, seed, steps=100, **changes):
  settings = changed(study(**{"job": "pretrain"}), {"train.steps": steps, "seed": seed, **changes})
  n_vocab = 8 if choices.token_spec(settings).needs_palette else 256
  model = choices.model_config(settings, n_vocab=n_vocab)
  return entries.Entry(name=name, seed=seed, settings=settings, folder="", model=model)


def make_run(name, *losses, steps=100, **changes):
  """A run whose curve falls from 4 at half of its steps to the loss, for each seed."""
  return Run(
    tuple(
      Result(
        entry=make_entry(name, seed, steps, **changes), status=FINISHED, validation_loss=loss,
        train_loss=loss - 0.5, step_seconds=0.5,
        curve=(Point(steps // 2, steps / 4, 4.0), Point(steps, steps / 2, loss)),
      )
      for seed, loss in enumerate(losses)
    )
  )  # fmt: skip


def without_end(result, status):
  return dataclasses.replace(result, status=status, validation_loss=math.nan, train_loss=math.nan)


def test_means_and_paired_differences_by_hand():
  first, other = (
    make_run("original", 3.0, 3.2, 3.4),
    make_run("b2", 2.9, 3.2, 3.2, **{"train.b2": 0.9}),
  )
  mean = first.mean("validation_loss")
  assert (mean.mean, mean.n) == (pytest.approx(3.2), 3) and mean.spread == pytest.approx(0.2)
  assert mean.text(".4f") == "3.2000 ± 0.2000"
  difference = comparison.paired_difference(other, first)
  assert difference.mean == pytest.approx(-0.1) and difference.spread == pytest.approx(0.1)
  assert difference.text("+.4f") == "-0.1000 ± 0.1000"
  # Seeds that only one of them has aren't paired; one value has no spread.
  difference = comparison.paired_difference(Run(other.results[:1]), Run(first.results[:2]))
  assert difference.n == 1 and difference.text("+.4f") == "-0.1000"
  text = comparison.markdown([first, other])
  assert "| b2 | 3 |" in text and "| 3.1000 ± 0.1732 | -0.1000 ± 0.1000 |" in text
  assert text.index("| b2 |") < text.index("| original (baseline) |")
  assert "| `train.b2` | `0.95` | `0.9` |" in text


def test_losses_of_raw_rgb_are_compared_in_bits_per_dimension():
  """4 bits a code: 12 ln 2 nats a pixel where it is a position, 4 ln 2 where each code is one."""
  raw = {"palette.size": 0}
  first = make_run("whole", 12 * math.log(2), **raw, **{"data.token_kind": "channels"})
  other = make_run("apart", 4 * math.log(2), **raw, **{"data.token_kind": "subpixels"})
  runs = comparison.runs_of([*first.results, *other.results])
  assert [run.mean("validation_loss").mean for run in runs] == pytest.approx([4, 4])
  assert [run.results[0].curve[-1].loss for run in runs] == pytest.approx([4, 4])
  assert comparison.paired_difference(runs[1], runs[0]).mean == pytest.approx(0, abs=1e-9)
  text = comparison.markdown(runs)
  assert ", 4.0000 bits/dim" in text and "Losses in bits/dim, best first" in text
  assert "bits/dim" in comparison.csv_text(runs)
  # A palette's tokens aren't RGB: nothing is converted beside it.
  palette = make_run("palette", 3.0)
  runs = comparison.runs_of([*palette.results, *first.results])
  assert [run.unit for run in runs] == ["nats/token"] * 2
  assert runs[1].mean("validation_loss").mean == pytest.approx(12 * math.log(2))


def test_where_a_run_begins_is_told():
  """Not where its images lie, which are known by their contents, nor how they are read."""
  first, other = (
    make_run("random", 3.0),
    make_run("on", 2.9, **{"init_from": "packaged", "data.path": "photos", "data.threads": 3}),
  )
  assert comparison.overrides([first, other]) == {"random": "", "on": "init_from=packaged"}
  text = comparison.markdown([first, other])
  assert "| `init_from` | `''` | `'packaged'` |" in text and text.count("\n| `") == 1


def test_the_share_of_flops_by_hand():
  """4.0 at step 50, 2.5 at step 100: the baseline's 3.0 is reached at step 100; its own 4.0 at step 50."""
  first, other = make_run("original", 3.0), make_run("b2", 2.5, **{"train.b2": 0.9})
  assert comparison.share_of_flops(other, first).mean == 1
  assert comparison.share_of_flops(other, make_run("original", 4.0)).mean == 0.5
  wide = make_run("wide", 2.5, **{"model.n_embd": 32})
  ratio = wide.entry.flops / first.entry.flops
  assert comparison.share_of_flops(wide, first).mean == pytest.approx(ratio)
  assert ratio > 2 and f"| {ratio:.3f} |" in comparison.markdown([first, wide])
  never = comparison.share_of_flops(make_run("slow", 3.1, **{"train.b2": 0.9}), first)
  assert never.n == 0 and math.isnan(never.mean)
  text = comparison.markdown([first, make_run("slow", 3.1, **{"train.b2": 0.9})])
  assert "not reached" in text and "first evaluation at or below the final validation loss" in text
  assert comparison.step_reaching([Point(10, 1, 2.0)], 2.5) == 10


@pytest.mark.parametrize(
  ("every", "step"), [(250, 500), (100, 500), (50, 450), (25, 450), (1, 426)]
)
def test_a_loss_is_reached_at_an_evaluation(every, step):
  """By wsd 2.953 is passed at step 426; between 250 and 500 a straight line would say 327."""
  loss = [3.02 - 1e-4 * (at - 250) - 1.92e-3 * max(0, at - 400) for at in range(501)]
  assert loss[425] > 2.953 >= loss[426]
  curve = [Point(at, at / 10, loss[at]) for at in range(every, 501, every)]
  assert comparison.step_reaching(curve, 2.953) == step
  assert math.isnan(comparison.step_reaching(curve, 2.8))


def test_a_shorter_run_stands_beside_the_longer_one():
  """It has a whole schedule: half the steps are half the FLOPs, whatever the longer one's curve says."""
  first, modern = make_run("original", 3.0), make_run("modern", 2.8, **{"train.b2": 0.9})
  half = make_run("half", 2.95, steps=50, **{"train.b2": 0.9, "train.warmup_steps": 1})
  last = make_run("last", 2.9, **{"train.b1": 0.8})
  runs = [first, last, half, modern]
  assert [run.name for run in comparison.by_loss(runs)] == ["modern", "half", "last", "original"]
  assert (
    "- half is modern with a whole schedule in 50 of its 100 steps: 50.0% of original's FLOPs, -0.0500 "
    "against original." in comparison.markdown(runs)
  )


def test_a_shorter_run_stands_beside_one_of_two_equally_long_ones():
  """Beside that whose warm-up it has, or alone: of neither is it the same with a whole schedule."""
  first = make_run("original", 3.0, **{"train.b1": 0.8})
  a = make_run("a", 2.8, **{"train.warmup_steps": 1})
  a2 = make_run("a2", 2.7, **{"train.warmup_steps": 10})
  s, q = (make_run(n, 2.9, steps=k, **{"train.warmup_steps": 1}) for n, k in (("s", 50), ("q", 25)))
  runs = [first, a, q, s, a2]
  assert [run.name for run in comparison.by_loss(runs)] == ["a2", "a", "s", "q", "original"]
  text = comparison.markdown(runs)
  for line, n in (("\n- s is a with", 1), ("\n- q is a with", 1), (" with a whole schedule", 2)):
    assert text.count(line) == n
  other = make_run("s", 2.75, steps=50, **{"train.warmup_steps": 5})
  runs = [a, other, a2, first]
  assert [run.name for run in comparison.by_loss(runs)] == ["a2", "s", "a", "original"]
  assert "with a whole schedule" not in comparison.markdown(runs)


def test_the_verdict_says_which_seeds_a_mean_is_over():
  """Seeds 1 and 2 end at 3.1, above the baseline's 3.0; seed 0 is below it at its last evaluation alone."""
  first, other = (
    make_run("original", 3.0, 3.0, 3.0),
    make_run("b2", 2.0, 3.1, 3.1, **{"train.b2": 0.9}),
  )
  text = comparison.markdown([first, other])
  assert (
    "against original (3 seeds); original's final loss at 100.0% of its FLOPs (1 of 3 seeds)."
    in text
  )
  assert "| 100.0% (1 of 3 seeds) |" in text
  fewer = Run(
    (*first.results[:1], *(without_end(each, "unfinished") for each in first.results[1:]))
  )
  text = comparison.markdown([fewer, other])
  assert "b2, 2.7333 ± 0.6351 nats/token, -1.0000 against original (1 of 3 seeds); " in text
  assert "| -1.0000 (1 of 3 seeds) |" in text
  text = comparison.markdown(
    [first, Run((*other.results[:1], without_end(other.results[1], "unfinished")))]
  )
  assert (
    "Best on validation: b2, 2.0000 nats/token (1 of 2 seeds), -1.0000 against original (1 of 2"
    in text
  )


def test_a_run_with_diverged_seeds_stands_last():
  """Its best seed says nothing of the others: the mean of those that are left isn't the run's."""
  first, slow = (
    make_run("original", 3.0, 3.0, 3.0),
    make_run("slow", 3.2, 3.2, 3.2, **{"train.b2": 0.9}),
  )
  wild = make_run("wild", 2.0, 2.0, 2.0, **{"train.learning_rate": 1.0})
  wild = Run(
    (wild.results[0], *(without_end(each, "diverged at step 9") for each in wild.results[1:]))
  )
  runs = [first, wild, slow]
  assert [run.name for run in comparison.by_loss(runs)] == ["original", "slow", "wild"]
  assert "Best on validation: original, 3.0000 ± 0.0000 nats/token." in comparison.markdown(runs)
  assert "a run with a diverged seed stands last" in comparison.markdown(runs)
  assert "wild, 2.0000 nats/token (1 of 3 seeds)." in comparison.verdict([wild])


def test_the_plot_says_over_how_many_seeds_its_means_are(tmp_path, monkeypatch):
  notes = []
  monkeypatch.setattr(results_lib.plots, "plot", lambda *_, note, **__: notes.append(note))
  first, other = make_run("original", 3.0, 3.2), make_run("b2", 2.9, **{"train.b2": 0.9})
  for runs in ([first], [first, other], [other]):
    results_lib.draw(str(tmp_path / "ablate.png"), runs)
  shaded = "seeds; shaded: lowest to highest"
  assert notes == [f"means over 2 {shaded}", f"means over 1 to 2 {shaded}", "one seed"]


def test_time_is_that_of_the_steps():
  """Ten steps a log at 2, then 4 images/s of batches of 4, resumed or not; an evaluation in between."""
  records = [
    {"step": 10, "images_per_second": 2.0}, {"step": 15, "validation_loss": 3.0},
    {"step": 20, "images_per_second": 4.0}, {"step": 20, "validation_loss": 2.0},
  ]  # fmt: skip
  assert outcomes.step_seconds(records, 4) == [(10, 2.0), (20, 1.0)]


def test_points_have_the_seconds_until_them(tmp_path):
  entry = dataclasses.replace(
    make_entry("a", 0, 20, **{"train.batch_size": 4}), folder=str(tmp_path)
  )
  lines = [
    {"step": 10, "loss": 4.0, "images_per_second": 2.0}, {"step": 15, "validation_loss": 3.0},
    {"step": 20, "loss": 2.5, "images_per_second": 4.0}, {"step": 20, "validation_loss": 2.0},
  ]  # fmt: skip
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  result = outcomes.result_of(entry)
  assert result.curve == (Point(15, 25.0, 3.0), Point(20, 30.0, 2.0))
  assert (result.step_seconds, result.status, result.ended) == (1.5, "unfinished", False)
  (tmp_path / "training.json").write_text('{"step": ')
  with pytest.raises(UserError, match=r"training\.json is damaged"):
    outcomes.result_of(entry)


def test_the_plot_is_over_the_steps_that_seeds_share():
  run = make_run("a", 3.0, 3.2)
  missing = dataclasses.replace(run.results[1], curve=run.results[1].curve[1:])
  points = results_lib._points(Run((run.results[0], missing)))
  assert [[point.loss for point in of] for of in points] == [[3.0, 3.2]]
  assert np.shape(results_lib._points(run)) == (2, 2)


def test_the_order_is_by_flops_then_seed_then_run():
  runs = [make_entry(*key) for key in (("a", 7), ("a", 3), ("b", 7), ("b", 3))]
  small = make_entry("small", 3, 50)
  assert [(each.name, each.seed) for each in sequence.in_order([*runs, small])] == [
    ("small", 3), ("a", 7), ("b", 7), ("a", 3), ("b", 3)
  ]  # fmt: skip


def test_the_forecast_is_told_once(capsys):
  now, later = make_entry("a", 0, 100), make_entry("b", 0, 50)
  forecast = sequence.Forecast([now, later], "ablate")
  forecast(1, {"loss": 3.0})
  forecast(10, {"images_per_second": 16.0})
  forecast(20, {"images_per_second": 1.0})
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("ablate: 2 trainings left, 0:02:20 at ")  # 90 and 50 steps of a second


def test_a_forecast_of_later_runs_may_be_anothers(capsys):
  now, later = make_entry("a", 0, 100), make_entry("b", 0, 50)
  forecast = sequence.Forecast([now, later], "isoflop", lambda left: 1_000.0 * len(left), more=True)
  forecast(10, {"images_per_second": 16.0})
  (line,) = capsys.readouterr().out.splitlines()
  told = "isoflop: 2 trainings left and those that follow, 0:18:10, this one at "
  assert line.startswith(told)  # 90 steps of a second, and 1,000 seconds


def test_the_config_is_given_on_the_command_line(tmp_path):
  config = base()
  config.update_from_flattened_dict({"ablate.runs": ("a:",)})
  assert settings_of(config, {"job": "ablate"}).ablate.runs == ("a:",)
