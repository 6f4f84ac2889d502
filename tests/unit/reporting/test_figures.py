"""Grids: images in their places, below titles and column heads."""

import os

import numpy as np
import pytest
from PIL import Image

from igpt_jax.reporting import figures


def solid(colour, height=2, width=3):
  return np.full((height, width, 3), colour, np.uint8)


def test_grid_puts_every_picture_in_its_place():
  first = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
  rows = [[first, solid(50)], [solid(100)]]
  canvas = figures.grid(rows, scale=2, gap=4)
  assert canvas.dtype == np.uint8
  assert canvas.shape == (2 * (4 + 4) + 4, 2 * (6 + 4) + 4, 3)
  np.testing.assert_array_equal(canvas[4:8:2, 4:10:2], first)  # each pixel is a 2 × 2 square
  np.testing.assert_array_equal(canvas[5:8:2, 5:10:2], first)
  assert np.all(canvas[4:8, 14:20] == 50)
  assert np.all(canvas[12:16, 4:10] == 100)
  background = np.ones(canvas.shape[:2], bool)
  for top, left in ((4, 4), (4, 14), (12, 4)):
    background[top : top + 4, left : left + 6] = False
  assert np.all(canvas[background] == 255)  # the short row ends in it, too


def test_grid_without_gap_or_scale_is_the_pictures():
  canvas = figures.grid([[solid(1), solid(2)]], scale=1, gap=0)
  np.testing.assert_array_equal(canvas, np.concatenate([solid(1), solid(2)], axis=1))


@pytest.mark.parametrize("scale", [1, 2, 24])
def test_text_stands_above_the_images_and_does_not_move_them(scale):
  rows = [[solid(10 * c, height=4, width=4) for c in range(6)]] * 2
  bare = figures.grid(rows, scale=scale)
  heads = (("given", 1), ("completions", 4), ("original", 1))
  for texts in ({"title": "Completions"}, {"heads": heads}, {"title": "Größe 中", "heads": heads}):
    canvas = figures.grid(rows, scale=scale, **texts)
    height, width = bare.shape[:2]
    np.testing.assert_array_equal(canvas[-height:, :width], bare)
    assert np.any(canvas[:-height] < 128)  # ink
    assert np.all(canvas[:2] == 255) and np.all(canvas[:, -2:] == 255)  # nothing is cut off


def test_heads_stand_in_the_middle_of_their_columns():
  """Or in one line that doesn't depend on the columns' width, if they are too narrow for them."""
  blank = solid(255, height=100, width=100)
  heads = (("a", 1), ("completions", 2), ("b", 1))
  canvas = figures.grid([[blank] * 4], scale=1, heads=heads)
  ink = np.flatnonzero(np.any(canvas[:18] < 128, axis=(0, 2)))
  for begin, end in ((4, 104), (108, 308), (312, 412)):
    inside = ink[(ink >= begin) & (ink < end)]
    assert abs((inside[0] + inside[-1]) / 2 - (begin + end) / 2) < 5
  narrow = figures.grid([[solid(255, height=4, width=4)] * 4], scale=1, heads=heads)
  assert narrow.shape[1] > 4 * 8 + 4


def test_completions_are_what_is_given_the_completions_and_the_original():
  original, drawn = solid(7, height=4, width=4), [solid(c, height=4, width=4) for c in (1, 2)]
  known = np.arange(4)[:, None] < 1
  canvas = figures.completions(known, [(original, drawn)], scale=1, title="t")
  row = np.concatenate([figures.hide(original, known), *drawn, original], axis=1)
  cells = [canvas[-8:-4, left : left + 4] for left in range(4, 4 + 4 * 8, 8)]
  np.testing.assert_array_equal(np.concatenate(cells, axis=1), row)


def test_samples_are_all_there_and_wider_than_high():
  images = np.stack([solid(c, height=4, width=4) for c in range(7)])
  canvas = figures.samples(images, scale=1)
  assert canvas.shape == (2 * 8 + 4, 4 * 8 + 4, 3)
  assert [canvas[4 + 8 * (i // 4), 4 + 8 * (i % 4), 0] for i in range(7)] == list(range(7))


@pytest.mark.parametrize(
  "resolution, cells, scale",
  [(8, 6, 16), (16, 6, 8), (32, 6, 4), (48, 6, 3), (192, 6, 1), (32, 64, 4), (32, 100, 2), (32, 999, 1)],
)  # fmt: skip
def test_grid_scale(resolution, cells, scale):
  """Cells are 128 pixels or more, unless the grid gets longer than 8,192."""
  assert figures.grid_scale(resolution, cells) == scale
  canvas = figures.grid([[solid(0, resolution, resolution)] * cells], gap=0)
  assert canvas.shape[1] == cells * resolution * scale


@pytest.mark.parametrize(
  "path, step, name", [("/a/b/5", 5_000, "step 5,000"), ("/a/gpt/", 0, "gpt")]
)
def test_checkpoint_name(path, step, name):
  assert figures.checkpoint_name(path, step) == name


def test_grid_refuses_pictures_of_two_sizes():
  with pytest.raises(ValueError):
    figures.grid([[solid(1), solid(2, height=5)]], scale=1)


def test_hidden_rows_are_grey_and_the_original_is_left_alone():
  picture = solid(7, height=4)
  hidden = figures.hide(picture, np.arange(4)[:, None] < 1)
  assert np.all(hidden[:1] == 7) and np.all(hidden[1:] == 200)
  assert np.all(picture == 7)


@pytest.mark.parametrize("resolution, scale", [(8, 12), (32, 3), (64, 2), (96, 1), (1000, 1)])
def test_default_scale(resolution, scale):
  assert figures.default_scale(resolution) == scale


def test_png_round_trip_leaves_nothing_else_behind(tmp_path):
  picture = np.random.default_rng(0).integers(256, size=(5, 6, 3), dtype=np.uint8)
  figures.save_png(str(tmp_path / "a.png"), picture)
  figures.save_png(str(tmp_path / "a.png"), picture[::-1])
  with Image.open(tmp_path / "a.png") as image:
    np.testing.assert_array_equal(np.asarray(image), picture[::-1])
  assert os.listdir(tmp_path) == ["a.png"]
