"""The command as several hosts run it: two real processes of four devices each, on loopback.

This process, with the same eight devices, is what they are compared with.
"""

import contextlib
import json
import runpy
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.config.read import settings_of
from igpt_jax.jobs import complete, evaluate, finetune, pretrain, probe, quality, sample
from igpt_jax.reporting import metrics
from igpt_jax.runner import loop
from support import own_checkpoint, tiny
from support.hosts import HOSTS, ROOT, SMALL, hosts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

CLOSE = 1e-5  # relative; float32, added up in another order

# One copy of the model over both hosts, which so hold the same images.
ACROSS = {"model.n_head": 8, "mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 8}


def config_of(overrides):
  config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
  config.update_from_flattened_dict({**SMALL, **overrides})
  return settings_of(config)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
  """On one host a file is missing. Begun early: what the other host waits for is time."""
  folder = tmp_path_factory.mktemp("mistaken")
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(
        hosts(
          folder / str(host),
          folder / f"run{host}",
          {},
          per_host={host: {"palette.path": "missing.npy"}},
        )
      )
      for host in range(HOSTS)
    ]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, mistaken):
  """A run of two processes, and what they said."""
  folder = tmp_path_factory.mktemp("two")
  workdir = folder / "run"
  with hosts(folder / "said", workdir, {}) as started:
    started.succeed()
    return workdir, [started.said(host) for host in range(HOSTS)]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
  """The same in this process."""
  workdir = tmp_path_factory.mktemp("one")
  pretrain.run(config_of({}), str(workdir))
  return workdir


def told(workdir, after=0):
  """Step, loss and validation loss of every record."""
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  return [
    (r["step"], r.get("loss", -1.0), r.get("validation_loss", -1.0))
    for r in records
    if r["step"] > after
  ]


def assert_same_run(found, expected):
  np.testing.assert_allclose(told(found), told(expected), rtol=CLOSE)


def params_of(workdir, step):
  path = f"{workdir}/checkpoints/{step}"
  return checkpoint.load_pretrained(path, tiny.mesh_of()).params


def test_two_processes_train_as_one(of_two, of_one):
  workdir, _ = of_two
  assert [each[0] for each in told(workdir)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
  assert_same_run(workdir, of_one)
  for step in (4, 8):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
      params_of(workdir, step),
      params_of(of_one, step),
    )
  ours, theirs = [json.loads((each / "training.json").read_text()) for each in (workdir, of_one)]
  assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=CLOSE)


def test_two_slices_of_a_process_each_train_as_one(of_one, tmp_path):
  """Whichever host reads a row; the batch in two parts, whose gradients are exchanged once."""
  settings = {"mesh.slices": 2, "train.accumulate": 2}
  program = (str(ROOT / "tests" / "support" / "host_slices.py"),)
  with hosts(tmp_path / "said", tmp_path / "run", settings, program=program) as started:
    started.succeed()
    assert "slice 2 × data 2 × fsdp 2 × tensor 1" in started.said(0)
  assert_same_run(tmp_path / "run", of_one)


def test_two_processes_draw_progress_as_one(of_two, of_one):
  for step in (4, 8):
    found, expected = (
      np.asarray(Image.open(folder / "progress" / f"{step}.png")) for folder in (of_two[0], of_one)
    )
    np.testing.assert_array_equal(found, expected)


def test_only_the_first_process_speaks(of_two):
  _, (first, second) = of_two
  # gloo's threads write to the same place, and break each other's lines.
  words = ("step ", "palette: ", "autoregressive: ", "compiled in ", "done: ")
  lines = [line for line in first.splitlines() if line.startswith(words)]
  assert {line.split()[0] for line in lines} == {word.split()[0] for word in words}
  assert {line.split()[1] for line in lines if line.startswith("step")} == {
    f"{step}/8" for step in range(1, 9)
  }
  for line in lines:
    assert line not in second


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_one_process_goes_on_from_what_two_wrote(of_two, tmp_path, shape):
  """On any mesh, to the same losses and parameters."""
  workdir, resumed = of_two[0], tmp_path / "run"
  shutil.copytree(workdir, resumed)
  shutil.rmtree(resumed / "checkpoints" / "8")
  pretrain.run(config_of({}), str(resumed), mesh=tiny.mesh_of(shape))
  assert_same_run(resumed, workdir)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    params_of(resumed, 8),
    params_of(workdir, 8),
  )


def run_job(name, workdir, tmp_path, overrides=None):
  with hosts(tmp_path / "said", workdir, {"job": name, **(overrides or {})}) as started:
    started.succeed()


