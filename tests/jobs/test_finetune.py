"""Job finetune as a person runs it, on digits: what it leaves, how it goes on, what it refuses."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.checkpoint import writing
from igpt_jax.config import choices
from igpt_jax.errors import UserError
from igpt_jax.jobs import convert, evaluate, finetune, pretrain, sample
from igpt_jax.parallel.sharding import make_mesh
from igpt_jax.reporting import metrics
from igpt_jax.runner import loop, saving
from igpt_jax.training import compilation
from igpt_jax.training import joint as finetune_lib
from igpt_jax.workspace import checkpoint_tokens, streams, weights
from support.quickstart import shrunk
from support.tiny import on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")


DIGITS = tuple("0123456789")


def tiny(**overrides):
  """The quickstart, small, and a fine-tuning of 9 steps with 3 evaluations."""
  return shrunk(**{
    "train.steps": 4, "train.eval_every": 0, "train.max_to_keep": 1, "evaluate.images": 50,
    "finetune.batch_size": 16, "finetune.steps": 9, "finetune.eval_every": 3,
    "finetune.learning_rate": 1e-2, "finetune.masks": 2,
    "sample.samples": 2, "sample.completions": 1, "sample.per_image": 1,
    **overrides,
  })  # fmt: skip


@pytest.fixture(scope="module")
def start(tiny_run, tmp_path_factory):
  """A pretrained workdir to begin from; each test fine-tunes in a workdir of its own."""
  return shutil.copytree(tiny_run, str(tmp_path_factory.mktemp("start") / "run"))


@pytest.fixture(scope="module")
def tuned(start, tmp_path_factory):
  """A fine-tuning that was never interrupted."""
  workdir = tmp_path_factory.mktemp("tuned")
  on_one_device(finetune, tiny(checkpoint=start), str(workdir))
  return workdir


def result(workdir, folder="finetune"):
  return json.loads((workdir / folder / "finetune.json").read_text())


def mesh():
  return make_mesh(devices=jax.devices()[:1])


def params_of(path):
  found = checkpoint.describe(str(path))
  return checkpoint.load_params(found, mesh()) | {"head": checkpoint.load_head(found, mesh())}


def assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def accuracies(workdir):
  records = metrics.read_jsonl(workdir / "finetune" / "metrics.jsonl")
  return {r["step"]: r["validation_accuracy"] for r in records if "validation_accuracy" in r}


def test_it_leaves_everything(start, tuned):
  values = result(tuned)
  folder = tuned / "finetune"
  records = metrics.read_jsonl(folder / "metrics.jsonl")
  training = [r for r in records if "loss" in r]
  assert [r["step"] for r in training] == [2, 4, 6, 8, 9]
  for record in training:
    both = record["generative_loss"] + record["classification_loss"]
    assert record["loss"] == pytest.approx(both, rel=1e-5)
    assert record["learning_rate"] == pytest.approx(1e-2)  # no cosine
  validation = accuracies(tuned)
  assert list(validation) == [3, 6, 9]
  assert values["steps"] == 9 and not values["ended_early"]
  assert values["validation_accuracy"] == max(validation.values())
  assert validation[values["best_step"]] == max(validation.values())
  assert values["test_images"] == 50 and values["classes"] == 10 and values["layer"] == 2
  assert values["test_accuracy_of_mean"] is None  # of BERT's masks alone
  assert values["start_accuracy"] is None  # it had no head
  on_one_device(evaluate, tiny(checkpoint=start), str(tuned / "evaluated"))
  evaluated = json.loads((tuned / "evaluated" / "evaluation.json").read_text())
  assert values["start_nats_per_token"] == pytest.approx(evaluated["nats_per_token"], abs=1e-5)
  assert values["start_checkpoint"] == evaluated["checkpoint"]
  assert "Fine-tuning" in (tuned / "summary.md").read_text()
  assert Image.open(folder / "finetune.png").size[0] > 400
  kept = {int(name) for name in os.listdir(folder / "checkpoints")}
  assert kept == {9, values["best_step"]}


def test_test_is_scored_once_with_the_best(tuned):
  """The checkpoint that is named gives the figures that are told."""
  values = result(tuned)
  config = tiny()
  found = checkpoint.describe(values["checkpoint"])
  assert found.step == values["best_step"] and found.classes == DIGITS
  from igpt_jax.data.sources import open_split

  data_config = config.data
  split = open_split(data_config, "test")
  params = params_of(values["checkpoint"])
  params["clf"] = params.pop("head")
  classifier = finetune_lib.Classifier(found.config, mesh(), layer=2)
  spec = checkpoint_tokens.tokens_of(found)
  with streams.eval_stream(split, data_config, spec, mesh(), 25, 50) as stream:
    scores = classifier(params, stream)
  assert scores.accuracy == pytest.approx(values["test_accuracy"])
  assert scores.nats_per_token == pytest.approx(values["test_nats_per_token"], rel=1e-5)


def stopping(monkeypatch, stop_at):
  """SIGTERM, as it were, after that many steps of whatever is trained from here on."""
  steps = []

  class StopAfter(loop.StopSignal):
    def asked(self, at_step):
      self.requested = "SIGTERM" if len(steps) >= stop_at else None
      return self.requested

  call_step = compilation.CompiledStep.__call__
  monkeypatch.setattr(loop, "StopSignal", StopAfter)
  monkeypatch.setattr(
    compilation.CompiledStep,
    "__call__",
    lambda self, *args: steps.append(1) or call_step(self, *args),
  )


@pytest.mark.parametrize("stop_at", [2, 6])
def test_resumed_it_equals_the_uninterrupted_one(start, tuned, tmp_path, monkeypatch, stop_at):
  """Bit for bit, the best so far and the start's figures included."""
  with monkeypatch.context() as patch:
    stopping(patch, stop_at)
    on_one_device(finetune, tiny(checkpoint=start), str(tmp_path))
  assert checkpoint.find(str(tmp_path / "finetune"))[1] == stop_at
  assert not (tmp_path / "finetune" / "finetune.json").exists()
  on_one_device(finetune, tiny(checkpoint=start), str(tmp_path))
  assert_same(params_of(tmp_path / "finetune"), params_of(tuned / "finetune"))
  found, expected = result(tmp_path), result(tuned)
  for name in ("checkpoint", "elapsed_seconds", "goodput", "seconds", "starts", "programs"):
    del found[name], expected[name]
  assert found == expected
  assert accuracies(tmp_path) == accuracies(tuned)
  run, theirs = (checkpoint.describe(str(each / "finetune")).run for each in (tmp_path, tuned))
  assert run["best"] == theirs["best"] and run["began_with"] == theirs["began_with"]


