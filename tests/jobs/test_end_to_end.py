"""The jobs as a person runs them: real configs, shrunk; real subprocesses where exit codes matter."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.config.read import settings_of
from igpt_jax.errors import UserError
from igpt_jax.jobs import evaluate, pretrain, probe, sample
from igpt_jax.jobs import fit_palette as fit_palette_job
from igpt_jax.reporting import metrics
from igpt_jax.runner import loop
from igpt_jax.tokens import TokenSpec
from igpt_jax.training import compilation
from igpt_jax.workspace import streams, training_palette
from support.lives import Lives
from support.paths import ROOT
from support.quickstart import assert_same, call, command, load_config, params_of, shrunk
from support.tiny import changed, on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
  """A run that was never interrupted."""
  return pathlib.Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("trained") / "run"))


def test_pretrain_leaves_everything(trained):
  records = metrics.read_jsonl(trained / "metrics.jsonl")
  training = [r for r in records if "loss" in r]
  assert [r["step"] for r in training] == [2, 4, 6, 8, 10, 12]
  assert [r["step"] for r in records if "validation_loss" in r] == [6, 12]
  assert training[0]["learning_rate"] == pytest.approx(1.5e-3)
  assert training[-1]["loss"] < training[0]["loss"]
  assert (
    "images_per_second" in training[-1] and "mfu" not in training[-1]
  )  # a CPU has no known peak
  summary = (trained / "summary.md").read_text()
  assert "Pretraining" in summary and "validation" in summary
  assert Image.open(trained / "loss.png").size[0] > 400
  assert np.load(trained / "palette.npy", allow_pickle=False).shape == (17, 3)
  assert sorted(os.listdir(trained / "checkpoints")) == ["12", "4", "8"]


def test_the_step_compiles_once_and_moves_nothing_to_the_host(trained, tmp_path, monkeypatch):
  """Steps run under a guard that forbids transfers; compile_step is called once a run."""
  calls = []
  compile_step = compilation.compile_step
  monkeypatch.setattr(
    compilation, "compile_step", lambda *args: calls.append(args) or compile_step(*args)
  )
  on_one_device(pretrain, shrunk(), str(tmp_path))
  assert len(calls) == 1
  assert_same(params_of(tmp_path), params_of(trained))  # and the same seed gives the same run


def run_until(stop_at, settings, workdir, monkeypatch):
  """Pretraining that is asked to stop after so many steps."""
  stop = loop.StopSignal
  steps = []

  class StopAfter(stop):
    @property
    def requested(self):
      return "SIGTERM" if len(steps) >= stop_at else None

    @requested.setter
    def requested(self, value):
      pass

  call_step = compilation.CompiledStep.__call__
  with monkeypatch.context() as patch:
    patch.setattr(loop, "StopSignal", StopAfter)
    patch.setattr(
      compilation.CompiledStep,
      "__call__",
      lambda self, *args: steps.append(1) or call_step(self, *args),
    )
    on_one_device(pretrain, settings, str(workdir))
  assert len(steps) == stop_at
  assert checkpoint.find(str(workdir))[1] == stop_at


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_resumed_run_equals_the_uninterrupted_one(trained, tmp_path, monkeypatch, stop_at):
  """Stopped after any step and begun again: the same parameters, metrics without gap or repeat."""
  run_until(stop_at, shrunk(), tmp_path, monkeypatch)
  on_one_device(pretrain, shrunk(), str(tmp_path))
  assert_same(params_of(tmp_path), params_of(trained))

  def told(workdir):
    return [
      (r["step"], r.get("loss"), r.get("validation_loss"))
      for r in metrics.read_jsonl(workdir / "metrics.jsonl")
    ]

  assert told(tmp_path) == told(trained)
  saved = checkpoint.Checkpoints(str(tmp_path)).read_run(12)
  assert saved["data"]["next_index"] == 12 * 16


def test_muon_resumes_bit_for_bit_and_no_run_changes_its_optimizer(tmp_path, monkeypatch):
  """Its momentum and Adam's moments are saved, and neither goes on as the other.

  Axial positions, whose tables are Adam's, are in the same run, so that it is one run fewer.
  """
  settings = shrunk(train__optimizer="muon", model__positions="axial")
  straight, stopped = tmp_path / "straight", tmp_path / "stopped"
  on_one_device(pretrain, settings, str(straight))
  run_until(5, settings, stopped, monkeypatch)
  for name, other, theirs in (
    ("train.optimizer", "adam", "muon"),
    ("model.positions", "learned", "axial"),
  ):
    with pytest.raises(UserError, match=f"{name}: {theirs} there, {other} here"):
      on_one_device(pretrain, changed(settings, {name: other}), str(stopped))
  on_one_device(pretrain, settings, str(stopped))
  assert_same(params_of(stopped), params_of(straight))
  losses = [
    [r["loss"] for r in metrics.read_jsonl(run / "metrics.jsonl") if "loss" in r]
    for run in (straight, stopped)
  ]
  assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
  last, earlier = params_of(straight), params_of(straight, 4)
  for table in ("wpe_row", "wpe_column"):  # every row and column has learned
    assert np.abs(last[table] - earlier[table]).max(axis=1).min() > 0, table


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
  """A real signal to a real process: exit status 0, a checkpoint of the step it had reached."""
  workdir = tmp_path / "run"
  process = subprocess.Popen(
    command(
      "configs/quickstart.py",
      workdir,
      "--config.model.n_layer=1",
      "--config.model.n_embd=16",
      "--config.train.steps=100000",
      "--config.train.log_every=5",
    ),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith("step"):
      process.send_signal(signal.SIGTERM)
      break
  rest, _ = process.communicate(timeout=120)
  assert process.returncode == 0, "".join(lines) + rest
  assert "stopped by SIGTERM at step" in rest and "goes on from here" in rest
  step = int(rest.split("at step ")[1].split(":")[0])
  assert checkpoint.find(str(workdir))[1] == step


def test_evaluate(trained):
  on_one_device(evaluate, shrunk(), str(trained))
  values = json.loads((trained / "evaluation.json").read_text())
  assert values["images"] == 300  # all of test, once
  assert values["uniform"] == pytest.approx(np.log(17))
  assert values["unigram"] == pytest.approx(2.05, abs=0.02)
  assert values["position_unigram"] == pytest.approx(1.68, abs=0.02)
  assert values["bits_per_token"] == pytest.approx(values["nats_per_token"] / np.log(2))
  assert 1.0 < values["nats_per_token"] < values["uniform"]
  # The number doesn't depend on how the images are batched.
  on_one_device(evaluate, shrunk(**{"evaluate.batch_size": 77}), str(trained))
  again = json.loads((trained / "evaluation.json").read_text())
  assert again["nats_per_token"] == pytest.approx(values["nats_per_token"], abs=1e-6)


def test_evaluate_tokens_of_a_file(trained, tmp_path):
  """A .npy of tokens gives the number that the images it was made of give."""
  from igpt_jax.data.palette import Palette
  from igpt_jax.data.sources import open_split

  config = shrunk()
  data_config = config.data
  palette = Palette.load(trained / "palette.npy")
  tokens = streams.tokens_of(
    open_split(data_config, "test"), data_config, TokenSpec(n_vocab=17, palette=palette)
  )
  np.save(tmp_path / "test.npy", tokens.astype(np.int64))
  config = shrunk(**{
    "data.name": "tokens", "data.path": str(tmp_path / "test.npy"), "checkpoint": str(trained)
  })  # fmt: skip
  on_one_device(evaluate, config, str(tmp_path / "evaluation"))
  of_file = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
  on_one_device(evaluate, shrunk(), str(trained))
  of_pictures = json.loads((trained / "evaluation.json").read_text())
  assert of_file["nats_per_token"] == pytest.approx(of_pictures["nats_per_token"], abs=1e-6)
  assert of_file["baselines_counted_on"] == "the evaluated tokens themselves"


def test_sample(trained):
  sample.run(shrunk(), str(trained))
  scale, gap = 16, 4
  side = 8 * scale + gap
  samples = Image.open(trained / "samples.png")
  assert samples.width == 3 * side + gap and 0 < samples.height - (2 * side + gap) < 30
  assert Image.open(trained / "completions.gif").n_frames > 10
  completions = np.asarray(Image.open(trained / "completions.png"))
  # Below a title and heads; a row: what is given, two completions, the original.
  assert completions.shape[1:] == (4 * side + gap, 3)
  completions = completions[-(2 * side + gap) :]

  def cell(r, c):
    return completions[
      gap + r * side : r * side + side : scale, gap + c * side : c * side + side : scale
    ]

  for row in range(2):
    for column in (0, 1, 2):
      np.testing.assert_array_equal(cell(row, column)[:4], cell(row, 3)[:4])
    assert (cell(row, 0)[4:] == 200).all()
  values = json.loads((trained / "sample.json").read_text())
  assert len(values["each_completion_nats_per_token"]) == 4
  first = (trained / "samples.png").read_bytes()
  sample.run(shrunk(), str(trained))
  assert (trained / "samples.png").read_bytes() == first  # same seed, same images
  sample.run(shrunk(seed=1), str(trained))
  assert (trained / "samples.png").read_bytes() != first


def test_masked_objective_trains_evaluates_and_refuses_to_sample(tmp_path):
  config = shrunk(objective="masked", **{"evaluate.masks": 2})
  on_one_device(pretrain, config, str(tmp_path))
  on_one_device(evaluate, config, str(tmp_path))
  values = json.loads((tmp_path / "evaluation.json").read_text())
  assert values["masks_per_picture"] == 2 and values["nats_per_token"] < np.log(17)
  assert values["masks_counted"] == 600
  with pytest.raises(Exception, match="BERT"):
    sample.run(config, str(tmp_path))


def test_masks_that_hide_nothing(tmp_path):
  """Training goes on without a validation loss, and evaluation says that there's no likelihood."""
  # The command would refuse it.
  config = dataclasses.replace(
    shrunk(objective="masked", **{"evaluate.images": 5}), mask_probability=1e-6
  )
  on_one_device(pretrain, config, str(tmp_path))
  records = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  losses = [record["loss"] for record in records if "loss" in record]
  assert losses and not any(losses)
  assert not any("validation_loss" in record for record in records)
  assert "validation" not in (tmp_path / "summary.md").read_text()
  with pytest.raises(UserError, match=r"evaluate\.masks: 1 of each of 5 images.*probability 1e-06"):
    on_one_device(evaluate, config, str(tmp_path))
  assert not (tmp_path / "evaluation.json").exists()


