"""What jobs keep and find again: the second run, of another checkpoint, data or setting, in one place."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from igpt_jax import history
from igpt_jax.config.fields import as_json
from igpt_jax.data.palette import Palette
from igpt_jax.errors import UserError
from igpt_jax.jobs import evaluate, finetune, fit_palette, lowdata, pretrain, probe, quality, sample
from igpt_jax.pretrained import formats
from igpt_jax.probing import sgd_run
from igpt_jax.probing.features import FeatureExtractor
from igpt_jax.workspace import provenance
from support.quickstart import shrunk
from support.tiny import changed, make_config, random_params

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile", "one_device")]


SGD = {
  "probe.method": "sgd", "probe.steps": 4, "probe.eval_every": 2, "probe.batch_size": 16,
  "probe.learning_rates": (3.0, 0.3), "train.log_every": 1,
  "features.baselines": ("pixels", "pca"),
}  # fmt: skip


def config_of(**overrides):
  return shrunk(**{
    "train.log_every": 6, "train.eval_every": 0,
    "features.images": 60, "features.eval_images": 40, "features.batch_size": 16,
    "features.baselines": ("pixels", "random"), "features.layers": (0, 2),
    "probe.max_iterations": 10, "evaluate.images": 40, "evaluate.baseline_images": 50,
    "watch_seconds": 0.01,
    **{name.replace("__", "."): value for name, value in overrides.items()},
  })  # fmt: skip


def watching(job, **overrides):
  return config_of(job=job, watch=True, **overrides)


def read(path):
  return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
  """Checkpoints 4, 8 and 12 of a run that has ended."""
  return pathlib.Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("trained") / "run"))


@pytest.fixture
def run(trained, tmp_path):
  """A copy of it."""
  return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


def train_anew(run, **overrides):
  """Another run in the workdir of a first one, whose results stay."""
  for name in ("checkpoints", "config.json", "training.json", "metrics.jsonl", "palette.npy"):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  pretrain.run(config_of(**overrides), str(run))


# --- features --------------------------------------------------------------------------------------


def test_more_images_and_fewer_in_any_order(trained, run, tmp_path):
  """Probe, watch with fewer images, probe with another number (docs/results.md): each as in a fresh workdir."""
  asked = (
    {"features__images": 90, "features__eval_images": 50},
    {"watch": True, "job": "probe"},
    {"features__images": 75, "features__eval_images": 70},
    {"features__images": 0, "features__eval_images": 0},
  )
  for number, overrides in enumerate(asked):
    probe.run(config_of(**overrides), str(run))
    fresh = tmp_path / f"fresh{number}"
    config = config_of(**{**overrides, "watch": False, "checkpoint": str(trained)})
    probe.run(config, str(fresh))
    out = run / "probe" / "12" if config_of(**overrides).watch else run
    found, expected = read(out / "probe.json"), read(fresh / "probe.json")
    assert found["rows"] == expected["rows"], overrides
    assert found["train_images"] == expected["train_images"]


def test_a_cache_of_the_users_own_holds_any_number_of_images(trained, tmp_path, monkeypatch):
  """Only rows that aren't there yet are computed, also by another job."""
  computed = []
  extract = FeatureExtractor.__call__

  def counted(self, params, batches):
    for rows in extract(self, params, batches):
      computed.append(len(rows.index))
      yield rows

  monkeypatch.setattr(FeatureExtractor, "__call__", counted)
  overrides = {
    "checkpoint": str(trained), "features__cache": str(tmp_path / "cache"),
    "features__baselines": ("pixels",), "lowdata__labels_per_class": (1,), "lowdata__trials": 2,
  }  # fmt: skip
  counts = []
  for images in (64, 48, 96):
    computed.clear()
    probe.run(config_of(**overrides, features__images=images), str(tmp_path / str(images)))
    counts.append(sum(computed))
  assert counts == [64 + 2 * 40, 0, 32]
  computed.clear()
  lowdata.run(config_of(**overrides, features__images=80), str(tmp_path / "lowdata"))
  assert not computed


