"""Images of a run under training: what they show, when they are drawn, and that they change nothing."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import open_split
from igpt_jax.jobs import pretrain
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.reporting import metrics
from igpt_jax.runner import progress_images
from igpt_jax.runner.progress_images import ProgressImages
from igpt_jax.runner.stop_signal import StopSignal
from igpt_jax.training import optimizer, state
from igpt_jax.workspace import memory
from support.quickstart import assert_same, params_of, shrunk
from support.tiny import mesh_of, on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")

N = 3
WANTED = {"train.progress_images": N}


class Shown:
  """A writer that keeps the images it is given."""

  def __init__(self):
    self.images = []

  def image(self, step, name, image):
    self.images.append((step, name, image))


def drawer(folder, mesh, *, causal=True, **overrides):
  """What draws the quickstart's images, and a state to draw with."""
  settings = shrunk(**WANTED, **overrides)
  model = ImageGPTConfig(
    n_layer=2, n_head=2, n_embd=16, n_vocab=17, n_positions=64, causal=causal, dtype="float32"
  )
  tx = optimizer.make_optimizer(optimizer.OptimizerConfig(learning_rate=1e-3, steps=10))
  made = dataclasses.replace(state.make_state(model, tx, 0, mesh), step=np.int32(7))
  grey = np.repeat(np.linspace(-1, 1, 17, dtype=np.float32)[:, None], 3, 1)
  held_out = open_split(settings.data, "validation")
  spec = dataclasses.replace(model.tokens, palette=Palette(grey))
  draw = ProgressImages(settings, str(folder), held_out, spec, model, mesh)
  return draw, made


def cells(image, columns, side=8):
  """The images of a grid, [rows, columns, side, side]."""
  step = (image.shape[1] - 4) // columns
  scale = (step - 4) // side
  at = 4 + scale // 2 + np.arange(side) * scale
  tops = range(image.shape[0] % step - 4, image.shape[0] - 4, step)  # below the title and heads
  return np.stack([
    [image[top + at][:, column * step + at, 0] for column in range(columns)] for top in tops
  ])  # fmt: skip


def test_a_run_with_images_is_the_run_without(tiny_run, tmp_path):
  """To the last bit; they are drawn at every evaluation."""
  on_one_device(pretrain, shrunk(**WANTED), str(tmp_path / "with"))
  assert sorted(os.listdir(tmp_path / "with" / "progress")) == ["12.png", "6.png"]
  assert not (tiny_run / "progress").exists()
  assert_same(params_of(tmp_path / "with"), params_of(tiny_run))
  losses = [
    [(r["step"], r.get("loss"), r.get("validation_loss")) for r in metrics.read_jsonl(path)]
    for path in (tmp_path / "with" / "metrics.jsonl", tiny_run / "metrics.jsonl")
  ]
  assert losses[0] == losses[1]


@pytest.mark.parametrize("causal", [True, False], ids=["autoregressive", "masked"])
def test_they_are_given_completed_and_original(tmp_path, causal):
  """The upper half is as in the original everywhere; what is below it is drawn, and differs."""
  draw, made = drawer(tmp_path, mesh_of(), causal=causal)
  shown = Shown()
  draw(made, metrics.Writers([shown]))
  ((step, name, image),) = shown.images
  assert (step, name) == (7, "progress")
  np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / "progress" / "7.png")))
  rows = cells(image, 2 + 2)
  assert len(rows) == N
  given, drawn, original = rows[:, 0], rows[:, 1:3], rows[:, 3]
  assert (rows[:, :, :4] == original[:, None, :4]).all()
  assert len(np.unique(given[:, 4:])) == 1
  assert (drawn[:, 0, 4:] != drawn[:, 1, 4:]).any() and (drawn[:, 0, 4:] != original[:, 4:]).any()