def test_two_processes_evaluate_as_one(of_two, tmp_path):
  workdir, _ = of_two
  run_job("evaluate", workdir, tmp_path)
  found = json.loads((workdir / "evaluation.json").read_text())
  evaluate.run(config_of({}), str(workdir))
  expected = json.loads((workdir / "evaluation.json").read_text())
  assert found.pop("images") == expected.pop("images") == 300  # all of test, once
  numbers = [name for name, value in expected.items() if isinstance(value, float)]
  assert "nats_per_token" in numbers and "position_unigram" in numbers
  for name in numbers:
    assert found.pop(name) == pytest.approx(expected.pop(name), rel=CLOSE), name
  assert found == expected


def test_two_processes_watch_as_one(of_two, tmp_path):
  """They agree on what is done, and on what is to be done again."""
  workdir = shutil.copytree(of_two[0], tmp_path / "run")
  for images in (50, 40):
    watching = {"watch": True, "watch_seconds": 0.01, "evaluate.images": images}
    run_job("evaluate", workdir, tmp_path, watching)
    for step in (4, 8):
      values = json.loads((workdir / "evaluate" / str(step) / "evaluation.json").read_text())
      assert values["images"] == images and values["step"] == step


def test_two_processes_sample_as_one(of_two, tmp_path):
  workdir, _ = of_two
  run_job("sample", workdir, tmp_path)
  names = ("samples.png", "completions.png")
  found = [np.asarray(Image.open(workdir / name)) for name in names]
  sample.run(config_of({}), str(workdir))
  for name, picture in zip(names, found, strict=True):
    np.testing.assert_array_equal(picture, np.asarray(Image.open(workdir / name)), err_msg=name)


def run_both(job, of_two, tmp_path, settings):
  """The folders in which two processes, and this one, have done a job on the run of two."""
  name = job.__name__.rpartition(".")[2]
  settings = {"checkpoint": str(of_two[0]), **settings}
  run_job(name, tmp_path / "two", tmp_path, settings)
  job.run(config_of({"job": name, **settings}), str(tmp_path / "one"))
  return tmp_path / "two", tmp_path / "one"


def assert_same_numbers(found, expected, rel=CLOSE):
  """All that two JSONs say, but for the last digits of what is no whole number."""

  def same(ours, theirs):
    assert ours == (pytest.approx(theirs, rel=rel) if isinstance(theirs, float) else theirs)

  jax.tree.map(same, found, expected)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_two_processes_complete_as_one(of_two, tmp_path, objective):
  rng = np.random.default_rng(0)
  (tmp_path / "images").mkdir()
  for i in range(3):
    image = Image.fromarray(rng.integers(256, size=(20, 16, 3), dtype=np.uint8))
    image.save(tmp_path / "images" / f"{i}.png")
  settings = {"complete.images": str(tmp_path / "images"), "complete.n": 3, "sample.batch_size": 4}
  if objective == "bert":
    settings["checkpoint"] = own_checkpoint.write(tmp_path / "bert", causal=False)
    settings |= {"complete.hide": "left", "complete.passes": 3}
  two, one = run_both(complete, of_two, tmp_path, settings)
  found, expected = (json.loads((each / "complete.json").read_text()) for each in (two, one))
  assert found.pop("settings") == expected.pop("settings")
  assert_same_numbers(found, expected)
  names = [path.relative_to(one) for path in one.rglob("*.png")]
  assert len(names) == 3 * 3 + 1
  for name in names:
    np.testing.assert_array_equal(Image.open(two / name), Image.open(one / name), str(name))


def test_two_processes_tell_quality_as_one(of_two, tmp_path):
  settings = {"quality.images": 20, "sample.batch_size": 8}
  two, one = run_both(quality, of_two, tmp_path, settings)
  found, expected = (json.loads((each / "quality.json").read_text()) for each in (two, one))
  assert expected["pictures"] == 20 and expected["samples_distance"] > 0
  assert_same_numbers(found, expected, rel=1e-3)


def rows_of(workdir) -> dict:
  return {row["name"]: row for row in json.loads((workdir / "probe.json").read_text())["rows"]}


def test_two_processes_probe_as_one(of_two, tmp_path):
  """Every checkpoint, one copy of the model being on both hosts."""
  settings = {"watch": True, "mesh.data": 1, "mesh.fsdp": 8}
  two, one = run_both(probe, of_two, tmp_path, settings)
  for step in ("4", "8"):
    found, expected = (rows_of(each / "probe" / step) for each in (two, one))
    # Raw pixels are the same numbers in the same order; features differ in the last digit.
    assert found["raw pixels"] == expected["raw pixels"]
    for layer in ("layer 0", "layer 1", "layer 2"):
      ours, theirs = found[layer], expected[layer]
      assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.02)