def write_bert(prefix, seed=0):
  os.makedirs(os.path.dirname(prefix), exist_ok=True)
  config = make_config(n_vocab=11, causal=False)
  params = {k: v for k, v in random_params(config, seed).items() if k != "sos"}
  centers = np.linspace(-1, 1, 33, dtype=np.float32).reshape(11, 3)
  formats.save(prefix, "openai", config, params, clusters=centers)


def test_masked_features_of_another_probability_are_other_features(tmp_path):
  """A foreign checkpoint doesn't say how likely a mask was: the config does."""
  write_bert(str(tmp_path / "bert" / "model.ckpt-7"))
  overrides = {
    "checkpoint": str(tmp_path / "bert"), "data__resolution": 4, "features__masks": 2,
    "mask_probability": 0.15,
  }  # fmt: skip
  probe.run(config_of(**overrides), str(tmp_path / "out"))
  overrides["mask_probability"] = 0.7
  probe.run(config_of(**overrides), str(tmp_path / "out"))
  probe.run(config_of(**overrides), str(tmp_path / "fresh"))
  found, expected = (read(tmp_path / name / "probe.json") for name in ("out", "fresh"))
  assert found["rows"] == expected["rows"]


def test_a_foreign_checkpoint_that_was_replaced(tmp_path):
  """Under one path and step: its features, and the results, are the new one's."""
  place = tmp_path / "model"
  rows = []
  for seed in (0, 1):
    shutil.rmtree(place, ignore_errors=True)
    write_bert(str(place / "model.ckpt-7"), seed)
    probe.run(config_of(checkpoint=str(place), data__resolution=4), str(tmp_path / "out"))
    rows.append(read(tmp_path / "out" / "probe.json"))
  probe.run(config_of(checkpoint=str(place), data__resolution=4), str(tmp_path / "fresh"))
  fresh = read(tmp_path / "fresh" / "probe.json")
  assert rows[0]["parameters"] != rows[1]["parameters"] == fresh["parameters"]
  assert rows[1]["rows"] == fresh["rows"]


def test_damaged_baselines_are_fitted_again(run):
  probe.run(config_of(), str(run))
  expected = read(run / "probe.json")["rows"]
  for text in ('{"rows": [', "[]", '{"depends_on": 7}', "{}"):
    (run / "probe" / "baselines.json").write_text(text)
    probe.run(config_of(), str(run))
    assert read(run / "probe.json")["rows"] == expected, text


def test_baselines_that_an_older_program_fitted_otherwise_are_fitted_again(run):
  """Before PCA_VERSION was kept, components beyond the images' rank were rounding errors."""
  probe.run(config_of(), str(run))
  expected = read(run / "probe.json")["rows"]
  path = run / "probe" / "baselines.json"
  older = read(path)
  del older["depends_on"]["pca"]
  for row in older["rows"]:
    row["test"] = -1.0
  path.write_text(json.dumps(older))
  probe.run(config_of(), str(run))
  assert read(run / "probe.json")["rows"] == expected


# --- the SGD probe ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classified(trained, tmp_path_factory):
  """A workdir in which such a probe has ended."""
  workdir = tmp_path_factory.mktemp("sgd")
  probe.run(config_of(**SGD, checkpoint=str(trained)), str(workdir))
  return workdir


class Begun(Exception):
  """Raised where classifiers would be trained, with the name of their folder."""


