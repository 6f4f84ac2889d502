"""The benchmark job measures what it says; how fast anything is, is not tested."""

import json
import time

import jax
import numpy as np
import pytest

from igpt_jax.config import choices
from igpt_jax.errors import UserError
from igpt_jax.jobs import benchmark
from igpt_jax.timing import device as measuring
from igpt_jax.training.compilation import flops_per_image
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer
from support import tiny
from support.tiny import settings_of


def make_config(tmp_path, changes=(), **benchmark_settings):
  own = {"repeats": 2, "samples": 3, "images": 20, **benchmark_settings}
  return settings_of(changes={
    "data.data_dir": str(tmp_path / "tfds"), "palette.size": 17, "model.n_layer": 2,
    "model.n_head": 2, "model.n_embd": 16, "train.batch_size": 8, "mesh.data": jax.device_count(),
    **{f"benchmark.{name}": value for name, value in own.items()}, **dict(changes),
  })  # fmt: skip


def timings(values):
  """All timings of a result, wherever they are."""
  if isinstance(values, dict):
    if {"seconds", "fastest", "slowest"} <= values.keys():
      yield values
    else:
      for value in values.values():
        yield from timings(value)
  elif isinstance(values, list):
    for value in values:
      yield from timings(value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_compile):
  """All four parts on the digits."""
  workdir = tmp_path_factory.mktemp("benchmark")
  config = make_config(workdir)
  benchmark.run(config, str(workdir))
  return config, json.loads((workdir / "benchmark.json").read_text()), workdir


def test_every_part_is_measured(whole):
  config, found, _ = whole
  assert found.keys() == {
    "machine", "versions", "model", "parameters", "objective", "note", "skipped",
    *benchmark.PARTS,
  }  # fmt: skip
  assert found["skipped"] == {}
  assert found["machine"].keys() >= {"device", "devices", "processor", "cores"}
  assert found["machine"]["devices"] == jax.device_count()
  assert found["versions"].keys() >= {"igpt_jax", "jax", "jaxlib", "flax", "python"}
  assert found["model"]["n_vocab"] == 17 and found["model"]["n_positions"] == 64
  assert found["training"]["batch_size"] == config.train.batch_size
  names = {row["implementation"] for row in found["attention"]["rows"]}
  assert {"xla", found["attention"]["auto"]} <= names
  assert [row["stage"] for row in found["input"]["stages"]][:2] == ["read", "decode"]
  assert found["sampling"]["samples"] == 8  # three, and as many more as eight devices share evenly


def test_medians_lie_within_the_spread(whole):
  config, found, _ = whole
  all_of_them = list(timings(found))
  assert len(all_of_them) >= 2 + 2 * 2 + 1 + 8
  for each in all_of_them:
    assert 0 < each["fastest"] <= each["seconds"] <= each["slowest"]
    assert each["repeats"] == config.benchmark.repeats


def test_rates_follow_from_the_medians(whole):
  config, found, _ = whole
  training = found["training"]
  speed = config.train.batch_size / training["step"]["seconds"]
  assert training["images_per_second"] == pytest.approx(speed)
  assert training["tokens_per_second"] == pytest.approx(64 * speed)
  model = choices.model_config(config, n_vocab=17)
  assert training["flops_per_image"] == flops_per_image(model)
  assert training["tflops_per_second"] == pytest.approx(speed * flops_per_image(model) / 1e12)
  share = training["tflops_per_second"] / training["matmul_tflops_per_second"]
  assert training["share_of_matmul"] == pytest.approx(share)
  flops = 2 * jax.device_count() * 1024**3
  assert training["matmul_tflops_per_second"] == pytest.approx(
    flops / training["matmul"]["seconds"] / 1e12
  )
  assert training["memory_per_device"]["temp"] > 0
  sampling = found["sampling"]
  assert sampling["tokens_per_second"] == pytest.approx(8 * 64 / sampling["all_samples"]["seconds"])
  times = found["input"]["pictures_per_second"] / training["images_per_second"]
  assert found["input"]["times_training"] == pytest.approx(times)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU can't say")
def test_a_cpu_has_no_mfu_and_claims_nothing(whole):
  _, found, workdir = whole
  assert found["training"]["mfu"] is None and found["training"]["peak_tflops_per_second"] is None
  assert found["note"] == "CPU: relative use only"
  text = (workdir / "benchmark.md").read_text()
  assert "relative use only" in text and "MFU" not in text


def test_the_table_shows_every_timing(whole):
  _, found, workdir = whole
  text = (workdir / "benchmark.md").read_text()
  rows = [line for line in text.splitlines() if line.startswith("|")][2:]
  assert len(rows) == len(list(timings(found)))
  for what in ("training step, batch 8", "xla (auto), forward and backward", "sampling 8 images"):
    assert what in text
  assert "times as fast as training on this machine" in text


