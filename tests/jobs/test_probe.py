"""Jobs probe and lowdata as a person runs them: a real config, shrunk, on a run of its own."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.data import sources
from igpt_jax.errors import UserError
from igpt_jax.jobs import evaluate, lowdata, pretrain, probe
from igpt_jax.probing import sets
from igpt_jax.probing.features import FeatureExtractor
from igpt_jax.reporting import metrics
from igpt_jax.runner import loop
from support.images import make_images
from support.quickstart import shrunk
from support.tiny import changed

pytestmark = pytest.mark.usefixtures("quick_compile", "one_device")


SGD = {
  "probe.method": "sgd", "probe.steps": 8, "probe.eval_every": 4, "probe.batch_size": 16,
  "probe.learning_rates": (3.0, 0.3), "train.log_every": 1,
}  # fmt: skip


def config_of(**overrides):
  return shrunk(**{"train.log_every": 6} | overrides)


def with_sgd(**overrides):
  return changed(config_of(**overrides), SGD)


def read(path):
  return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
  """Checkpoints 4, 8 and 12 of a run that has ended."""
  return pathlib.Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("trained") / "run"))


@pytest.fixture(scope="module")
def probed(trained):
  probe.run(config_of(probe__around_best=2, probe__concatenate=(0, 2)), str(trained))
  return read(trained / "probe.json")


def test_every_layer_and_every_baseline_is_in_one_table(trained, probed):
  assert [row["name"] for row in probed["rows"]] == [
    "raw pixels", "PCA of pixels, 16", "random weights, layer 0", "random weights, layer 1",
    "random weights, layer 2", "layer 0", "layer 1", "layer 2", "layers 0, 2",
    probed["rows"][-1]["name"],
  ]  # fmt: skip
  layers = [row for row in probed["rows"] if row["kind"] == "layer"]
  assert probed["validation_accuracy"] == max(row["validation_accuracy"] for row in layers)
  best = layers[probed["best_layer"]]
  assert best["test_accuracy"] == probed["test_accuracy"]
  assert probed["pixels_test_accuracy"] > 0.85
  assert probed["verdict"].startswith("test accuracy: ")
  order = [float(each.rsplit(" ", 1)[1][:-1]) for each in probed["verdict"].split(" > ")]
  assert order == sorted(order, reverse=True)
  assert "| raw pixels |" in (trained / "probe.md").read_text()
  assert Image.open(trained / "probe.png").size[0] > 400
  assert "Linear probe" in (trained / "summary.md").read_text()
  nats = [
    r["validation_loss"]
    for r in metrics.read_jsonl(trained / "metrics.jsonl")
    if "validation_loss" in r
  ]
  assert probed["validation_nats_per_token"] == pytest.approx(nats[-1], abs=1e-5)


def test_features_are_computed_once(trained, probed, monkeypatch, capsys):
  """Another job finds them; a job that was cut off goes on behind what it had."""

  def refuse(*args):
    raise AssertionError("features are computed again")

  with monkeypatch.context() as patch:
    patch.setattr(FeatureExtractor, "__call__", refuse)
    probe.run(config_of(), str(trained))
  assert read(trained / "probe.json")["test_accuracy"] == probed["test_accuracy"]
  (progress,) = (trained / "features").glob("12-*/test-*/progress.json")
  progress.write_text(json.dumps(dict.fromkeys(read(progress), 256)))
  rows = []
  extract = FeatureExtractor.__call__

  def counted(self, params, batches):
    for each in extract(self, params, batches):
      rows.extend(each.index.tolist())
      yield each

  monkeypatch.setattr(FeatureExtractor, "__call__", counted)
  probe.run(config_of(), str(trained))
  assert rows == list(range(256, 300))
  assert read(trained / "probe.json")["test_accuracy"] == probed["test_accuracy"]


def test_few_labels(trained):
  lowdata.run(config_of(), str(trained))
  values = read(trained / "lowdata.json")
  assert set(values["chosen"]) == {
    "best layer", "raw pixels", "PCA of pixels, 16", "random weights, best layer"
  }  # fmt: skip
  two, five = (values["chosen"]["raw pixels"][n] for n in ("2", "5"))
  assert 0.3 < two["test_accuracy"] < five["test_accuracy"] < 0.95
  assert two["test_std"] > 0
  of_layers = [values["sets"][f"layer {i}"]["5"]["validation_accuracy"] for i in range(3)]
  assert values["chosen"]["best layer"]["5"]["validation_accuracy"] == max(of_layers)
  assert Image.open(trained / "lowdata.png").size[0] > 400
  assert "±" in (trained / "lowdata.md").read_text()
  # The subsets of one size don't depend on which others are asked for.
  lowdata.run(config_of(lowdata__labels_per_class=(5,)), str(trained))
  assert (
    read(trained / "lowdata.json")["sets"]["raw pixels"]["5"] == values["sets"]["raw pixels"]["5"]
  )


def losses_of(workdir, fit="*"):
  """By step, of the probe by SGD that is kept as `fit`, or of the only one there."""
  (path,) = workdir.glob(f"probe_sgd/{fit}/metrics.jsonl")
  return {r["step"]: r["probe_loss"] for r in metrics.read_jsonl(path) if "probe_loss" in r}


@pytest.mark.parametrize("cached", [True, False])
def test_sgd_goes_on_where_it_was_stopped(trained, tmp_path, cached, monkeypatch, capsys):
  """Though another checkpoint was probed in between, which is done beside it."""
  few = {"features.images": 64, "features.eval_images": 32, "probe.cached": cached}
  config = with_sgd(checkpoint=str(trained), **few)
  probe.run(config, str(tmp_path / "whole"))
  whole = read(tmp_path / "whole" / "probe.json")
  assert [row["name"] for row in whole["rows"] if row["kind"] == "layer"] == [
    "layer 0", "layer 1", "layer 2"
  ]  # fmt: skip
  assert {row["kind"] for row in whole["rows"]} == {"layer", "pixels", "pca", "random"}
  assert {row["learning_rate"] for row in whole["rows"]} <= {3.0, 0.3}
  assert 0.1 < whole["pixels_test_accuracy"]
  assert bool(list((tmp_path / "whole").glob("features"))) == cached

  ask = loop.StopSignal.asked
  monkeypatch.setattr(
    loop.StopSignal,
    "asked",
    lambda self, at: setattr(self, "requested", "SIGTERM") or "SIGTERM" if at == 5 else None,
  )
  with pytest.raises(UserError, match=r"stopped by SIGTERM at step 5 .*goes on from here"):
    probe.run(config, str(tmp_path / "parts"))
  monkeypatch.setattr(loop.StopSignal, "asked", ask)
  (fit,) = os.listdir(tmp_path / "parts" / "probe_sgd")
  capsys.readouterr()
  probe.run(
    dataclasses.replace(config, checkpoint=str(trained / "checkpoints" / "8")),
    str(tmp_path / "parts"),
  )
  said = f"those of other checkpoints or settings, too, which may be removed: {fit}\n"
  assert said in capsys.readouterr().out
  assert read(tmp_path / "parts" / "probe.json")["step"] == 8
  probe.run(config, str(tmp_path / "parts"))
  parts = read(tmp_path / "parts" / "probe.json")
  assert parts["rows"] == whole["rows"]
  told = [losses_of(tmp_path / name, fit) for name in ("whole", "parts")]
  assert told[0] == told[1] and list(told[0]) == list(range(1, 9))


def test_stored_features_and_pictures_give_the_same_curve(trained, tmp_path):
  """A stored feature is the step's own, and both come in one order."""
  curves = []
  for cached in (True, False):
    workdir = tmp_path / str(cached)
    probe.run(with_sgd(checkpoint=str(trained), probe__cached=cached), str(workdir))
    curves.append(list(losses_of(workdir).values()))
  assert len(curves[0]) == 8
  np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_sgd_on_eight_devices_is_as_on_one(trained, tmp_path, monkeypatch):
  for name, devices in (("one", 1), ("eight", 8)):
    monkeypatch.setattr(jax, "devices", lambda *args, n=devices: jax.local_devices()[:n])
    config = with_sgd(checkpoint=str(trained), mesh__fsdp=2 if devices == 8 else 1)
    probe.run(config, str(tmp_path / name))
  one, eight = (list(losses_of(tmp_path / name).values()) for name in ("one", "eight"))
  np.testing.assert_allclose(one, eight, rtol=1e-4)