@pytest.mark.parametrize(
  "change, same",
  [
    ({}, True),
    ({"features.eval_images": 8, "probe.eval_every": 1, "probe.cached": False}, True),
    ({"features.images": 48}, False),
    ({"data.augment": "paper"}, False),
    ({"features.layers": (1, 2)}, False),
    ({"features.grid": 2}, False),
    ({"features.baselines": ("pixels",)}, False),
    ({"model.dtype": "bfloat16"}, False),
    ({"checkpoint": "checkpoints/8"}, False),
    ({"probe.learning_rates": (3.0, 0.1)}, False),
    ({"probe.steps": 5}, False),
    ({"probe.batch_size": 32}, False),
    ({"seed": 1}, False),
  ],
  ids=str,
)
def test_classifiers_of_something_else_are_kept_apart(
  trained, classified, monkeypatch, change, same
):
  """In a folder of their own, so that neither goes on as the other."""
  (kept,) = os.listdir(classified / "probe_sgd")

  def begun(settings, folder, *args, **kwargs):
    raise Begun(os.path.basename(folder))

  monkeypatch.setattr(sgd_run, "TrainingRun", begun)
  monkeypatch.setattr(probe, "validation_loss", lambda *args: 0.0)
  place = str(trained / change.get("checkpoint", ""))
  with pytest.raises(Begun) as stopped:
    probe.run(changed(config_of(**SGD), change | {"checkpoint": place}), str(classified))
  assert (str(stopped.value) == kept) == same


def test_the_same_classifiers_are_tested_on_more_images(trained, tmp_path):
  """How many images they are tested on doesn't change them; the results are the new ones."""
  for images in (40, 80):
    config = config_of(**SGD, checkpoint=str(trained), features__eval_images=images)
    probe.run(config, str(tmp_path / "out"))
  probe.run(config, str(tmp_path / "fresh"))
  found, expected = (read(tmp_path / name / "probe.json") for name in ("out", "fresh"))
  assert found["rows"] == expected["rows"]


# --- watching --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "job, kind, name",
  [
    (evaluate, "evaluate", "evaluation.json"),
    (sample, "sample", "sample.json"),
    (quality, "quality", "quality.json"),
    (probe, "probe", "probe.json"),
  ],
)
def test_a_step_written_again_by_another_run_is_done_again(run, tmp_path, job, kind, name):
  settings = {
    "sample__samples": 2, "sample__completions": 2, "sample__per_image": 1,
    "quality__images": 4, **(SGD if job is probe else {}),
  }  # fmt: skip
  shutil.rmtree(run / "checkpoints" / "8")
  job.run(watching(kind, **settings), str(run))
  first = read(run / kind / "12" / name)
  train_anew(run, seed=5)
  shutil.rmtree(run / "checkpoints" / "8")
  job.run(watching(kind, **settings), str(run))
  second = read(run / kind / "12" / name)
  job.run(config_of(**settings, checkpoint=str(run)), str(tmp_path / "fresh"))
  fresh = read(tmp_path / "fresh" / name)
  assert first["parameters"] != second["parameters"] == fresh["parameters"]
  assert second == fresh
  # And once more: nothing to do.
  before = {step: os.stat(run / kind / str(step) / name).st_mtime_ns for step in (4, 12)}
  job.run(watching(kind, **settings), str(run))
  assert before == {step: os.stat(run / kind / str(step) / name).st_mtime_ns for step in before}


def test_other_settings_of_evaluation_are_other_numbers(run):
  evaluate.run(watching("evaluate"), str(run))
  assert read(run / "evaluate" / "8" / "evaluation.json")["images"] == 40
  evaluate.run(watching("evaluate", evaluate__images=30), str(run))
  assert read(run / "evaluate" / "8" / "evaluation.json")["images"] == 30
  evaluate.run(watching("evaluate", evaluate__images=30, evaluate__split="validation"), str(run))
  assert "validation" in read(run / "evaluate" / "8" / "evaluation.json")["data"]


def test_other_data_at_one_path_are_other_numbers(run, tmp_path):
  rng = np.random.default_rng(0)

  def write(split, count):
    for i in range(count):
      path = tmp_path / "data" / split / "ab"[i % 2] / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)

  write("train", 20), write("test", 6)
  overrides = {"data__name": "folder", "data__path": str(tmp_path / "data")}
  evaluate.run(watching("evaluate", **overrides), str(run))
  write("test", 9)
  evaluate.run(watching("evaluate", **overrides), str(run))
  assert read(run / "evaluate" / "12" / "evaluation.json")["images"] == 9


