"""What a notebook shows of the jobs: a run as it trains, one's own images, what jobs leave.

Jobs run as a terminal would run them, in processes of their own: an accelerator belongs to one process
at a time, and the notebook's own touches none. Nothing is computed here.
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

from igpt_jax import checkpoint
from igpt_jax.data import image_decoding, image_files
from igpt_jax.data.sources import DataConfig, open_split
from igpt_jax.errors import UserError
from igpt_jax.reporting import curves, figures

_LINES = 20  # of what a job prints, that are shown
_ENLARGED = 16  # times, of the digit that is the example


class Job:
  """A job that runs; its lines are gathered."""

  def __init__(self, arguments: Sequence[str], **environment: str):
    """Starts `python -m igpt_jax.main` with these arguments."""
    self.lines: collections.deque[str] = collections.deque(maxlen=_LINES)
    # Stopping a cell interrupts all its processes; these are told by `stop`, and inherit deafness.
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
    """Asks it to end, as training does by saving; waits for that."""
    if self.runs:
      self.process.send_signal(signal.SIGTERM)
    self.process.wait()
    self._reader.join()

  def check(self) -> None:
    """Waits for its end. Raises UserError, with what it said, where it failed."""
    status = self.process.wait()
    self._reader.join()
    if status:
      raise UserError(f"job: it ended with status {status}; expected 0:\n" + "\n".join(self.lines))


class Run:
  """One config in one workdir, from training to completions.

  Args:
    config: a file of configs/.
    workdir: where everything goes; what is there is gone on from.
    overrides: "--config.FIELD=VALUE", …
  """

  def __init__(self, config: str, workdir: str, overrides: Iterable[str] = ()):
    self.workdir = pathlib.Path(workdir)
    self._arguments = [f"--config={config}", f"--workdir={workdir}", *overrides]

  def train(self, seconds: float = 3.0) -> None:
    """Trains, and shows its curves and completions as they come; interrupted, it saves and ends.

    Completions are drawn on the CPU, of every checkpoint. The same call goes on where it stopped.

    Args:
      seconds: between two looks.

    Raises:
      UserError: what the job said, where it failed.
    """
    screen = _Screen()
    training = Job([*self._arguments, "--config.job=pretrain"])
    drawing: Job | None = None
    try:
      while training.runs or self._left_to_draw():
        if (drawing is None or not drawing.runs) and self._left_to_draw():
          drawing = Job(
            [
              *self._arguments,
              "--config.job=sample",
              "--config.watch=True",
              "--config.watch_seconds=1",
            ],
            JAX_PLATFORMS="cpu",
          )
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
    """Whether there are checkpoints whose completions aren't there."""
    steps = checkpoint.whole_steps(str(self.workdir))
    return not all((self.workdir / "sample" / str(s) / "sample.json").exists() for s in steps)

  def _show_training(self, screen: "_Screen", training: Job) -> None:
    shown = [_text(training.lines)]
    curve = self.workdir / "live.png"
    if curves.draw_curve(str(self.workdir), str(curve)):
      shown.append(_image(curve))
    drawn = sorted(
      self.workdir.glob("sample/*/sample.json"), key=lambda path: int(path.parent.name)
    )
    if drawn:
      step = drawn[-1].parent
      shown += [_text([f"completions at step {step.name}"]), _image(step / "completions.png")]
    screen.show(shown)

  def job(self, name: str, *overrides: str) -> None:
    """Runs a job of this config and shows what it prints.

    Raises:
      UserError: what it said, where it failed.
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
    """Shows files that jobs have left in the workdir: images, or text. Names may be globs."""
    for name in names:
      found = sorted(self.workdir.glob(name))
      if not found:
        raise UserError(f"{self.workdir / name}: no such file; fix: run the job that writes it")
      for path in found:
        if path.suffix in (".png", ".gif"):
          _Screen().show([_text([str(path)]), _image(path)])
        else:
          _Screen().show([_text(path.read_text(encoding="utf-8").splitlines())])


def complete(
  checkpoint_path: str,
  images: str,
  *,
  workdir: str,
  keep: float = 0.5,
  n: int = 8,
  overrides: Iterable[str] = (),
) -> None:
  """Completes images with a checkpoint, and shows the grids and the pixels appearing.

  Args:
    checkpoint_path: of any format.
    images: a file, a glob or a folder.
    workdir: where the results go; another one for other settings.
    keep: share of the rows that is given.
    n: samples of each image.
    overrides: "--config.FIELD=VALUE", …
  """
  given = [f"--config.checkpoint={checkpoint_path}", f"--config.complete.images={images}"]
  run = Run("configs/complete.py", workdir, [*given, *overrides])
  run.job("complete", f"--config.complete.keep={keep}", f"--config.complete.n={n}")
  run.show("**/grid.png", "**/appearing.gif")


def own_images_folder(folder: str = "my") -> str:
  """Asks for images where the notebook is Colab's; the folder that they are in.

  Elsewhere, those that lie in the folder; a photograph that comes with scikit-learn, and a digit of its
  set of them, where there are none.
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
  """IPython.display. Raises UserError outside of notebooks."""
  try:
    from IPython import display
  except ImportError:
    raise UserError(
      "igpt_jax.notebook: it needs IPython, which every notebook has; fix: in a terminal use "
      "python -m igpt_jax.main"
    ) from None
  return display


class _Screen:
  """A place below a cell; what is shown there takes the place of what was."""

  def __init__(self):
    self._display, self._handle = _display(), None

  def show(self, parts: Iterable[str]) -> None:
    """HTML, one part below the other."""
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