def scripted(monkeypatch, accuracies):
  """Validation accuracies as given, test's as they are."""
  left = list(accuracies)
  score = finetune.FineTuning.score

  def scored(self, params, name, *given):
    scores = score(self, params, name, *given)
    return scores if name == "test" else finetune_lib.Scores(32, left.pop(0), 0.0, 1.0, 2.0)

  monkeypatch.setattr(finetune.FineTuning, "score", scored)
  return left


def test_it_ends_when_nothing_gets_better_and_takes_the_best(start, tmp_path, monkeypatch):
  """The first of equals is the best; being stopped in between doesn't make it more patient."""
  settings = {
    "checkpoint": start, "finetune.eval_every": 1, "finetune.patience": 3, "finetune.steps": 50,
  }  # fmt: skip
  left = scripted(monkeypatch, [0.1, 0.5, 0.2, 0.5, 0.4, 0.9])
  with monkeypatch.context() as patch:
    stopping(patch, 3)
    on_one_device(finetune, tiny(**settings), str(tmp_path))
  assert len(left) == 4  # it was stopped out of the third evaluation
  on_one_device(finetune, tiny(**settings), str(tmp_path))
  assert left == [0.9]  # never asked for
  values = result(tmp_path)
  assert values["best_step"] == 2 and values["steps"] == 5 and values["ended_early"]
  assert values["validation_accuracy"] == 0.5
  assert values["checkpoint"] == str(tmp_path / "finetune" / "checkpoints" / "2")
  assert sorted(os.listdir(tmp_path / "finetune" / "checkpoints")) == ["2", "5"]
  on_one_device(finetune, tiny(**settings), str(tmp_path))  # once more: there is nothing left to do
  assert left == [0.9] and result(tmp_path)["steps"] == 5