def test_one_picture_compares_only_what_is_comparable(run):
  """Of one run, with one way of probing."""

  def compared():
    return [each["step"] for each in read(run / "probe_checkpoints.json")["checkpoints"]]

  probe.run(watching("probe"), str(run))
  assert compared() == [4, 8, 12]
  shutil.rmtree(run / "checkpoints" / "4")  # as retention does
  probe.run(watching("probe"), str(run))
  assert compared() == [4, 8, 12]
  probe.run(watching("probe", features__grid=2), str(run))
  assert compared() == [8, 12]
  # Another run's 5 and 10 have nothing to do with the first one's 4, 8 and 12.
  train_anew(run, seed=5, train__steps=10, train__checkpoint_every=5)
  probe.run(watching("probe", features__grid=2), str(run))
  assert compared() == [5, 10]


# --- the summary -----------------------------------------------------------------------------------


def test_a_summary_of_several_checkpoints_says_which(run):
  evaluate.run(config_of(), str(run))
  sample_settings = {"sample__samples": 2, "sample__completions": 2, "sample__per_image": 1}
  sample.run(config_of(**sample_settings), str(run))
  assert "step 12" not in (run / "summary.md").read_text()
  sample.run(config_of(**sample_settings, checkpoint=f"{run}/checkpoints/8"), str(run))
  text = (run / "summary.md").read_text()
  first, second = (read(run / f"{name}.json") for name in ("evaluation", "sample"))
  assert f"**Likelihood** (step 12, parameters {first['parameters'][:8]}): " in text
  assert f"**Samples** (step 8, parameters {second['parameters'][:8]}): " in text
  (run / "sample.json").write_text('{"step": ')
  evaluate.run(config_of(), str(run))
  assert "**Samples**: sample.json is damaged" in (run / "summary.md").read_text()


# --- colours ---------------------------------------------------------------------------------------


def palette(path, seed):
  levels = np.random.default_rng(seed).integers(0, 256, (17, 3))
  Palette.from_uint8(levels.astype(np.uint8)).save(path)


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_palette_that_was_replaced_is_refused(tmp_path, checkpoints):
  """With a checkpoint, and before there is one."""
  path, run = tmp_path / "palette.npy", tmp_path / "run"
  palette(path, 0)
  config = config_of(palette__path=str(path), palette__size=0, train__steps=4)
  pretrain.run(config, str(run))
  if not checkpoints:
    shutil.rmtree(run / "checkpoints")
  kept = (run / "palette.npy").read_bytes()
  palette(path, 1)
  with pytest.raises(
    UserError, match=rf"palette\.path: {path} has other colours than .*{run}.*fix: "
  ):
    pretrain.run(config, str(run))
  assert (run / "palette.npy").read_bytes() == kept
  shutil.copy(run / "palette.npy", path)
  pretrain.run(config, str(run))


def test_a_fitted_palette_is_that_of_the_data(tmp_path, capsys):
  """Of a run that was ended before its first checkpoint, and begun again on other images."""
  run = tmp_path / "run"
  first = config_of(palette__size=4, train__steps=4)
  pretrain.run(first, str(run))
  shutil.rmtree(run / "checkpoints")
  fitted = read(run / "palette.json")
  pretrain.run(first, str(run))
  assert "4 colours, kept in" in capsys.readouterr().out
  shutil.rmtree(run / "checkpoints")
  fitted["fitted_to"] = "other images"
  (run / "palette.json").write_text(json.dumps(fitted))
  pretrain.run(first, str(run))
  assert "fitting 4 colours" in capsys.readouterr().out
  assert read(run / "palette.json")["fitted_to"] != "other images"


def test_fitting_a_palette_leaves_a_runs_own_alone(run, tmp_path):
  kept = (run / "palette.npy").read_bytes()
  with pytest.raises(UserError, match=r"holds checkpoints.*fix: another --workdir"):
    fit_palette.run(config_of(palette__size=4), str(run))
  assert (run / "palette.npy").read_bytes() == kept