def test_the_projects_own_palette_by_name(tmp_path):
  from igpt_jax.data.palette import Palette
  from igpt_jax.data.sources import open_split

  def palette_of(config):
    split = open_split(config.data, "train")
    return training_palette.training_palette(config, config.data, split, str(tmp_path))

  named = {"palette.path": "default"}
  assert palette_of(shrunk(**named, **{"palette.size": 0})) == Palette.default()
  with pytest.raises(UserError, match="default has 512 colours"):
    palette_of(shrunk(**named))


def test_a_palette_of_one_colour_is_refused(tmp_path):
  np.save(tmp_path / "grey.npy", np.zeros((17, 3), np.float32))
  config = shrunk(**{"palette.path": str(tmp_path / "grey.npy"), "palette.size": 17})
  with pytest.raises(UserError, match=r"all 17 colours of .*grey\.npy are one"):
    on_one_device(pretrain, config, str(tmp_path / "run"))
  assert os.listdir(tmp_path / "run") == [".lock"]


def test_fit_palette_job(tmp_path):
  fit_palette_job.run(shrunk(**{"palette.size": 5}), str(tmp_path))
  values = json.loads((tmp_path / "palette.json").read_text())
  assert values["colors"] == 5 and 0 < values["mse_per_channel"] < 400
  assert Image.open(tmp_path / "palette.png").size == (5 * 16, 16)