def test_a_batch_that_devices_do_not_divide_leaves_no_probe(trained, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda *args: jax.local_devices()[:8])
  config = changed(with_sgd(checkpoint=str(trained), mesh__fsdp=2), {"probe.batch_size": 12})
  with pytest.raises(UserError, match=r"probe\.batch_size: 12"):
    probe.run(config, str(tmp_path))
  assert not (tmp_path / "probe_sgd").exists()


def test_classifiers_of_other_principal_components_are_trained_anew(trained, tmp_path, monkeypatch):
  """Those of a version that fitted the components otherwise would be tested on axes that they haven't seen."""
  few = {"features.images": 64, "features.eval_images": 32}
  for version in (sets.PCA_VERSION, sets.PCA_VERSION + 1):
    monkeypatch.setattr(sets, "PCA_VERSION", version)
    probe.run(with_sgd(checkpoint=str(trained), **few), str(tmp_path))
  assert len(os.listdir(tmp_path / "probe_sgd")) == 2


@pytest.mark.slow
def test_watching_probes_every_checkpoint(trained, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(trained, run, ignore=shutil.ignore_patterns("features", "probe*"))
  config = config_of(job="probe", watch=True, watch_seconds=0.01)
  probe.run(config, str(run))
  steps = checkpoint.whole_steps(str(run))
  assert steps == [4, 8, 12]
  compared = read(run / "probe_checkpoints.json")["checkpoints"]
  assert [each["step"] for each in compared] == steps
  assert Image.open(run / "probe_checkpoints.png").size[0] > 400
  assert Image.open(run / "probe_loss.png").size[0] > 400
  for each in compared:
    values = read(run / "probe" / str(each["step"]) / "probe.json")
    assert values["step"] == each["step"] and len(values["rows"]) == 8
  # One checkpoint's features make room for the next one's.
  assert [name for name in os.listdir(run / "features") if not name.startswith("random")] == []
  losses = [each["validation_nats_per_token"] for each in compared]
  assert losses == sorted(losses, reverse=True)
  evaluate.run(dataclasses.replace(config, job="evaluate"), str(run))
  assert all((run / "evaluate" / str(step) / "evaluation.json").exists() for step in steps)


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"features__layers": (0, 7)}, r"features\.layers: 7 .*0 to 2"),
    ({"features__grid": 3}, r"features\.grid: 3"),
    ({"features__masks": 2}, r"features\.masks: 2"),
    ({"features__baselines": ("pixels", "inception")}, r"baselines: 'inception'.*pixels, pca, random"),
    ({"data__resolution": 16}, r"data\.resolution: 16.*trained at 8"),
    ({"probe__method": "adam"}, r"probe\.method: 'adam'.*lbfgs, sgd"),
    ({"probe__learning_rates": (1.0, -1.0)}, r"probe\.learning_rates: -1\.0"),
    ({"probe__concatenate": (0, 9)}, r"probe\.concatenate: layer 9"),
    ({"probe__method": "sgd", "probe__around_best": 5}, r"around_best: .*lbfgs"),
    ({"watch": True, "features__cache": "somewhere"}, r"features\.cache: somewhere"),
  ],
)  # fmt: skip
def test_mistakes_are_named(trained, tmp_path, overrides, message):
  with pytest.raises(UserError, match=message):
    config = config_of(checkpoint=str(trained), **overrides)
    probe.run(config, str(tmp_path / "out"))
  assert not (tmp_path / "out" / "probe.json").exists()
  assert not (tmp_path / "out" / "features").exists()


