"""Grids and curves."""

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


def test_plot_draws_curves_and_levels(tmp_path):
  """Every curve and level leaves ink: the image changes with each."""
  curve = ([0, 1, 2], [3.0, 2.0, 1.5])
  drawn = []
  for curves, levels in (
    ({"a": curve}, {}),
    ({"a": curve, "b": ([0, 2], [1.0, 1.0])}, {}),
    ({"a": curve}, {"pixels": 2.5}),
  ):
    path = str(tmp_path / "plot.png")
    figures.plot(path, curves, title="t", x_label="x", y_label="y", levels=levels)
    with Image.open(path) as image:
      drawn.append(np.asarray(image.convert("RGB")))
  assert drawn[0].std() > 1
  assert all(np.any(other != drawn[0]) for other in drawn[1:])
  assert os.listdir(tmp_path) == ["plot.png"]