@pytest.mark.parametrize("cached", [True, False])
def test_two_processes_probe_by_sgd_as_one(of_two, tmp_path, cached):
  sgd = {"probe.method": "sgd", "probe.steps": 6, "probe.eval_every": 3, "probe.batch_size": 16}
  two, one = run_both(probe, of_two, tmp_path, {**sgd, "probe.cached": cached})
  found, expected = rows_of(two), rows_of(one)
  assert found.keys() == expected.keys()
  for name, row in found.items():
    assert row["test_accuracy"] == pytest.approx(expected[name]["test_accuracy"], abs=0.01)


FINETUNE = {
  "finetune.batch_size": 16, "finetune.steps": 6, "finetune.eval_every": 3,
  "finetune.learning_rate": 1e-2, "evaluate.images": 50,
}  # fmt: skip


def test_two_processes_fine_tune_as_one(of_two, tmp_path):
  found, expected = (
    json.loads((each / "finetune" / "finetune.json").read_text())
    for each in run_both(finetune, of_two, tmp_path, FINETUNE)
  )
  assert found["best_step"] == expected["best_step"]
  for name in ("test_nats_per_token", "test_classification_loss", "start_nats_per_token"):
    assert found[name] == pytest.approx(expected[name], rel=CLOSE), name
  assert found["test_accuracy"] == expected["test_accuracy"]


def test_a_signal_stops_both_at_one_step_and_the_run_goes_on(tmp_path, monkeypatch):
  """Signalled one after the other, the second by Ctrl-C, and with one copy of the model over both."""
  workdir = tmp_path / "run"
  endless = {
    **ACROSS,
    "train.steps": 100_000,
    "train.eval_every": 0,
    "train.checkpoint_every": 50_000,
  }
  with hosts(tmp_path / "said", workdir, endless) as started:
    started.wait_for("step      2/100000")
    started.processes[1].send_signal(signal.SIGINT)
    time.sleep(0.3)
    started.processes[0].send_signal(signal.SIGTERM)
    started.succeed()
    assert "stopped by SIGTERM at step" in started.said(0)
    stopped_at = int(started.said(0).split("SIGTERM at step ")[1].split(":")[0])
  assert checkpoint.find(str(workdir))[1] == stopped_at
  assert told(workdir)[-1][0] == stopped_at

  last = stopped_at + 3
  monkeypatch.setattr(
    loop.StopSignal, "asked", lambda self, at_step: "SIGTERM" if at_step >= last else None
  )
  pretrain.run(config_of(endless), str(workdir), mesh=tiny.mesh_of((8, 1, 1)))
  pretrain.run(config_of(endless), str(tmp_path / "uninterrupted"), mesh=tiny.mesh_of((8, 1, 1)))
  assert [each[0] for each in told(workdir)] == list(range(1, last + 1))
  assert_same_run(workdir, tmp_path / "uninterrupted")


def test_a_signal_to_both_before_they_train_ends_them_at_once(tmp_path):
  """jax has taken SIGTERM by then, and gets it back only when there is something to save."""
  with hosts(tmp_path / "said", tmp_path / "run", {}) as started:
    started.wait_for("palette")
    for process in started.processes:
      process.send_signal(signal.SIGTERM)
    assert started.statuses() == [143] * HOSTS, started.everything()
    for host in range(HOSTS):
      assert "stopped by SIGTERM: there is nothing to save" in started.said(host, "err")


@pytest.mark.parametrize("host", range(HOSTS))
def test_a_mistake_on_one_host_ends_both(mistaken, host):
  statuses = mistaken[host].statuses()
  assert statuses[host] == 2, mistaken[host].everything()
  assert statuses[1 - host] != 0
  said = mistaken[host].said(host, "err")
  assert "missing.npy: No such file or directory; expected" in said and "Traceback" not in said


def test_hosts_whose_data_differs_are_told_before_they_evaluate(of_two, tmp_path):
  """Each has the images in a place of its own; in one of these two files are exchanged."""
  rng = np.random.default_rng(0)
  for i in range(6):
    for split in ("train", "test"):
      folder = tmp_path / "0" / split
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.bmp")
  shutil.copytree(tmp_path / "0", tmp_path / "1")
  shutil.copy(tmp_path / "0/test/3.bmp", tmp_path / "1/test/4.bmp")
  shutil.copy(tmp_path / "0/test/4.bmp", tmp_path / "1/test/3.bmp")
  settings = {
    "job": "evaluate", "checkpoint": str(of_two[0]), "data.name": "folder",
    "evaluate.batch_size": 8,
  }  # fmt: skip
  places = {host: {"data.path": str(tmp_path / str(host))} for host in range(HOSTS)}
  with hosts(tmp_path / "said", tmp_path / "run", settings, places) as started:
    assert started.statuses() == [2] * HOSTS, started.everything()
    for host in range(HOSTS):
      assert "they would read different data: data: host 0 has " in started.said(host, "err")
  assert not (tmp_path / "run" / "evaluation.json").exists()