def test_a_cache_of_another_checkpoint_is_refused(trained, tmp_path):
  cache = str(tmp_path / "cache")
  config = config_of(features__cache=cache, features__baselines=("pixels",))
  config = dataclasses.replace(config, checkpoint=str(trained / "checkpoints" / "12"))
  probe.run(config, str(tmp_path / "one"))
  config = dataclasses.replace(config, checkpoint=str(trained / "checkpoints" / "8"))
  with pytest.raises(
    UserError, match=r"features of something else:\n  checkpoint: .* there, .* here"
  ):
    probe.run(config, str(tmp_path / "two"))


def test_a_bert_model(tmp_path):
  """Its features are those of whole images, or means over masked ones."""
  config = config_of(
    objective="masked", train__steps=4, train__learning_rate=1e-3, features__baselines=()
  )
  pretrain.run(config, str(tmp_path))
  accuracies = []
  for masks in (0, 2):
    probe.run(changed(config, {"features.masks": masks}), str(tmp_path))
    values = read(tmp_path / "probe.json")
    assert values["objective"] == "masked" and len(values["rows"]) == 3
    assert 1 < values["validation_nats_per_token"] < 3
    accuracies.append([row["validation_accuracy"] for row in values["rows"]])
  assert accuracies[0] != accuracies[1]
  assert len(list((tmp_path / "features").glob("4-*/train-*"))) == 2