def test_they_are_the_same_on_any_mesh(tmp_path):
  images = []
  for name, shape in (("one", (1, 1, 1)), ("many", (2, 2, 2))):
    shown = Shown()
    draw, made = drawer(tmp_path / name, mesh_of(shape))
    draw(made, metrics.Writers([shown]))
    images.append(shown.images[0][2])
  np.testing.assert_array_equal(*images)


def test_whole_images_of_the_same_state_are_not_drawn_again(tmp_path, monkeypatch):
  """The writers get them all the same. A damaged file, or one of another state, is replaced."""
  draw, made = drawer(tmp_path, mesh_of())
  draw(made, metrics.Writers([]))
  path = tmp_path / "progress" / "7.png"
  content = path.read_bytes()

  def refuse(*unused):
    raise AssertionError("drawn again")

  again, _ = drawer(tmp_path, mesh_of())
  with monkeypatch.context() as patch:
    patch.setattr(ProgressImages, "_compiled", refuse)
    shown = Shown()
    again(made, metrics.Writers([shown]))
    np.testing.assert_array_equal(shown.images[0][2], np.asarray(Image.open(path)))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AssertionError, match="drawn again"):
      again(made, metrics.Writers([]))
  draw(made, metrics.Writers([]))
  assert path.read_bytes() == content
  params = jax.tree.map(lambda leaf: leaf + 0.5, made.params)
  draw(dataclasses.replace(made, params=params), metrics.Writers([]))
  assert path.read_bytes() != content


def test_the_first_are_drawn_early_and_once(tmp_path, monkeypatch):
  draw, made = drawer(tmp_path, mesh_of())
  assert not draw.overdue()
  monkeypatch.setattr(progress_images, "_FIRST_SECONDS", 0.0)
  assert draw.overdue()
  draw(made, metrics.Writers([]))
  assert not draw.overdue()
  resumed, _ = drawer(tmp_path, mesh_of())
  assert not resumed.overdue()


def test_several_processes_ask_rarely_and_at_the_same_calls(tmp_path, monkeypatch):
  draw, _ = drawer(tmp_path, mesh_of())
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  asked = []
  monkeypatch.setattr(
    progress_images.hosts, "from_main", lambda value, what: asked.append(draw._asked) or value
  )
  assert not any(draw.overdue() for _ in range(100))
  assert asked == [1, 2, 4, 8, 16, 32, 64]


def test_a_run_that_is_to_stop_draws_no_more(tmp_path, monkeypatch):
  asked = StopSignal.asked

  def stop_at_six(self, at_step):
    if at_step >= 6:
      self.requested = "SIGTERM"
    return asked(self, at_step)

  monkeypatch.setattr(StopSignal, "asked", stop_at_six)
  on_one_device(pretrain, shrunk(**WANTED), str(tmp_path))
  assert checkpoint.latest_step(str(tmp_path)) == 6
  assert not (tmp_path / "progress").exists()


def test_a_run_draws_before_its_first_evaluation(tmp_path, monkeypatch):
  monkeypatch.setattr(progress_images, "_FIRST_SECONDS", -1.0)
  on_one_device(pretrain, shrunk(**WANTED), str(tmp_path))
  assert sorted(os.listdir(tmp_path / "progress")) == ["1.png", "12.png", "6.png"]


def test_a_lack_of_memory_is_told_and_training_goes_on(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(memory.hardware, "memory_bytes", lambda device: 1_000.0)
  draw, made = drawer(tmp_path, mesh_of())
  shown = Shown()
  draw(made, metrics.Writers([shown]))
  draw(made, metrics.Writers([shown]))
  assert not shown.images and not (tmp_path / "progress").exists()
  said = capsys.readouterr().out
  assert said.count("train.progress_images: none are drawn: 3 images of 2 completions need") == 1
  assert "fix: fewer train.progress_images" in said


def test_without_held_out_images_none_are_drawn(tmp_path, capsys):
  on_one_device(pretrain, shrunk(**WANTED, **{"data.validation": 0.0}), str(tmp_path))
  assert "train.progress_images: none are drawn: nothing is held out" in capsys.readouterr().out
