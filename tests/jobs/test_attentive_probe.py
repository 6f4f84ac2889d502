"""Job probe with attentive pooling: beside the mean's results, resumed, on any mesh, of any model."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from igpt_jax.errors import UserError
from igpt_jax.jobs import lowdata, probe
from igpt_jax.reporting import metrics
from igpt_jax.runner import loop
from support import own_checkpoint
from support.quickstart import shrunk
from support.tiny import changed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile", "one_device")]


def config_of(pooling="attentive", **overrides):
  return shrunk(**{
    "probe.pooling": pooling, "probe.epochs": 2, "probe.attention_rates": (1e-2, 1e-3),
    "probe.eval_every": 4, "probe.batch_size": 16,
    "train.log_every": 1, "features.images": 64, "features.eval_images": 40,
    "features.batch_size": 16, "features.layers": (0, 2), "features.baselines": ("pixels",),
    "probe.max_iterations": 10, "watch_seconds": 0.01,
    **{name.replace("__", "."): value for name, value in overrides.items()},
  })  # fmt: skip


def read(path):
  return json.loads(path.read_text())


def losses_of(workdir, fit="*"):
  """By step, of the attentive probe that is kept as `fit`, or of the only one there."""
  (path,) = workdir.glob(f"probe_adamw/{fit}/metrics.jsonl")
  return {r["step"]: r["probe_loss"] for r in metrics.read_jsonl(path) if "probe_loss" in r}


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
  return pathlib.Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("trained") / "run"))


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
  """A probe that nothing stopped, on stored features."""
  workdir = tmp_path_factory.mktemp("whole")
  probe.run(config_of(checkpoint=str(trained)), str(workdir))
  return workdir


def test_poolings_lie_beside_each_other(trained, whole, tmp_path):
  """Mean, attentive, and mean again in one workdir: each is what it is alone."""
  mean = config_of("mean", checkpoint=str(trained))
  probe.run(mean, str(tmp_path))
  before = (tmp_path / "probe.json").read_bytes()
  attentive = config_of(checkpoint=str(trained))
  for _ in range(2):  # the second time all is there
    probe.run(attentive, str(tmp_path))
    assert read(tmp_path / "probe_attentive.json") == read(whole / "probe_attentive.json")
  assert (tmp_path / "probe.json").read_bytes() == before
  probe.run(mean, str(tmp_path))
  assert (tmp_path / "probe.json").read_bytes() == before
  found = read(tmp_path / "probe_attentive.json")
  assert (found["pooling"], found["heads"], found["method"]) == ("attentive", 2, "adamw")
  of_mean = read(tmp_path / "probe.json")
  assert (of_mean["pooling"], of_mean["heads"], of_mean["method"]) == ("mean", None, "lbfgs")
  assert [row["name"] for row in found["rows"]] == ["layer 0", "layer 2", "raw pixels"]
  assert {row["learning_rate"] for row in found["rows"]} <= {1e-2, 1e-3}
  assert (
    "pooling: attentive, one learned query with 2 heads"
    in (tmp_path / "probe_attentive.md").read_text()
  )
  assert "pooling: mean over positions" in (tmp_path / "probe.md").read_text()
  told = (tmp_path / "summary.md").read_text()
  assert "Linear probe" in told and "Attentive probe" in told
  assert Image.open(tmp_path / "probe_attentive.png").size[0] > 400


@pytest.mark.parametrize("cached", [True, False])
def test_it_goes_on_where_it_was_stopped(trained, whole, tmp_path, cached, monkeypatch):
  """To the same bits on stored features; computed anew they are the same but for rounding.

  Though another probe was made in between, which is done beside it.
  """
  config = config_of(checkpoint=str(trained), probe__cached=cached)
  ask = loop.StopSignal.asked
  monkeypatch.setattr(
    loop.StopSignal,
    "asked",
    lambda self, at: setattr(self, "requested", "SIGTERM") or "SIGTERM" if at == 5 else None,
  )
  with pytest.raises(UserError, match=r"stopped by SIGTERM at step 5"):
    probe.run(config, str(tmp_path))
  monkeypatch.setattr(loop.StopSignal, "asked", ask)
  (fit,) = os.listdir(tmp_path / "probe_adamw")
  probe.run(changed(config, {"probe.attention_rates": (1e-2,)}), str(tmp_path))
  rates = {row["learning_rate"] for row in read(tmp_path / "probe_attentive.json")["rows"]}
  assert rates == {1e-2}
  probe.run(config, str(tmp_path))
  assert bool(list(tmp_path.glob("features"))) == cached
  found, expected = losses_of(tmp_path, fit), losses_of(whole)
  assert list(found) == list(range(1, 9))
  if cached:
    assert found == expected
    assert read(tmp_path / "probe_attentive.json") == read(whole / "probe_attentive.json")
  np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3)


def test_eight_devices_are_as_one(trained, whole, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda *args: jax.local_devices()[:8])
  probe.run(config_of(checkpoint=str(trained), mesh__fsdp=2), str(tmp_path))
  found, expected = losses_of(tmp_path), losses_of(whole)
  np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3)


def test_watching_does_each_pooling_once(trained, tmp_path):
  """A mean's results from before there was a choice count as the mean's."""
  run = tmp_path / "run"
  shutil.copytree(trained, run, ignore=shutil.ignore_patterns("features", "probe*"))
  for step in ("4", "8"):
    shutil.rmtree(run / "checkpoints" / step)
  watching = {"job": "probe", "watch": True}
  probe.run(config_of("mean", **watching), str(run))
  path = run / "probe" / "12" / "made_from.json"
  made_from = read(path)
  assert made_from["settings"].pop("probe.pooling") == "mean"
  assert not {"probe.heads", "probe.attention_rates", "probe.epochs"} & set(made_from["settings"])
  path.write_text(json.dumps(made_from))
  results = [run / "probe/12/probe.json", run / "probe_attentive/12/probe_attentive.json"]
  probe.run(config_of(**watching), str(run))
  before = [os.stat(each).st_mtime_ns for each in results]
  for pooling in ("mean", "attentive"):
    probe.run(config_of(pooling, **watching), str(run))
  assert [os.stat(each).st_mtime_ns for each in results] == before
  assert not list(run.glob("probe*/*.before"))
  probe.run(config_of(**watching, probe__heads=4), str(run))
  assert read(results[1])["heads"] == 4
  assert os.stat(results[0]).st_mtime_ns == before[0]


def test_a_bert_model_and_random_weights(tmp_path):
  """The head reads features of each position, which are means over masked inputs."""
  checkpoint = own_checkpoint.write(tmp_path / "run", resolution=8, causal=False)
  losses = []
  for masks in (0, 2):
    out = tmp_path / str(masks)
    baselines = {"features__baselines": ("random",) if masks else ()}
    config = config_of(
      checkpoint=str(checkpoint), features__masks=masks, probe__cached=False, **baselines
    )
    probe.run(config, str(out))
    losses.append(list(losses_of(out).values()))
  rows = read(out / "probe_attentive.json")["rows"]
  assert [row["kind"] for row in rows] == ["layer"] * 2 + ["random"] * 2
  assert losses[0] != losses[1] and np.isfinite(losses).all()


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"features__grid": 2}, r"features\.grid: 2 is for .*mean.*'attentive'; expected 1"),
    ({"probe__method": "sgd"}, r"probe\.method: 'sgd' is for .*mean.*expected ''"),
    ({"probe__concatenate": (0, 2)}, r"probe\.concatenate: \(0, 2\) is for"),
    ({"probe__around_best": 5}, r"probe\.around_best: 5 is for"),
    ({"probe__heads": 3}, r"probe\.heads: 3 doesn't divide the 16"),
    ({"probe__pooling": "max"}, r"probe\.pooling: 'max'.*mean, attentive"),
  ],
)
def test_mistakes_are_named(trained, tmp_path, overrides, message):
  with pytest.raises(UserError, match=message):
    probe.run(config_of(checkpoint=str(trained), **overrides), str(tmp_path / "out"))
  assert not list((tmp_path / "out").glob("**/*.json"))


def test_few_labels_stay_with_the_mean(trained, tmp_path, capsys):
  config = config_of(checkpoint=str(trained), lowdata__labels_per_class=(1,), lowdata__trials=1)
  lowdata.run(config, str(tmp_path))
  assert "linear classifiers of mean features; config.probe.pooling=attentive" in (
    capsys.readouterr().out
  )