def test_labels_are_needed(trained, tmp_path):
  pictures = tmp_path / "pictures"
  for split in ("train", "test"):
    (pictures / split).mkdir(parents=True)
    for i in range(12):
      Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(pictures / split / f"{i}.png")
  overrides = {"checkpoint": str(trained), "data__name": "folder", "data__path": str(pictures)}
  for job in (probe, lowdata):
    with pytest.raises(UserError, match="has no labels"):
      job.run(config_of(**overrides), str(tmp_path / "out"))


@pytest.mark.parametrize("asked", [(), (0,), (2, 10_000), (2, 40)])
def test_too_many_labels_or_none(trained, tmp_path, asked):
  with pytest.raises(UserError, match=r"config\.lowdata\.labels_per_class: .*expected"):
    lowdata.run(config_of(checkpoint=str(trained), lowdata__labels_per_class=asked), str(tmp_path))
  assert not (tmp_path / "features").exists()


def test_labels_of_a_folder_are_counted_without_reading_it(tmp_path):
  for name, count in (("cat", 3), ("dog", 5)):
    make_images(tmp_path / "train" / name, count)
  config = config_of(
    data__name="folder",
    data__path=str(tmp_path),
    data__validation=0.0,
    lowdata__labels_per_class=(3,),
  )
  train = sources.open_split(config.data, "train")
  for path in (tmp_path / "train").rglob("*.*"):
    path.unlink()
  lowdata.check_enough(config, train)
  config = changed(config, {"lowdata.labels_per_class": (1, 4)})
  with pytest.raises(
    UserError, match=r"4; class cat has 3 of the 8 training images .* expected at most 3"
  ):
    lowdata.check_enough(config, train)


def test_around_the_best():
  layers = tuple(range(9))
  assert probe.around(4, layers, 5) == (2, 3, 4, 5, 6)
  assert probe.around(0, layers, 5) == (0, 1, 2, 3, 4)
  assert probe.around(8, layers, 5) == (4, 5, 6, 7, 8)
  assert probe.around(1, (0, 1), 5) == (0, 1)


def test_sets_side_by_side():
  def layer(number):
    part = np.full((3, 2), number, np.float32), np.arange(3)
    return sets.FeatureSet(f"layer {number}", "layer", number, lambda: (part,) * 3)

  joined = sets.side_by_side([layer(0), layer(1), layer(2)], (2, 0))
  features, labels = joined.parts()[0]
  np.testing.assert_array_equal(features, [[2, 2, 0, 0]] * 3)
  np.testing.assert_array_equal(labels, np.arange(3))