FINETUNE = {
  "finetune__batch_size": 16, "finetune__steps": 2, "finetune__eval_every": 1,
  "finetune__learning_rate": 1e-2,
}  # fmt: skip


def test_a_palette_replaced_under_a_fine_tuning_from_scratch(tmp_path):
  path = tmp_path / "palette.npy"
  palette(path, 0)
  config = config_of(palette__path=str(path), palette__size=0, finetune__scratch=True, **FINETUNE)
  finetune.run(config, str(tmp_path / "out"))
  palette(path, 1)
  with pytest.raises(UserError, match=r"palette\.path: .* has other colours"):
    finetune.run(config, str(tmp_path / "out"))


# --- where a fine-tuning began ---------------------------------------------------------------------


def test_a_fine_tuning_begun_from_another_model_is_refused(run, tmp_path):
  """Under the same path: the run there has gone on, or was begun anew."""
  config = config_of(checkpoint=str(run), **FINETUNE)
  newest = shutil.move(run / "checkpoints" / "12", tmp_path / "12")
  out = tmp_path / "out"
  finetune.run(config, str(out))
  finetune.run(config, str(out))  # the same again
  told = read(out / "finetune" / "finetune.json")
  assert told["start_step"] == 8
  shutil.move(newest, run / "checkpoints" / "12")
  with pytest.raises(
    UserError, match=r"checkpoint: .*12 is another model.*\n  parameters: .* there"
  ) as error:
    finetune.run(config, str(out))
  assert read(out / "finetune" / "finetune.json") == told
  # Its own words: what was begun goes on, also when that checkpoint is deleted since.
  began = f"{run}/checkpoints/8"
  assert f"--config.checkpoint={began} goes on" in str(error.value)
  config = dataclasses.replace(config, checkpoint=began)
  finetune.run(config, str(out))
  shutil.rmtree(began)
  finetune.run(config, str(out))
  assert read(out / "finetune" / "finetune.json")["start_parameters"] == told["start_parameters"]


# --- a run on bare tokens, whose colours the config says ------------------------------------------


def test_results_in_other_colours_are_made_anew(tmp_path):
  rng = np.random.default_rng(0)
  palette(tmp_path / "a.npy", 0)
  palette(tmp_path / "b.npy", 1)
  for name in ("train", "test"):
    np.save(tmp_path / f"{name}.npy", rng.integers(0, 17, (40, 64)).astype(np.uint16))
  tokens = {"data__name": "tokens", "data__path": str(tmp_path), "data__augment": "none"}
  pretrain.run(config_of(**tokens), str(tmp_path / "run"))

  def evaluated(colours):
    path = str(tmp_path / f"{colours}.npy")
    evaluate.run(watching("evaluate", palette__path=path), str(tmp_path / "run"))
    return read(tmp_path / "run" / "evaluate" / "12" / "evaluation.json")["nats_per_token"]

  first, second = evaluated("a"), evaluated("b")
  assert first != second and evaluated("a") == first


# --- fields that came later ------------------------------------------------------------------------


def test_a_field_that_came_later_changes_nothing_that_is_kept(run, monkeypatch):
  """As long as it has the default that it came with."""
  evaluate.run(watching("evaluate"), str(run))
  before = (run / "evaluate" / "12" / "evaluation.json").stat().st_mtime_ns
  monkeypatch.setitem(history.ADDED, "evaluate.new", 0)
  monkeypatch.setitem(history.ADDED, "train.new", 0)
  for value, kept in ((0, True), (1, False)):
    settings = as_json(watching("evaluate"))
    settings["evaluate"]["new"] = value
    monkeypatch.setattr(provenance, "as_json", lambda _, settings=settings: settings)
    evaluate.run(watching("evaluate"), str(run))
    after = (run / "evaluate" / "12" / "evaluation.json").stat().st_mtime_ns
    assert (after == before) == kept
