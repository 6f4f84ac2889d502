"""Jobs in a notebook: runs them, and shows their output, curves and images.

Jobs run in processes of their own, as from a terminal: an accelerator belongs to one process at a time,
and the notebook's process uses none.
"""

import base64
import collections
import html
import importlib.resources
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence

from igpt_jax import checkpoint, files
from igpt_jax.data import image_decoding, image_files
from igpt_jax.data.sources import DataConfig, open_split
from igpt_jax.errors import UserError
from igpt_jax.reporting import curves, figures

_LINES = 20  # last lines of a job's output that are shown
_MOUNTED = "/content/drive"
_ENLARGED = 16  # scale of the example digit


class Job:
  """A job in a process of its own; `lines` are the last lines of its output."""

  def __init__(self, arguments: Sequence[str], **environment: str):
    """Starts `python -m igpt_jax.main` with these arguments."""
    self.lines: collections.deque[str] = collections.deque(maxlen=_LINES)
    # Interrupting a cell signals all processes; jobs inherit SIG_IGN, and `stop` ends them.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
      self.process = subprocess.Popen(
        [sys.executable, "-m", "igpt_jax.main", *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    finally:
      signal.signal(signal.SIGINT, before)
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    for line in self.process.stdout or ():
      self.lines.append(line.rstrip("\n"))

  @property
  def runs(self) -> bool:
    return self.process.poll() is None

  def stop(self) -> None:
    """Terminates the job, on which training saves, and waits for its end."""
    if self.runs:
      self.process.send_signal(signal.SIGTERM)
    self.process.wait()
    self._reader.join()

  def check(self) -> None:
    """Waits for the job's end. Raises UserError, with its last lines, if it failed."""
    status = self.process.wait()
    self._reader.join()
    if status:
      raise UserError(f"job: it ended with status {status}; expected 0:\n" + "\n".join(self.lines))


class Run:
  """Jobs of one config in one workdir.

  Args:
    config: a config file, or the name of one of the project's.
    workdir: local folder of the run, which is resumed if it exists.
    overrides: "--config.FIELD=VALUE", …

  Raises:
    UserError: the workdir is in a bucket.
  """

  def __init__(self, config: str, workdir: str, overrides: Iterable[str] = ()):
    files.local("workdir", workdir)
    self.workdir = pathlib.Path(workdir)
    self._arguments = [f"--config={config}", f"--workdir={workdir}", *overrides]

  def train(self, seconds: float = 3.0) -> None:
    """Trains, and shows curves and completions meanwhile. When interrupted it saves and returns.

    Completions of every checkpoint are drawn on the CPU. The same call resumes training.

    Args:
      seconds: time between two updates.

    Raises:
      UserError: a job failed; with its last lines.
    """
    screen = _Screen()
    training = Job([*self._arguments, "--config.job=pretrain"])
    drawing: Job | None = None
    try:
      while training.runs or self._left_to_draw():
        if (drawing is None or not drawing.runs) and self._left_to_draw():
          watching = ["--config.job=sample", "--config.watch=True", "--config.watch_seconds=1"]
          drawing = Job([*self._arguments, *watching], JAX_PLATFORMS="cpu")
        self._show_training(screen, training)
        time.sleep(seconds)
        for job in (training, drawing):
          if job is not None and not job.runs:
            job.check()
      training.check()
    except KeyboardInterrupt:
      print("stopped; the same cell goes on from the last checkpoint")
    finally:
      for job in (training, drawing):
        if job is not None:
          job.stop()
    self._show_training(screen, training)

  def _left_to_draw(self) -> bool:
    """True if completions of some checkpoint are missing."""
    steps = checkpoint.whole_steps(str(self.workdir))
    return not all((self.workdir / "sample" / str(s) / "sample.json").exists() for s in steps)

  def _show_training(self, screen: "_Screen", training: Job) -> None:
    shown = [_text(training.lines)]
    curve = self.workdir / "live.png"
    if curves.draw_curve(str(self.workdir), str(curve)):
      shown.append(_image(curve))
    drawn = [path.parent for path in self.workdir.glob("sample/*/sample.json")]
    if drawn:
      step = max(drawn, key=lambda folder: int(folder.name))
      shown += [_text([f"completions at step {step.name}"]), _image(step / "completions.png")]
    screen.show(shown)

  def job(self, name: str, *overrides: str) -> None:
    """Runs a job of this config and shows its output.

    Raises:
      UserError: the job failed; with its last lines.
    """
    screen, job = _Screen(), Job([*self._arguments, f"--config.job={name}", *overrides])
    try:
      while job.runs:
        screen.show([_text(job.lines)])
        time.sleep(0.5)
      job.check()
    finally:
      job.stop()
      screen.show([_text(job.lines)])

  def show(self, *names: str) -> None:
    """Shows images and text files in the workdir. Names may be globs."""
    for name in names:
      paths = sorted(self.workdir.glob(name))
      if not paths:
        raise UserError(f"{self.workdir / name}: no such file; fix: run the job that writes it")
      for path in paths:
        if path.suffix in (".png", ".gif"):
          _Screen().show([_text([str(path)]), _image(path)])
        else:
          _Screen().show([_text(path.read_text(encoding="utf-8").splitlines())])


def workdir(name: str, drive: str = "") -> str:
  """Returns the folder of a run: in Google Drive, which is mounted for it, or here if this isn't Colab.

  Args:
    name: relative path of the run.
    drive: folder of Google Drive, MyDrive/…, in which runs outlive the runtime; "": none.

  Raises:
    UserError: Google Drive can't be mounted.
  """
  try:
    from google.colab import drive as google_drive
  except ImportError:
    return name
  if not drive:
    return name
  try:
    google_drive.mount(_MOUNTED)
  except Exception as error:  # Colab's are of several kinds
    raise UserError(
      f"DRIVE: {drive}: Google Drive isn't mounted ({error}); fix: run this cell again and allow it, or "
      'DRIVE = "", which keeps the run in this runtime alone'
    ) from error
  return os.path.join(_MOUNTED, drive, name)


def complete(
  checkpoint_path: str,
  images: str,
  *,
  workdir: str,
  keep: float = 0.5,
  n: int = 8,
  overrides: Iterable[str] = (),
) -> None:
  """Completes images with a checkpoint, and shows grids and animations.

  Args:
    checkpoint_path: a checkpoint of any format.
    images: a file, a glob or a folder.
    workdir: folder of the results, to which a run's step is added, _STEP; other settings need another.
    keep: share of the rows that is given.
    n: samples per image.
    overrides: "--config.FIELD=VALUE", …
  """
  # The same cell after more training draws from another model.
  step = checkpoint.latest_step(checkpoint_path)
  workdir += "" if step is None else f"_{step}"
  inputs = [f"--config.checkpoint={checkpoint_path}", f"--config.complete.images={images}"]
  run = Run("complete", workdir, [*inputs, *overrides])
  run.job("complete", f"--config.complete.keep={keep}", f"--config.complete.n={n}")
  run.show("**/grid.png", "**/appearing.gif")


def own_images_folder(folder: str = "my") -> str:
  """Returns a folder of images, after an upload if the notebook is Colab's.

  If the folder has no images, scikit-learn's photograph and one of its digits are written to it.
  """
  os.makedirs(folder, exist_ok=True)
  try:
    from google.colab import files
  except ImportError:
    pass
  else:
    for name, content in files.upload().items():
      with open(os.path.join(folder, os.path.basename(name)), "wb") as file:
        file.write(content)
  if not image_files.find(folder)[0]:
    _write_examples(folder)
  return folder


def _write_examples(folder: str) -> None:
  photo = importlib.resources.files("sklearn.datasets.images") / "china.jpg"
  pathlib.Path(folder, "photograph.jpg").write_bytes(photo.read_bytes())
  digit = image_decoding.decode(open_split(DataConfig(name="digits"), "test")[0]["image"])
  enlarged = figures.grid([[digit]], scale=_ENLARGED, gap=0)
  figures.save_png(os.path.join(folder, "digit.png"), enlarged)


def _display():
  """Imports IPython.display. Raises UserError without IPython."""
  try:
    from IPython import display
  except ImportError:
    raise UserError(
      "igpt_jax.notebook: it needs IPython, which every notebook has; fix: in a terminal use "
      "python -m igpt_jax.main"
    ) from None
  return display


class _Screen:
  """An output below a cell, which every `show` replaces."""

  def __init__(self):
    self._display, self._handle = _display(), None

  def show(self, parts: Iterable[str]) -> None:
    """Shows parts of HTML, one below the other."""
    shown = self._display.HTML("".join(parts))
    if self._handle is None:
      self._handle = self._display.display(shown, display_id=True)
    else:
      self._handle.update(shown)


def _text(lines: Iterable[str]) -> str:
  return f'<pre style="white-space: pre-wrap">{html.escape(chr(10).join(lines))}</pre>'


def _image(path: pathlib.Path) -> str:
  content = base64.b64encode(path.read_bytes()).decode()
  return f'<img src="data:image/{path.suffix[1:]};base64,{content}" style="max-width: 100%">'