@pytest.mark.parametrize("patience", [0, 2])
def test_the_best_of_those_that_were_saved_is_taken(start, tmp_path, monkeypatch, patience):
  """What a failing disk has swallowed isn't the best, also of a run that named it so before."""
  sync = writing._sync_unnamed

  def fail_at_2(folder):
    if any(name.startswith("2.") for name in os.listdir(folder)):
      raise OSError(28, os.strerror(28))
    sync(folder)

  monkeypatch.setattr(writing, "_sync_unnamed", fail_at_2)
  monkeypatch.setattr(saving, "_FIRST_PAUSE", 0.01)
  settings = {"checkpoint": start, "finetune.eval_every": 1, "finetune.steps": 5}
  settings |= {"finetune.patience": patience, "train.max_to_keep": 2}
  left = scripted(monkeypatch, [0.1, 0.9, 0.4, 0.3, 0.3])
  on_one_device(finetune, tiny(**settings), str(tmp_path))
  values, folder = result(tmp_path), tmp_path / "finetune" / "checkpoints"
  assert not (folder / "2").exists() and left == ([0.3] if patience else [])
  assert values["best_step"] == 3 and values["validation_accuracy"] == 0.4
  assert values["checkpoint"] == str(folder / "3")
  on_one_device(finetune, tiny(**settings), str(tmp_path))
  assert result(tmp_path)["best_step"] == 3

  shutil.rmtree(folder / "3")  # as it were in a run of before, whose best was never there
  on_one_device(finetune, tiny(**settings), str(tmp_path))
  assert result(tmp_path)["best_step"] == 4


def test_every_other_job_reads_what_it_wrote(tuned, tmp_path):
  path = result(tuned)["checkpoint"]
  config = tiny(checkpoint=path)
  on_one_device(evaluate, config, str(tmp_path / "evaluate"))
  evaluated = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
  assert evaluated["nats_per_token"] == pytest.approx(
    result(tuned)["test_nats_per_token"], abs=1e-5
  )
  sample.run(config, str(tmp_path / "sample"))
  for format in ("orbax", "safetensors", "huggingface"):
    target = str(tmp_path / format)
    settings = {"convert.source": path, "convert.target": target, "convert.format": format}
    convert.run(tiny(**settings), str(tmp_path / "convert"))
    # The head stays behind, whatever the run says of it.
    assert weights.describe(target, config).classes == ()
  trained = checkpoint.load_pretrained(str(tmp_path / "orbax"), mesh())
  found = params_of(path)
  del found["head"]
  assert_same(trained.params, found)
  # And what is written in another format can be begun from: the same model, a new head.
  begun = {"checkpoint": str(tmp_path / "huggingface"), "finetune.steps": 1}
  on_one_device(finetune, tiny(**begun), str(tmp_path / "tuned"))
  told = result(tmp_path / "tuned")
  assert told["start_nats_per_token"] == pytest.approx(evaluated["nats_per_token"], abs=1e-5)
  assert told["start_accuracy"] is None