def make_folder(root, n=24, size=(20, 16)):
  rng = np.random.default_rng(0)
  for split, count in (("train", n), ("test", 8)):
    for label, colour in (("warm", (220, 120, 30)), ("cold", (30, 90, 210))):
      folder = root / split / label
      folder.mkdir(parents=True)
      for i in range(count):
        noise = rng.integers(-30, 30, (*size, 3))
        Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
          folder / f"{i}.png"
        )


def test_a_folder_of_pictures_of_every_kind(tmp_path):
  """Grey, RGBA, CMYK and 16-bit images are converted; colours come out as colours."""
  root = tmp_path / "pictures"
  make_folder(root)
  noise = np.random.default_rng(1).integers(0, 255, (20, 16, 4), np.uint8)
  warm = root / "train" / "warm"
  Image.fromarray(noise[..., 0]).save(warm / "grey.jpg")
  Image.fromarray(noise).save(warm / "rgba.png")
  Image.fromarray(noise, mode="CMYK").save(warm / "cmyk.jpg")
  Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(warm / "deep.png")
  overrides = {"data.name": "folder", "data.path": str(root), "palette.size": 12}
  config = shrunk(**overrides)
  on_one_device(pretrain, config, str(tmp_path / "run"))
  on_one_device(probe, config, str(tmp_path / "run"))
  sample.run(config, str(tmp_path / "run"))
  grid = np.asarray(Image.open(tmp_path / "run" / "completions.png")).astype(int)
  assert (np.abs(grid[..., 0] - grid[..., 2]) > 60).mean() > 0.1  # not grey
  assert json.loads((tmp_path / "run" / "probe.json").read_text())["pixels_test_accuracy"] == 1


