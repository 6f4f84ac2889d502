"""The notebook, executed whole on a tiny model; and what it is made of."""

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import types

import pytest

from igpt_jax import notebook
from igpt_jax.errors import UserError
from support.paths import ROOT

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
def test_every_cell_runs_and_again_goes_on(shown, tmp_path, monkeypatch, capsys):
  """Beside a folder with the checkout, as in a fresh runtime; the second time as after a disconnect."""
  checkout = tmp_path / "igpt_jax-main"
  checkout.mkdir()
  for name in ("configs", "igpt_jax", "launch"):
    (checkout / name).symlink_to(ROOT / name)
  installed, really_run = [], subprocess.run

  def run_or_note(command, **settings):
    if command[-1] != "launch/colab.py":
      return really_run(command, **settings)
    installed.append(command)

  monkeypatch.setattr("subprocess.run", run_or_note)

  def run_cells(last: str = "") -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells("code"):
      exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
      if "settings" in tags(cell):
        assert names["OVERRIDES"] == []
        names |= {"OVERRIDES": TINY, "SAMPLES": 2, "NAME": "runs/tiny"}
      if cell["source"] == [last]:
        return

  run_cells()
  assert installed == [[sys.executable, "launch/colab.py"]]
  tmp_path = checkout
  run = tmp_path / "runs" / "tiny"
  assert json.loads((run / "training.json").read_text())["step"] == 12
  # Live: the curve, and completions of checkpoints as they came.
  training = [part for part in shown if "completions at step" in part]
  assert training and training[-1].count("<img") == 2 and "completions at step 12" in training[-1]
  assert (run / "sample" / "6" / "completions.png").exists()
  assert "nats/token" in (run / "summary.md").read_text()
  assert (run / "probe.png").exists()
  mine = tmp_path / "runs" / "tiny_mine_12"
  assert {path.parent.name for path in mine.glob("*/appearing.gif")} == {"digit", "photograph"}
  assert any("image/gif" in part for part in shown)
  assert any("summary" in part or "Likelihood" in part for part in shown)
  assert "DOWNLOAD is False" in capsys.readouterr().out
  before = (run / "metrics.jsonl").read_text()
  tmp_path = checkout.parent
  run_cells(last="run.train()")
  assert (run / "metrics.jsonl").read_text() == before, "what is trained isn't trained again"


@pytest.mark.parametrize("there", ["zip", "git URL", "answer"])
def test_where_the_project_comes_from(tmp_path, monkeypatch, there):
  """A .zip beside the notebook is unpacked; else SOURCE, or what a person answers, is cloned."""
  content = tmp_path / "content"
  content.mkdir()
  monkeypatch.chdir(content)
  made = tmp_path / "made" / "igpt_jax-1.0" / "configs"
  made.mkdir(parents=True)
  (made / "quickstart.py").touch()
  commands = []

  def run(command, check):
    commands.append(command)
    if command[0] == "git":
      shutil.copytree(made, content / command[-1] / "configs")

  monkeypatch.setattr("subprocess.run", run)
  monkeypatch.setattr(sys, "path", list(sys.path))
  source = "".join(cells("code")[0]["source"])
  if there == "zip":
    shutil.make_archive(str(content / "igpt_jax-1.0"), "zip", tmp_path / "made")
  elif there == "git URL":
    source = source.replace('SOURCE = ""', 'SOURCE = "https://example.org/igpt.git"')
  answers = ["https://example.org/igpt.git"]
  names = {"input": lambda question: answers.pop()} if there == "answer" else {"input": None}
  exec(compile(source, str(NOTEBOOK), "exec"), names)
  assert os.path.exists("configs/quickstart.py") and os.getcwd() != str(content)
  cloned = [command[-2] for command in commands if command[0] == "git"]
  assert cloned == ([] if there == "zip" else ["https://example.org/igpt.git"])
  assert commands[-1] == [sys.executable, "launch/colab.py"]


def test_a_run_lies_in_the_drive_where_there_is_one(monkeypatch):
  assert notebook.workdir("runs/a", "MyDrive/b") == "runs/a", "this isn't Colab"
  mounted = []
  drive = types.SimpleNamespace(mount=mounted.append)
  colab = types.SimpleNamespace(drive=drive)
  monkeypatch.setitem(sys.modules, "google.colab", colab)
  monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace(colab=colab))
  assert notebook.workdir("runs/a", "") == "runs/a" and not mounted
  assert notebook.workdir("runs/a", "MyDrive/b") == "/content/drive/MyDrive/b/runs/a"
  assert mounted == ["/content/drive"]

  def refuse(path):
    raise ValueError("mount failed")

  drive.mount = refuse
  with pytest.raises(UserError, match=r"mount failed.*DRIVE = "):
    notebook.workdir("runs/a", "MyDrive/b")


@pytest.fixture
def installer(monkeypatch, capsys):
  """launch/colab.py on a machine of one's choice: returns pip's last argument, and what was printed."""
  spec = importlib.util.spec_from_file_location("colab", ROOT / "launch" / "colab.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def install(before, after, *, gpu=False, devices="", platform="cpu", pip=0):
    versions = iter([before, before, after])
    commands = []

    def run(command, **settings):
      commands.append(command)
      status = pip if "pip" in command else 0
      return subprocess.CompletedProcess(command, status, f"1 {platform} a chip", "")

    monkeypatch.setattr(module, "_versions", lambda: next(versions))
    monkeypatch.setattr(module.shutil, "which", lambda name: name if gpu else None)
    monkeypatch.setattr(
      module.glob, "glob", lambda pattern: [pattern] if pattern == devices else []
    )
    monkeypatch.setattr(module.subprocess, "run", run)
    status = module.main()
    target = next(command[-1] for command in commands if "pip" in command)
    return status, target.removeprefix(str(ROOT)), capsys.readouterr().out

  return install


def test_the_accelerator_that_is_here_is_installed_for(installer):
  jax = {"jax": "0.11.0"}
  status, extra, said = installer(jax, jax)
  assert (status, extra) == (0, "") and "jax 0.11.0 (was there)" in said and "1 cpu" in said
  both = {"jax": "0.12.0", "libtpu": "0.0.45"}
  status, extra, said = installer(jax, both, devices="/dev/vfio/[0-9]*", platform="tpu")
  assert (status, extra) == (0, "[tpu]")
  assert "jax 0.12.0 (was 0.11.0), libtpu 0.0.45 (new)" in said and "isn't used" not in said
  assert installer(jax, jax, gpu=True, platform="gpu")[1] == "[cuda]"
  newer = {**jax, "jax-cuda13-plugin": "0.11.0"}
  assert installer(newer, newer, gpu=True, platform="gpu")[1] == "[cuda13]"
  assert "isn't used, though tpu is installed" in installer(jax, jax, devices="/dev/accel*")[2]
  status, _, said = installer(jax, jax, pip=1)
  assert status == 1 and "pip could not install" in said


def test_what_the_notebook_makes_is_ignored_by_git():
  names = ["igpt_jax_checkout/x", "launch/igpt_jax_checkout/x", "my/x", "runs/x", ".venv/x"]
  command = ["git", "-C", str(ROOT), "check-ignore", *names]
  ignored = subprocess.run(command, capture_output=True, text=True).stdout.split()
  if not (ROOT / ".git").exists():
    pytest.skip("this isn't a git checkout")
  assert ignored == names


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
