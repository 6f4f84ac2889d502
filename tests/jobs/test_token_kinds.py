"""Runs on raw RGB: trained and resumed, measured in bits per dimension, read by every job, and kept apart."""

import json
import math
import os

import numpy as np
import pytest
from PIL import Image

import igpt_jax
from igpt_jax import checkpoint
from igpt_jax.data import pipeline
from igpt_jax.data.sources import open_split
from igpt_jax.errors import UserError
from igpt_jax.jobs import complete, convert, evaluate, finetune, pretrain, probe, quality, sample
from igpt_jax.reporting import metrics
from support.quickstart import assert_same, params_of, shrunk, stop_at
from support.tiny import on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile", "one_device")

DIMENSIONS = {"channels": 3, "subpixels": 1}  # of a token
over_kinds = pytest.mark.parametrize("kind", DIMENSIONS)


def settings_of(kind, **changes):
  return shrunk(**{"data.token_kind": kind, "palette.size": 0, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folders = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in DIMENSIONS}
  for kind, folder in folders.items():
    on_one_device(pretrain, settings_of(kind, **{"train.progress_images": 2}), str(folder))
  return folders


def read(path):
  return json.loads(path.read_text())


@over_kinds
def test_training_tells_bits_per_dimension_and_resumes_bit_for_bit(
  kind, runs, tmp_path, monkeypatch
):
  settings = settings_of(kind, **{"train.progress_images": 2})
  with monkeypatch.context() as patch:
    stop_at(patch, 7)
    on_one_device(pretrain, settings, str(tmp_path))
  on_one_device(pretrain, settings, str(tmp_path))
  assert_same(params_of(tmp_path), params_of(runs[kind]))
  for workdir in (runs[kind], tmp_path):
    of_validation = [
      (record["validation_loss"], record["validation_bits_per_dim"])
      for record in metrics.read_jsonl(workdir / "metrics.jsonl")
      if "validation_loss" in record
    ]
    assert len(of_validation) == 2
    for nats, bits in of_validation:
      assert bits == pytest.approx(nats / (DIMENSIONS[kind] * math.log(2)))
    assert of_validation[-1][1] < 8  # less than equally likely levels
    assert (workdir / "progress" / "12.png").exists()
  info = checkpoint.describe(str(runs[kind]))
  assert info.config.token_kind == kind and info.palette is None
  assert info.run["config"]["data"]["token_kind"] == kind
  assert not (runs[kind] / "palette.npy").exists()


@over_kinds
def test_evaluation_is_exact_and_stands_beside_baselines(kind, runs, tmp_path):
  settings = settings_of(kind, checkpoint=str(runs[kind]), **{"evaluate.images": 40})
  evaluate.run(settings, str(tmp_path))
  values, each = read(tmp_path / "evaluation.json"), DIMENSIONS[kind]
  assert values["bits_per_dim"] == pytest.approx(values["nats_per_token"] / (each * math.log(2)))
  assert values["uniform"] == pytest.approx(each * math.log(256))
  images, shown = _images(settings, "train"), _images(settings, "test")[:40]
  seen = np.bincount(images.reshape(-1), minlength=256) + 1
  expected = -np.log(seen / seen.sum())[shown.reshape(-1)].mean() * each
  assert values["unigram"] == pytest.approx(expected, rel=1e-6)
  assert values["position_unigram"] < values["unigram"]
  # Python's model tells the same images' likelihood.
  nats = igpt_jax.load(str(runs[kind])).nats_per_token(list(shown))
  assert nats.mean() == pytest.approx(values["nats_per_token"], rel=1e-4)


def _images(settings, name):
  return np.concatenate(
    list(pipeline.image_stream(open_split(settings.data, name), settings.data, augment=False))
  )


@over_kinds
def test_samples_and_completions_are_raw_rgb(kind, runs, tmp_path):
  at = {"checkpoint": str(runs[kind])}
  sample.run(settings_of(kind, **at), str(tmp_path / "sample"))
  values = read(tmp_path / "sample" / "sample.json")
  assert 0 < values["samples_nats_per_token"] < 2 * DIMENSIONS[kind] * math.log(256)
  photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  os.makedirs(tmp_path / "photos")
  Image.fromarray(photo).save(tmp_path / "photos" / "one.png")
  asked = {"complete.images": str(tmp_path / "photos"), "complete.n": 2, "sample.scale": 1}
  complete.run(shrunk(job="complete", **at, **asked), str(tmp_path / "out"))
  drawn = np.asarray(Image.open(tmp_path / "out" / "one" / "0000.png").convert("RGB"))
  np.testing.assert_array_equal(drawn[:4], photo[:4])  # no palette: as given
  model = igpt_jax.load(str(runs[kind]))
  completed = model.complete(photo, n=2)
  np.testing.assert_array_equal(completed[0, 0], drawn)
  assert model.sample(1).shape == (1, 8, 8, 3) and model.features(photo).shape == (1, 16)


@pytest.mark.slow
@over_kinds
def test_probes_and_quality_take_them(kind, runs, tmp_path):
  at = {"checkpoint": str(runs[kind]), "train.eval_images": 32}
  probe.run(settings_of(kind, **at, **{"features.layers": (1,)}), str(tmp_path))
  values = read(tmp_path / "probe.json")
  assert {row["kind"] for row in values["rows"]} >= {"layer", "pixels"}
  quality.run(settings_of(kind, **at, **{"quality.images": 8}), str(tmp_path))
  assert read(tmp_path / "quality.json")["train_distance"] >= 0


def test_bert_predicts_all_channels_of_masked_pixels(tmp_path):
  settings = settings_of("channels", objective="masked", **{"train.progress_images": 2})
  on_one_device(pretrain, settings, str(tmp_path))
  records = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  # A BERT model's nats are no likelihood of images.
  assert not any("validation_bits_per_dim" in record for record in records)
  losses = [record["loss"] for record in records if "loss" in record]
  assert losses[0] == pytest.approx(3 * math.log(256), rel=1e-4) and losses[-1] < losses[0] - 0.5
  photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  Image.fromarray(photo).save(tmp_path / "one.png")
  asked = {"complete.images": str(tmp_path / "one.png"), "complete.n": 2, "sample.scale": 1}
  asked |= {"complete.hide": "left", "complete.passes": 3, "checkpoint": str(tmp_path)}
  complete.run(shrunk(job="complete", **asked), str(tmp_path / "out"))
  drawn = np.asarray(Image.open(tmp_path / "out" / "one" / "0000.png").convert("RGB"))
  np.testing.assert_array_equal(drawn[:, 4:], photo[:, 4:])


@pytest.mark.slow
def test_finetuning_takes_channels(runs, tmp_path):
  few = {"finetune.steps": 2, "finetune.eval_every": 2, "finetune.images": 32}
  at = {"checkpoint": str(runs["channels"]), "train.eval_images": 32, "evaluate.images": 32}
  finetune.run(settings_of("channels", **at, **few), str(tmp_path))
  assert checkpoint.describe(str(tmp_path / "finetune")).config.token_kind == "channels"
  assert (
    0 < read(tmp_path / "finetune" / "finetune.json")["test_nats_per_token"] < 3 * math.log(256)
  )


@over_kinds
def test_one_file_keeps_them_and_others_formats_refuse_them(kind, runs, tmp_path):
  for form in ("openai", "huggingface"):
    target = {"convert.source": str(runs[kind]), "convert.target": str(tmp_path / form)}
    with pytest.raises(
      UserError, match=f"format: {form}, but .*data.token_kind={kind}: its tokens"
    ):
      convert.run(shrunk(job="convert", **target, **{"convert.format": form}), "")
  target = {"convert.source": str(runs[kind]), "convert.target": str(tmp_path / "one.safetensors")}
  convert.run(shrunk(job="convert", **target, **{"convert.format": "safetensors"}), "")
  photo = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
  nats = [
    igpt_jax.load(str(path)).nats_per_token(photo)
    for path in (runs[kind], tmp_path / "one.safetensors")
  ]
  np.testing.assert_array_equal(*nats)


def test_kinds_dont_mix(runs, tiny_run, tmp_path):
  channels = str(runs["channels"])
  with pytest.raises(
    UserError, match=r"data.token_kind: palette; .* was trained on channels; fix: -"
  ):
    evaluate.run(shrunk(checkpoint=channels), str(tmp_path))
  with pytest.raises(UserError, match=r"data.token_kind: subpixels; .* was trained on palette"):
    sample.run(settings_of("subpixels", checkpoint=str(tiny_run)), str(tmp_path))
  with pytest.raises(UserError, match=r"data.token_kind: palette in the config, channels in the c"):
    on_one_device(pretrain, shrunk(**{"init_from": channels, "palette.size": 0}), str(tmp_path))
  advised = "--config.data.token_kind=channels --config.palette.size=0"
  with pytest.raises(UserError, match=rf"fix: {advised}; or another"):
    on_one_device(pretrain, shrunk(**{"init_from": channels, "palette.size": 17}), str(tmp_path))
  with pytest.raises(UserError, match=r"data\.token_kind: channels there, subpixels here"):
    on_one_device(pretrain, settings_of("subpixels"), channels)
  assert checkpoint.describe(str(tiny_run)).config.token_kind == "palette"


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"palette.size": 17},
      r"config.palette.size: 17; data.token_kind=channels takes no palette; exp",
    ),
    (
      {"palette.path": "default"},
      r"config.palette.path: 'default'; data.token_kind=channels takes",
    ),
    ({"job": "fit_palette"}, r"config.job: fit_palette; data.token_kind=channels takes no palette"),
    (
      {"data.name": "tokens", "data.path": "here"},
      r"config.data.token_kind: channels; data.name=tok",
    ),
    (
      {"data.token_kind": "subpixels", "objective": "masked"},
      "objective: masked; with data.token_k",
    ),
    (
      {"data.token_kind": "rgb"},
      "config.data.token_kind: 'rgb'; expected one of palette, channels",
    ),
  ],
)
def test_what_raw_rgb_has_no_use_for_is_refused_before_anything_begins(changes, message):
  with pytest.raises(UserError, match=message):
    settings_of("channels", **changes)