def test_an_older_run_on_a_folder_goes_on_until_its_images_are_exchanged(
  tmp_path, monkeypatch, caplog
):
  """An older version knew a folder by its files' names; from the next checkpoint on contents count."""
  from igpt_jax.data import pipeline
  from igpt_jax.errors import UserError

  root, workdir = tmp_path / "images", str(tmp_path / "run")
  make_folder(root, size=(8, 8))
  for path in root.rglob("*.png"):
    Image.open(path).save(path.with_suffix(".bmp"))  # of one size
    path.unlink()

  def run(steps):
    settings = {"data.name": "folder", "data.path": str(root), "train.eval_every": 0}
    config = shrunk(**settings, **{"train.steps": 8, "train.checkpoint_every": 2})
    monkeypatch.setattr(
      loop.StopSignal, "asked", lambda self, at_step: "SIGTERM" if at_step >= steps else None
    )
    on_one_device(pretrain, config, workdir)

  def exchange(split):
    first, second = root / split / "warm" / "0.bmp", root / split / "cold" / "1.bmp"
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)

  with monkeypatch.context() as older:
    newer = pipeline.position

    def position(split, **where):
      kept = newer(split, **where) | {"fingerprint": split.former_fingerprint}
      del kept["former_fingerprint"]
      return kept

    older.setattr(pipeline, "position", position)
    run(2)
  run(4)
  assert sum("by names alone" in record.getMessage() for record in caplog.records) == 1
  run(6)
  assert sum("by names alone" in record.getMessage() for record in caplog.records) == 1
  exchange("test")
  run(7)
  exchange("train")
  with pytest.raises(UserError, match=r"data set: folder train\[43 of 48\] .*; expected folder tr"):
    run(8)
  exchange("train")
  run(8)


@pytest.mark.slow
def test_cifar_pictures_train_with_falling_loss(tmp_path):
  """Real CIFAR-10 images through the folder door, a few steps of the small config."""
  import tarfile

  shared = pathlib.Path(os.environ.get("IGPT_SHARED", ROOT.parent / "shared"))
  archive = shared / "data" / "cifar10-jpeg.tar.xz"
  if not archive.exists():
    pytest.skip(f"{archive} is not there: no real CIFAR-10 images to train on")
  root = tmp_path / "cifar"
  wanted: dict[str, int] = {}
  with tarfile.open(archive) as tar:
    for member in tar:
      parts = pathlib.PurePath(member.name).parts
      if not member.isfile() or len(parts) < 3:
        continue
      split, label = parts[-3:-1]
      if wanted.get(split + label, 0) >= (60 if split == "train" else 10):
        continue
      wanted[split + label] = wanted.get(split + label, 0) + 1
      target = root / split / label
      target.mkdir(parents=True, exist_ok=True)
      (target / parts[-1]).write_bytes(tar.extractfile(member).read())
  config = load_config("cifar10_small")
  config.data.name, config.data.path = "folder", str(root)
  config.model.n_layer, config.model.n_embd = 2, 64
  config.palette.size = 64
  config.train.steps, config.train.warmup_steps, config.train.log_every = 60, 10, 1
  config.train.eval_images = 32
  config.sample.samples, config.sample.completions, config.sample.per_image = 4, 2, 2
  config = settings_of(config)
  on_one_device(pretrain, config, str(tmp_path / "run"))
  losses = [
    r["loss"] for r in metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in r
  ]
  assert losses[0] == pytest.approx(np.log(64), rel=1e-3)  # a zero output table knows nothing
  assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
  sample.run(config, str(tmp_path / "run"))
  grid = np.asarray(Image.open(tmp_path / "run" / "completions.png")).astype(int)
  assert (np.ptp(grid, axis=-1) > 20).mean() > 0.05