def test_input_that_is_not_there_is_skipped_and_told(tmp_path, capsys):
  nowhere = {"data.name": "folder", "data.path": str(tmp_path / "nowhere")}
  config = make_config(tmp_path, nowhere, parts=("attention", "input"))
  benchmark.run(config, str(tmp_path))
  found = json.loads((tmp_path / "benchmark.json").read_text())
  assert "input" not in found and "nowhere" in found["skipped"]["input"]
  assert "attention" in found and "training" not in found
  assert "- input: skipped: " in (tmp_path / "benchmark.md").read_text()
  assert "input: skipped: " in capsys.readouterr().out


def test_the_only_part_that_cannot_be_measured_is_an_error(tmp_path):
  nowhere = {"data.name": "folder", "data.path": str(tmp_path / "nowhere")}
  config = make_config(tmp_path, nowhere, parts=("input",))
  with pytest.raises(UserError, match="nowhere"):
    benchmark.run(config, str(tmp_path))
  config = make_config(tmp_path, {"objective": "masked"}, parts=("sampling",))
  with pytest.raises(UserError, match=r"masked.*left-to-right"):
    benchmark.run(config, str(tmp_path))
  assert not (tmp_path / "benchmark.json").exists()


def test_tokens_are_timed_without_a_palette(tmp_path):
  there = {"data.name": "tokens", "data.path": str(tmp_path / "tokens")}
  config = make_config(tmp_path, there, parts=("input",))
  tokens = np.random.default_rng(0).integers(17, size=(40, 64), dtype=np.uint8)
  (tmp_path / "tokens").mkdir()
  np.save(tmp_path / "tokens" / "train.npy", tokens)
  benchmark.run(config, str(tmp_path))
  found = json.loads((tmp_path / "benchmark.json").read_text())["input"]
  assert found["stages"] == [] and found["pipeline"] == "tokens"
  assert found["pictures_per_second"] > 0 and found["times_training"] is None


@pytest.mark.parametrize("parts", [("training", "imput"), ()])
def test_parts_of_other_names_are_refused(tmp_path, parts, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: pytest.fail("looked for devices first"))
  settings = {"benchmark.parts": parts}
  with pytest.raises(UserError, match=r"benchmark.parts: .*training, attention, sampling, input"):
    settings_of(changes=settings)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
  changes = {"train.batch_size": 16 * jax.device_count(), "train.accumulate": 3}
  config = make_config(tmp_path, changes)
  with pytest.raises(UserError, match=r"train.batch_size: .*train.accumulate 3; nearest"):
    benchmark.run(config, str(tmp_path))


@pytest.mark.parametrize("name", ["repeats", "samples", "images"])
def test_less_than_one_is_refused(tmp_path, name):
  with pytest.raises(UserError, match=f"benchmark.{name}: 0; expected 1 "):
    make_config(tmp_path, **{name: 0})


def test_sides_take_turns():
  order, told = [], []

  def side(name):
    def call():
      order.append(name)
      return jax.numpy.zeros(())

    return call

  found = measuring.take_turns({"a": side("a"), "b": side("b")}, 3, told.append)
  assert told == [1, 2, 3]
  calls = {name: found[name].calls for name in "ab"}
  turns = order[4:]  # two calls of each before: one to compile, one to see how long it takes
  assert turns == (["a"] * calls["a"] + ["b"] * calls["b"]) * 3


def test_a_median_and_its_spread():
  found = measuring.timing([3.0, 1.0, 8.0], calls=2)
  assert (found.seconds, found.fastest, found.slowest) == (3.0, 1.0, 8.0)
  assert (found.repeats, found.calls) == (3, 2)


def test_no_round_but_the_first_begins_late():
  def side():
    return jax.numpy.zeros(())

  late = measuring.take_turns({"a": side}, 4, lambda done: None, until=time.monotonic())
  assert late["a"].repeats == 1
  soon = measuring.take_turns({"a": side}, 2, lambda done: None, until=time.monotonic() + 600)
  assert soon["a"].repeats == 2


def test_the_step_is_compiled_for_its_mesh():
  """The step is pretraining's: without the mesh no activation is pinned, and no sum scattered."""
  config, optimizer = tiny.make_config(), make_optimizer(OptimizerConfig(1e-3, 10))
  seen = []

  def train_step(state, batch):
    seen.append(dict(jax.sharding.get_abstract_mesh().shape))
    return state, {}

  mesh = tiny.mesh_of((2, 4, 1))
  compiled = measuring.compile_training_step(config, train_step, optimizer, mesh, 16)
  assert seen == [{"data": 2, "fsdp": 4, "tensor": 1}]
  call = measuring.step_call(config, compiled, optimizer, mesh, 16)
  assert call() == {}