def test_it_goes_on_from_a_fine_tuned_checkpoint(start, tuned, tmp_path):
  """With its head: the score to begin with is the score that was told."""
  before = result(tuned)
  on_one_device(
    finetune,
    tiny(**{"checkpoint": before["checkpoint"], "finetune.steps": 3}),
    str(tmp_path / "again"),
  )
  after = result(tmp_path / "again")
  assert after["start_accuracy"] == pytest.approx(before["test_accuracy"])
  assert after["start_nats_per_token"] == pytest.approx(before["test_nats_per_token"], rel=1e-6)
  # A head at the first layer is a head too.
  lowest = {"finetune.layer": 0, "finetune.steps": 1}
  on_one_device(finetune, tiny(checkpoint=start, **lowest), str(tmp_path / "lowest"))
  before = result(tmp_path / "lowest")
  on_one_device(finetune, tiny(checkpoint=before["checkpoint"], **lowest), str(tmp_path / "higher"))
  assert before["layer"] == 0 and before["start_accuracy"] is None
  assert result(tmp_path / "higher")["start_accuracy"] == before["test_accuracy"]
  before = result(tuned)
  with pytest.raises(UserError, match=r"finetune.layer: 1; .* reads layer 2"):
    on_one_device(
      finetune,
      tiny(**{"checkpoint": before["checkpoint"], "finetune.layer": 1}),
      str(tmp_path / "layer"),
    )


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_from_scratch(start, tmp_path, with_checkpoint):
  """The architecture is the checkpoint's, or the config's where there is none."""
  settings = {"finetune.scratch": True, "finetune.steps": 3}
  if with_checkpoint:
    settings |= {"checkpoint": start, "model.n_embd": 32}
  on_one_device(finetune, tiny(**settings), str(tmp_path))
  values = result(tmp_path, "finetune_scratch")
  assert values["start_checkpoint"] is None and values["start_nats_per_token"] is None
  assert checkpoint.describe(values["checkpoint"]).config.n_embd == 16
  assert not (tmp_path / "finetune").exists()
  assert "random parameters" in (tmp_path / "summary.md").read_text()
  records = metrics.read_jsonl(tmp_path / "finetune_scratch" / "metrics.jsonl")
  assert records[0]["generative_loss"] > np.log(17) - 0.3  # it knew nothing


def test_bert_votes(tmp_path):
  config = tiny(objective="masked", **{"finetune.images": 40, "finetune.augment": "shift"})
  on_one_device(pretrain, config, str(tmp_path))
  on_one_device(finetune, config, str(tmp_path))  # from the workdir's own checkpoint
  values = result(tmp_path)
  assert values["masks_per_picture"] == 2 and values["objective"] == "masked"
  assert 0 <= values["test_accuracy_of_mean"] <= 1
  assert values["data"]["train"].startswith("digits") and "train[40 of" in values["data"]["train"]
  assert values["augment"] == "shift"
  records = metrics.read_jsonl(tmp_path / "finetune" / "metrics.jsonl")
  assert any("validation_accuracy_of_mean" in record for record in records)


def test_classification_alone_leaves_the_output_table(start, tmp_path):
  config = tiny(**{"checkpoint": start, "finetune.generative": 0.0, "finetune.steps": 3})
  on_one_device(finetune, config, str(tmp_path))
  before = checkpoint.load_pretrained(start, mesh()).params
  after = params_of(tmp_path / "finetune")
  np.testing.assert_array_equal(before["wtet"], after["wtet"])
  assert np.abs(before["wte"] - after["wte"]).max() > 1e-3
  assert result(tmp_path)["test_nats_per_token"] > 0


def test_a_tenth_of_the_sizes_rate():
  for objective, rate in (("autoregressive", 3e-4), ("masked", 1e-3)):
    config = tiny(objective=objective, **{"finetune.learning_rate": 0.0, "train.b2": 0.9})
    made = choices.finetuning_optimizer_config(config)
    assert made.learning_rate == pytest.approx(rate)
    assert (made.schedule, made.b1, made.b2, made.steps) == ("constant", 0.9, 0.9, 9)


def test_a_chosen_b2_is_that_of_the_fine_tunings_batches():
  config = tiny(**{"train.b2": 0.0, "train.batch_size": 64, "finetune.batch_size": 16})
  chosen = 0.95 ** (16 / 128)
  assert choices.finetuning_optimizer_config(config).b2 == chosen
  settled = choices.settle(config, batch_size=config.finetune.batch_size)
  assert settled.train.b2 == choices.finetuning_optimizer_config(settled).b2 == chosen