def test_tensorboard_and_wandb_are_extras(tmp_path, monkeypatch):

  for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"fix: pip install -e '?.*\[{name}\]"):
      on_one_device(pretrain, shrunk(**{f"log.{name}": True}), str(tmp_path / name))


# --- mistakes --------------------------------------------------------------------------------------

MISTAKES = {
  "misspelt field": (["--config.train.batchsize=3"], "batch"),
  "unknown job": (["--config.job=train"], "pretrain"),
  "wrong type": (["--config.train.steps=many"], "steps"),
  "width and heads": (["--config.model.n_embd=50", "--config.model.n_head=4"], "divisible"),
  "unknown data set": (["--config.data.name=cifar11"], "cifar11"),
  "empty folder": (["--config.data.name=folder", "--config.data.path={empty}"], "train"),
  "palette size": (["--config.palette.path={palette}", "--config.palette.size=17"], "3 colours"),
  "palette shape": (["--config.palette.path={flat}"], r"\[k, 3\]"),
  "palette NaN": (["--config.palette.path={nan}"], "NaN"),
  "palette pickled": (["--config.palette.path={pickled}"], "npy"),
  "mesh": (["--config.mesh.data=3"], "mesh"),
  "no checkpoint": (["--config.job=evaluate"], "no checkpoint"),
  "bucket": (["--workdir=gs://b/run"], "--workdir: gs://b/run: .*expected gs://BUCKET/PATH"),
  "checkpoint in a bucket": (
    ["--config.job=evaluate", "--config.checkpoint=gs://b/run"],
    "config.checkpoint: gs://b/run: ",
  ),
  "objective": (["--config.objective=bert"], "masked"),
  "top_p": (["--config.sample.top_p=0.0"], "top_p"),
  "keep": (["--config.sample.keep=1.0"], "keep"),
  "learning rate": (["--config.train.learning_rate=-1.0"], "learning_rate"),
  "remat": (["--config.model.remat=some"], "none, names, offload, full"),
  "mesh and heads": (["--config.mesh.tensor=4", "--config.model.n_head=2"], "one of 1, 2$"),
  "mesh and width": (
    ["--config.mesh.fsdp=4", "--config.model.n_head=3", "--config.model.n_embd=18"],
    "mesh.fsdp: 4 .* width 18",
  ),
  "batch and mesh": (["--config.train.batch_size=6"], "train.batch_size: 6 .* nearest: 4 or 8"),
  "batch and parts": (
    ["--config.train.batch_size=8", "--config.train.accumulate=3"],
    "4 of the mesh × train.accumulate 3; nearest: 12",
  ),
  "topology": (
    ["--config.job=compile", "--config.compile.topology=v5x:4x4"],
    "did you mean v5[ep]:4x4",
  ),
  "slice": (["--config.job=compile", "--config.compile.topology=v5p:4x4"], "nearest: v5p:2x2x2"),
  "topology of training": (
    ["--config.compile.topology=v5e:4x4"],
    "is for job compile; .*'pretrain'",
  ),
  "no topology": (["--config.job=compile"], "config.compile.topology: missing"),
  "config file": (["--config=configs/quickstrat.py"], "quickstrat"),
  "stray argument": (["quickstart"], "quickstart"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bad")
  (folder / "empty" / "train").mkdir(parents=True)
  np.save(folder / "palette.npy", np.zeros((3, 3), np.float32))
  np.save(folder / "flat.npy", np.zeros(9, np.float32))
  np.save(folder / "nan.npy", np.full((17, 3), np.nan, np.float32))
  np.save(folder / "pickled.npy", np.array([{"a": 1}], object), allow_pickle=True)
  return {
    name: str(folder / f"{name}{suffix}")
    for name, suffix in (
      ("empty", ""), ("palette", ".npy"), ("flat", ".npy"), ("nan", ".npy"), ("pickled", ".npy"),
    )
  }  # fmt: skip


@pytest.fixture(scope="module")
def answers(bad_files, tmp_path_factory):
  """What the command says to each mistake: its status, stdout, stderr, and the workdir."""
  root = tmp_path_factory.mktemp("mistakes")
  lives, found = Lives(JAX_NUM_CPU_DEVICES="4"), {}
  for name, (overrides, _) in MISTAKES.items():
    workdir = root / name.replace(" ", "_")
    said = [workdir.with_suffix(suffix) for suffix in (".out", ".err")]
    overrides = [each.format(**bad_files) for each in overrides]
    args = ["--config=configs/quickstart.py", f"--workdir={workdir}", *overrides]
    status = lives.status(lives.begin(args, *said), 120)
    found[name] = (status, *(file.read_text() for file in said), workdir)
  lives.close()
  return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_message(name, answers):
  status, out, err, workdir = answers[name]
  assert status == 2, out + err
  assert "Traceback" not in out + err
  assert err.count("\n") == 1, err
  assert re.search(MISTAKES[name][1], err), err
  assert "compil" not in out
  assert not (workdir / "checkpoints").exists()


def test_a_workdir_of_another_config_is_refused_by_field(trained):

  with pytest.raises(UserError, match=r"model\.n_embd: 16 there, 32 here"):
    on_one_device(pretrain, shrunk(**{"model.n_embd": 32}), str(trained))
  with pytest.raises(UserError, match=r"train\.batch_size"):
    on_one_device(pretrain, shrunk(**{"train.batch_size": 8}), str(trained))
  # What doesn't change the training may change.
  on_one_device(pretrain, shrunk(**{"train.log_every": 5, "sample.samples": 9}), str(trained))


def test_another_resolution_than_the_checkpoints_is_refused(trained):

  for job in (evaluate, probe, sample):
    with pytest.raises(UserError, match=r"trained at 8, .*; fix: --config.data.resolution=8"):
      job.run(shrunk(**{"data.resolution": 16}), str(trained))


def test_a_damaged_checkpoint_is_one_line_and_nothing_else(trained, tmp_path):
  """Also from orbax' threads, which still read what is whole."""
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  for path in (workdir / "checkpoints" / "12" / "params").rglob("d/*"):
    os.truncate(path, path.stat().st_size // 2)
  done = call("configs/quickstart.py", workdir, "--config.job=evaluate")
  assert done.returncode == 2
  assert done.stderr.startswith(f"igpt_jax: checkpoint: {workdir}/checkpoints/12 can't be read")
  assert done.stderr.count("\n") == 1, done.stderr


def test_damaged_pictures_are_counted_and_named(tmp_path):

  root = tmp_path / "pictures"
  make_folder(root)
  victim = root / "train" / "warm" / "0.png"
  victim.write_bytes(victim.read_bytes()[:100])
  config = shrunk(**{"data.name": "folder", "data.path": str(root), "palette.size": 12})
  with pytest.raises(UserError, match=r"warm/0\.png"):
    on_one_device(pretrain, changed(config, {"data.max_bad": 0.0}), str(tmp_path / "strict"))
  on_one_device(pretrain, config, str(tmp_path / "tolerant"))


def test_an_unwritable_workdir_is_said_at_once(tmp_path):

  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="can't be written to"):
    on_one_device(pretrain, shrunk(), str(tmp_path / "file" / "run"))


def test_prepare_job(capsys):
  """Our own data is made; what needs TensorFlow says so; what needs nothing says that."""
  from igpt_jax.jobs import prepare

  prepare.run(shrunk(), "unused")
  told = capsys.readouterr().out
  assert (
    os.environ["TFDS_DATA_DIR"] in told
    and "train[1347 of 1497]" in told
    and "test[300 of 300]" in told
  )
  with pytest.raises(UserError, match="needs no preparation"):
    prepare.run(shrunk(**{"data.name": "tokens", "data.path": "x"}), "unused")
