"""The notebook, executed whole on a tiny model; and what it is made of."""

import ast
import json
import os
import pathlib
import signal
import sys
import threading
import types

import pytest

from igpt_jax import notebook
from igpt_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "launch" / "colab.ipynb"

TINY = [
  f"--config.{setting}"
  for setting in (
    "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "train.batch_size=16", "train.steps=12",
    "train.warmup_steps=2", "train.log_every=2", "train.eval_every=6", "train.checkpoint_every=6",
    "train.eval_images=32", "sample.samples=2", "sample.completions=2", "sample.per_image=2",
    "features.images=60", "features.baselines=('pixels',)", "probe.max_iterations=20",
    "evaluate.images=32", "evaluate.baseline_images=100",
  )
]  # fmt: skip


def cells(kind: str) -> list[dict]:
  return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def tags(cell: dict) -> list[str]:
  return cell["metadata"].get("tags", [])


@pytest.fixture
def shown(monkeypatch, tmp_path):
  """What a notebook would show, in order: IPython isn't there, and needn't be."""
  seen: list[str] = []

  class Handle:
    update = seen.append

  def display(part, display_id):
    assert display_id
    seen.append(part)
    return Handle

  fake = types.SimpleNamespace(HTML=str, display=display)
  monkeypatch.setattr(notebook, "_display", lambda: fake)
  # Of the jobs that it starts.
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  return seen


@pytest.mark.slow
def test_every_cell_runs(shown, tmp_path, monkeypatch, capsys):
  """From a folder of its own, as in a session: the package and configs/ are found from there."""
  for name in ("configs", "igpt_jax"):
    (tmp_path / name).symlink_to(ROOT / name)
  monkeypatch.chdir(tmp_path)
  names: dict = {}
  for cell in cells("code"):
    if "install" in tags(cell):
      continue
    exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    if "settings" in tags(cell):
      names |= {"OVERRIDES": TINY, "SAMPLES": 2, "WORKDIR": "runs/tiny"}
  run = tmp_path / "runs" / "tiny"
  assert json.loads((run / "training.json").read_text())["step"] == 12
  # Live: the curve, and completions of checkpoints as they came.
  training = [part for part in shown if "completions at step" in part]
  assert training and training[-1].count("<img") == 2 and "completions at step 12" in training[-1]
  assert (run / "sample" / "6" / "completions.png").exists()
  assert "nats/token" in (run / "summary.md").read_text()
  assert (run / "probe.png").exists()
  mine = tmp_path / "runs" / "tiny_mine"
  assert {path.parent.name for path in mine.glob("*/appearing.gif")} == {"digit", "photograph"}
  assert any("image/gif" in part for part in shown)
  assert any("summary" in part or "Likelihood" in part for part in shown)
  assert "DOWNLOAD is False" in capsys.readouterr().out


def test_it_copies_no_logic():
  """Cells import the package and call it; they define nothing."""
  for cell in cells("code"):
    tree = ast.parse("".join(cell["source"]))
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While)
    assert not [node for node in ast.walk(tree) if isinstance(node, kinds)], cell["source"]
    imported = {
      alias.name.split(".")[0]
      for node in ast.walk(tree)
      if isinstance(node, ast.Import)
      for alias in node.names
    }
    assert not imported & {"jax", "flax", "numpy"}
    assert cell["outputs"] == [] and cell["execution_count"] is None
  assert [tags(cell) for cell in cells("code")][:2] == [["install"], ["settings"]]


def test_a_job_that_fails_says_why(shown, tmp_path):
  run = notebook.Run(
    str(ROOT / "configs" / "quickstart.py"), str(tmp_path / "run"), ["--config.train.steps=0"]
  )
  with pytest.raises(UserError, match=r"status 2; expected 0:\n.*train\.steps: 0"):
    run.train(seconds=0.1)
  with pytest.raises(UserError, match=r"train\.steps: 0"):
    run.job("evaluate")
  with pytest.raises(UserError, match="no such file"):
    run.show("probe.png")


@pytest.mark.slow
def test_a_cell_that_is_stopped_saves_and_goes_on(shown, tmp_path, capsys):
  run = notebook.Run(
    str(ROOT / "configs" / "quickstart.py"),
    str(tmp_path / "run"),
    [*TINY, "--config.train.steps=100000", "--config.train.eval_every=0"],
  )

  ended = threading.Event()

  def interrupt():
    while not ended.wait(0.1):
      if (tmp_path / "run" / "checkpoints" / "6").exists():
        os.kill(os.getpid(), signal.SIGINT)
        return

  thread = threading.Thread(target=interrupt)
  thread.start()
  try:
    run.train(seconds=0.2)
  finally:
    ended.set()
    thread.join()
  assert "goes on from the last checkpoint" in capsys.readouterr().out
  assert "stopped by SIGTERM" in shown[-1]


def test_pictures_are_those_in_the_folder_or_examples(tmp_path, monkeypatch):
  folder = tmp_path / "my"
  assert notebook.own_images_folder(str(folder)) == str(folder)
  assert sorted(os.listdir(folder)) == ["digit.png", "photograph.jpg"]
  (folder / "digit.png").unlink()
  notebook.own_images_folder(str(folder))
  assert os.listdir(folder) == ["photograph.jpg"]

  files = types.SimpleNamespace(upload=lambda: {"../../mine.jpg": b"bytes"})
  colab = types.SimpleNamespace(files=files)
  monkeypatch.setitem(sys.modules, "google.colab", colab)
  monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace(colab=colab))
  notebook.own_images_folder(str(tmp_path / "uploaded"))
  assert os.listdir(tmp_path / "uploaded") == ["mine.jpg"]


def test_without_ipython_it_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, "IPython", None)
  with pytest.raises(UserError, match="needs IPython"):
    notebook._display()