MISTAKES = {
  "layer": ({"finetune.layer": 3}, r"finetune.layer: 3; expected 0 to the model's n_layer 2"),
  "layer below": ({"finetune.layer": -2}, r"finetune.layer: -2"),
  "negative weight": ({"finetune.generative": -1.0}, r"finetune.generative: -1.0"),
  "nan weight": ({"finetune.classification": float("nan")}, r"finetune.classification: nan"),
  "no weight": (
    {"finetune.generative": 0.0, "finetune.classification": 0.0}, "both 0; expected a positive",
  ),
  "warm-up": ({"finetune.warmup_steps": 10}, r"finetune.warmup_steps: 10; .* finetune.steps 9"),
  "resolution": ({"data.resolution": 16}, r"trained at 8, .*; fix: --config.data.resolution=8"),
  "augmentation": ({"finetune.augment": "mixup"}, "mixup"),
  "unlabelled": ({"data.name": "folder", "data.path": "unlabelled"}, "has no labels"),
  "one class": ({"data.name": "folder", "data.path": "one"}, "has one class alone, cold"),
  "no checkpoint": ({"checkpoint": ""}, "no checkpoint in"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Images without labels, of one class, and of two."""
  root = tmp_path_factory.mktemp("folders")
  rng = np.random.default_rng(0)
  for path in ("unlabelled/{}", "one/{}/cold", "labelled/{}/cold", "labelled/{}/warm"):
    for split, count in (("train", 20), ("test", 4)):
      folder = root / path.format(split)
      folder.mkdir(parents=True)
      for i in range(count):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
  return root


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said_before_anything_is_compiled(start, folders, tmp_path, monkeypatch, name):
  overrides, said = MISTAKES[name]
  overrides = {"checkpoint": start, **overrides}
  if "data.path" in overrides:
    overrides["data.path"] = str(folders / overrides["data.path"])
  monkeypatch.setattr(compilation, "compile_step", lambda *args: pytest.fail("compiled"))
  with pytest.raises(UserError, match=said):
    on_one_device(finetune, tiny(job="finetune", **overrides), str(tmp_path))
  assert not (tmp_path / "finetune" / "config.json").exists()
  assert not (tmp_path / "finetune" / "checkpoints").exists()


def test_a_batch_that_doesnt_divide_is_refused(start, tmp_path):
  with pytest.raises(UserError, match=r"finetune.batch_size: 12 .* nearest: 8 or 16"):
    finetune.run(
      tiny(**{"checkpoint": start, "finetune.batch_size": 12}), str(tmp_path), mesh=make_mesh()
    )


def test_a_head_of_other_classes_is_refused(tuned, folders, tmp_path):
  config = tiny(**{
    "checkpoint": result(tuned)["checkpoint"],
    "data.name": "folder", "data.path": str(folders / "labelled"),
  })  # fmt: skip
  with pytest.raises(UserError, match=r"has 10 classes \(0, 1, 2, …\), .* has 2 \(cold, warm\)"):
    on_one_device(finetune, config, str(tmp_path))


def test_another_fine_tuning_is_refused_in_its_folder(start, tuned):
  for overrides, field in (
    ({"finetune.generative": 0.5}, r"finetune\.generative: 1.0 there, 0.5 here"),
    ({"checkpoint": result(tuned)["checkpoint"]}, "checkpoint: "),
    ({"train.b1": 0.5}, r"train\.b1"),
  ):
    with pytest.raises(UserError, match=field):
      on_one_device(finetune, tiny(**{"checkpoint": start, **overrides}), str(tuned))
  # What only pretraining heeds may change, and what is told beside the training.
  on_one_device(
    finetune,
    tiny(**{"checkpoint": start, "train.steps": 9, "train.log_every": 5, "probe.steps": 7}),
    str(tuned),
  )
