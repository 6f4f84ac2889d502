"""Job ablate a second time in one workdir: with other settings, images or devices no loss stands beside another's."""

import csv
import os

import numpy as np
import pytest
from PIL import Image

from igpt_jax.ablation import results as results_lib
from igpt_jax.ablation import workdirs
from igpt_jax.ablation.entries import Entry
from igpt_jax.ablation.outcomes import FINISHED, UNFINISHED, Point, Result
from igpt_jax.config import choices
from igpt_jax.errors import UserError
from igpt_jax.jobs import ablate, pretrain
from support.quickstart import shrunk
from support.tiny import on_one_device

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


def study(*runs, **changes):
  return shrunk(**{
    "job": "ablate", "ablate.runs": runs, "ablate.seeds": (0,), "ablate.probe": "none",
    "ablate.test": False, "train.steps": 4, "train.learning_rate": 1e-2, "train.log_every": 1,
    "train.eval_every": 4, "train.checkpoint_every": 4, **changes,
  })  # fmt: skip


def status_of(workdir, name):
  with open(workdir / "ablate.csv", encoding="utf-8") as file:
    return {row["name"]: row["status"] for row in csv.DictReader(file)}[name]


@pytest.fixture
def images(tmp_path):
  """Writes images into a folder of a data set, other ones for another seed."""

  def write(split, number, seed):
    folder = tmp_path / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    for i, each in enumerate(np.random.default_rng(seed).integers(0, 256, (number, 8, 8, 3))):
      Image.fromarray(each.astype(np.uint8)).save(folder / f"{i}.png")

  for seed, (split, number) in enumerate({"train": 64, "val": 16, "test": 16}.items()):
    write(split, number, seed)
  return write


def test_a_run_that_diverged_is_trained_again_with_other_settings(tmp_path):
  """Its first checkpoint never came, so that nothing but this note tells what it was trained with."""
  bad = ("original:", "wild: train.learning_rate=1e30")
  on_one_device(ablate, study(*bad, **{"guard.in_row": 2}), str(tmp_path))
  ended = status_of(tmp_path, "wild")
  assert ended.startswith("diverged")
  on_one_device(ablate, study(*bad, **{"guard.in_row": 2}), str(tmp_path))
  assert status_of(tmp_path, "wild") == ended
  on_one_device(ablate, study("original:", "wild: train.learning_rate=1e-3"), str(tmp_path))
  assert status_of(tmp_path, "wild") == FINISHED


def test_a_loss_of_other_validation_images_is_refused(tmp_path, images):
  of_folder = {
    "data.name": "folder", "data.path": str(tmp_path / "images"), "data.validation_split": "val",
  }  # fmt: skip
  workdir = str(tmp_path / "study")
  on_one_device(ablate, study("original:", **of_folder), workdir)
  images("val", 16, 9)
  with pytest.raises(UserError, match=r"validation: folder .* there, folder .* here"):
    on_one_device(ablate, study("original:", "more: train.b2=0.9", **of_folder), workdir)
  assert not os.path.exists(f"{workdir}/runs/more")

  new = str(tmp_path / "new")
  other = {"job": "pretrain", "seed": 1, "palette.path": f"{workdir}/palette.npy"}
  on_one_device(pretrain, study(**of_folder, **other), new)
  both = (f"{workdir}/runs/original/0", new)
  entries, notes = workdirs.finished(study(**of_folder, **{"ablate.workdirs": both}))
  assert [note.partition(":")[0] for note in notes] == ["validation"]
  assert len({entry.name for entry in entries}) == 2  # their losses are in no mean


@pytest.mark.parametrize(
  "changes, expected",
  [
    ({"train.eval_images": 100}, "train.eval_images"),
    ({"model.dtype": "bfloat16"}, "model.dtype: float32 there, bfloat16 here"),
  ],
)
def test_losses_that_would_be_measured_otherwise_are_refused(tmp_path, changes, expected):
  on_one_device(ablate, study("original:", **{"train.eval_images": 20}), str(tmp_path))
  with pytest.raises(UserError, match=expected):
    on_one_device(ablate, study("original:", **{"train.eval_images": 20} | changes), str(tmp_path))
  by_name = {"train.eval_images": 20, "model.dtype": "float32"}  # as computed before
  on_one_device(ablate, study("original:", **by_name), str(tmp_path))


def test_a_run_without_held_out_images_has_not_diverged(tmp_path):
  run = study(**{"job": "pretrain", "data.validation": 0.0})
  both = (str(tmp_path / "a"), str(tmp_path / "b"))
  for folder in both:
    on_one_device(pretrain, run, folder)
  with pytest.raises(UserError, match="a has no loss on validation: nothing was held out"):
    workdirs.finished(study(**{"ablate.workdirs": both}))


def test_the_plot_is_of_seeds_that_have_points(tmp_path):
  """The first seed of the only run with points has none: it diverged before its first evaluation."""
  settings = study("original:")
  model = choices.model_config(settings, n_vocab=17)

  def result(name, seed, status, *curve):
    entry = Entry(name=name, seed=seed, settings=settings, folder="", model=model)
    loss = curve[-1].loss if curve else float("nan")
    return Result(entry=entry, status=status, validation_loss=loss, curve=curve)

  results = [
    result("original", 0, UNFINISHED),
    result("original", 1, UNFINISHED),
    result("short", 0, "diverged at step 3"),
    result("short", 1, FINISHED, Point(10, 1.0, 3.0)),
  ]
  results_lib.write(str(tmp_path), results)
  assert (tmp_path / "ablate.png").stat().st_size > 10_000
