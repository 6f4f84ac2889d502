"""Plots: every curve, level and mark is drawn and named; equal ones are told apart."""

import itertools
import json
import math
import os
import warnings

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from igpt_jax.probing import probe_tables
from igpt_jax.reporting import curves, plots
from igpt_jax.reporting.plots import Curve, Panel

CURVE = Curve([0, 1, 2], [0.3, 0.4, 0.5])


@pytest.fixture
def drawn(monkeypatch):
  """The figures, once they are saved."""
  kept, close = [], pyplot.close
  monkeypatch.setattr(pyplot, "close", kept.append)
  yield kept
  for figure in kept:
    close(figure)


def draw(tmp_path, panel, **texts):
  path = str(tmp_path / "plot.png")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    plots.plot(path, panel, **{"title": "t", "x_label": "x", **texts})
  assert os.listdir(tmp_path) == ["plot.png"]
  with Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def test_a_dashed_curve_stands_out_and_a_band_is_shaded(tmp_path, drawn):
  band = ([0.2, 0.3, 0.4], [0.4, 0.5, 0.6])
  curves = {
    "a": CURVE,
    "base": Curve([0, 1], [0.5, 0.4], dashed=True),
    "b": Curve(CURVE.x, CURVE.y, band=band),
  }
  draw(tmp_path, Panel(curves=curves, y_label="y"))
  axes = drawn[0].axes[0]
  lines = [container.lines[0] for container in axes.containers]
  assert [line.get_linestyle() for line in lines] == ["-", "--", "-"]
  assert [line.get_color() for line in lines][1] == "black"
  (shade,) = axes.collections[len(axes.containers) :] or axes.collections[-1:]
  assert np.ptp(shade.get_paths()[0].vertices[:, 1]) == pytest.approx(0.4)


def test_panels_have_x_axes_of_their_own(tmp_path, drawn):
  path = str(tmp_path / "plot.png")
  left = Panel(curves={"a": Curve([0, 10], [1, 2])}, y_label="y", x_label="FLOPs")
  right = Panel(curves={"a": Curve([0, 1], [1, 2])}, y_label="y", x_label="seconds")
  plots.plot(path, left, right, title="t")
  first, second = drawn[0].axes
  assert (first.get_xlabel(), second.get_xlabel()) == ("FLOPs", "seconds")
  assert first.get_xlim()[1] > 9 > 2 > second.get_xlim()[1]


def test_the_legend_of_many_curves_lies_beside_them(tmp_path, drawn):
  for count in (8, 9):
    draw(tmp_path, Panel(curves={str(i): Curve([0, 1], [i, i]) for i in range(count)}, y_label="y"))
  within, beside = (figure.axes[0] for figure in drawn)
  for axes, outside in ((within, False), (beside, True)):
    legend = axes.get_legend().get_window_extent()
    assert (legend.x0 >= axes.get_window_extent().x1) == outside


def texts_of(axes):
  return [text.get_text() for text in axes.texts]


def legend_of(axes):
  return [text.get_text() for text in axes.get_legend().get_texts()]


def test_every_part_leaves_ink(tmp_path):
  base = {"curves": {"a": CURVE}, "y_label": "y"}
  images = [
    draw(tmp_path, Panel(**base | changes))
    for changes in (
      {},
      {"curves": {"a": CURVE, "b": CURVE}},  # equal curves
      {"levels": {"pixels": 0.45}},
      {"levels": {"pixels": 0.45, "PCA": 0.45}},
      {"chosen": ("chosen", [1], [0.4])},
      {"accuracy": True},
      {"accuracy": True, "images": 100},
      {"accuracy": True, "images": 100, "classes": 10},
    )
  ]
  images += [draw(tmp_path, Panel(**base), title="$x^{"), draw(tmp_path, Panel(**base), note="n")]
  assert images[0].std() > 1
  for i, image in enumerate(images):
    for other in images[:i]:
      assert image.shape != other.shape or np.any(image != other)


def test_accuracies_have_their_standard_error_and_chance(tmp_path, drawn):
  panel = Panel(
    curves={"a": CURVE}, y_label="y", levels={"pixels": 0.45, "PCA": 0.45}, accuracy=True, images=100,
    classes=4,
  )  # fmt: skip
  draw(tmp_path, panel)
  (axes,) = drawn[0].axes
  (bars,) = axes.containers
  (_, _, (lines,)) = bars
  for (bottom, top), y in zip((ends[:, 1] for ends in lines.get_segments()), CURVE.y, strict=True):
    assert (bottom, top) == pytest.approx(
      (y - math.sqrt(y * (1 - y) / 100), y + math.sqrt(y * (1 - y) / 100))
    )
  assert texts_of(axes) == ["chance, 1 of 4 classes\n25.0%", "pixels =\nPCA\n45.0% ± 5.0%"]


def test_chance_that_is_far_below_is_told_and_does_not_flatten_the_curves(tmp_path, drawn):
  curve = Curve([0, 1], [0.95, 0.97])
  draw(tmp_path, Panel(curves={"a": curve}, y_label="y", accuracy=True, classes=10))
  (axes,) = drawn[0].axes
  assert texts_of(axes) == ["chance, 1 of 10 classes: 10.0%, far below this axis"]
  assert axes.get_ylim()[0] > 0.9


def test_equal_curves_differ_in_colour_line_and_marker(tmp_path, drawn):
  draw(tmp_path, Panel(curves={name: CURVE for name in "abcd"}, y_label="y"))
  lines = [container.lines[0] for container in drawn[0].axes[0].containers]
  for look in ("get_color", "get_linestyle", "get_marker"):
    assert len({getattr(line, look)() for line in lines}) == 4, look
  assert {line.get_markerfacecolor() for line in lines} == {"none"}


def test_names_of_levels_do_not_cover_each_other():
  for middles in ([0.0, 0.01, 0.5], [0.5, 0.99, 0.995], [0.2, 0.2, 0.2], [-0.1, 1.2]):
    moved = plots._apart(middles, [0.1] * len(middles))
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(moved))
    assert max(moved) <= 0.95 + 1e-9
  assert plots._apart([0.3, 0.6], [0.1, 0.1]) == [0.3, 0.6]


def run_of(tmp_path, records):
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  return str(folder)


def test_the_best_validation_loss_is_marked(tmp_path, drawn):
  losses = {100: 1.5, 200: 1.25, 300: math.nan, 400: 1.375}
  records = [{"step": step, "loss": 2.0} for step in losses]
  records += [{"step": step, "validation_loss": loss} for step, loss in losses.items()]
  assert curves.draw_curve(run_of(tmp_path, records), str(tmp_path / "loss.png"))
  (axes,) = drawn[0].axes
  assert drawn[0].get_suptitle() == "run: losses up to step 400"
  assert legend_of(axes) == [
    "best on validation: 1.2500 at step 200", "training, single batches", "validation"
  ]  # fmt: skip


def test_losses_of_raw_rgb_are_drawn_in_bits_per_dimension(tmp_path, drawn):
  """Three dimensions a token: 3 ln 2 nats are a bit."""
  nat = 3 * math.log(2)
  records = [{"step": 1, "loss": 4 * nat}]
  records += [{"step": 1, "validation_loss": math.nan, "validation_bits_per_dim": math.nan}]
  records += [{"step": 2, "validation_loss": 3 * nat, "validation_bits_per_dim": 3.0}]
  assert curves.draw_curve(run_of(tmp_path, records), str(tmp_path / "loss.png"))
  (axes,) = drawn[0].axes
  assert axes.get_ylabel() == "loss, bits per dimension"
  assert "best on validation: 3.0000 at step 2" in legend_of(axes)
  single, validation = (container.lines[0].get_xydata() for container in axes.containers[:2])
  np.testing.assert_allclose([single[-1], validation[-1]], [[1, 4], [2, 3]])


def test_a_smoothed_loss_says_what_it_is_and_the_batches_stay(tmp_path, drawn):
  losses = np.random.default_rng(0).normal(size=200)
  records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
  assert curves.draw_curve(run_of(tmp_path, records), str(tmp_path / "loss.png"))
  (axes,) = drawn[0].axes
  assert legend_of(axes) == ["training, single batches", "training, mean of the last 10 of these"]
  single, smooth = (container.lines[0].get_xydata() for container in axes.containers)
  np.testing.assert_array_equal(single[:, 1], losses)
  assert smooth[0, 0] == 10 and smooth[-1, 0] == 200
  np.testing.assert_allclose(smooth[[0, -1], 1], [losses[:10].mean(), losses[-10:].mean()])


def test_no_losses_no_curve(tmp_path):
  assert not curves.draw_curve(run_of(tmp_path, [{"step": 1}]), str(tmp_path / "loss.png"))
  assert not (tmp_path / "loss.png").exists()


def probed(accuracies, best, **values):
  layers = [
    {"name": f"layer {i}", "kind": "layer", "layer": i, "test_accuracy": y}
    for i, y in enumerate(accuracies)
  ]
  pixels = {"name": "raw pixels", "kind": "pixels", "layer": None, "test_accuracy": 0.5}
  of_checkpoint = {"checkpoint": "run/checkpoints/40", "step": 40, "best_layer": best}
  return {**of_checkpoint, "test_accuracy": accuracies[best], "rows": [pixels, *layers], **values}


@pytest.mark.parametrize("counts", [{}, {"test_images": 200, "classes": 4}])
def test_a_probe_marks_the_chosen_layer(tmp_path, drawn, counts):
  """Also in results of older versions, which don't say how many images and classes there are."""
  probe_tables.draw(str(tmp_path / "probe.png"), probed([0.3, 0.4, 0.375], 1, **counts))
  (axes,) = drawn[0].axes
  assert drawn[0].get_suptitle() == "Linear probe of every layer, step 40"
  assert axes.get_xlabel() == "layer" and axes.get_ylabel() == "test accuracy"
  star = next(line for line in axes.lines if line.get_marker() == "*")
  assert star.get_xydata().tolist() == [[1, 0.4]]
  assert legend_of(axes) == ["layer chosen on validation", "trained"]
  if counts:
    assert axes.get_title() == "bars and ±: standard error of an accuracy on 200 test images"
    assert texts_of(axes)[0] == "chance, 1 of 4 classes\n25.0%"
  else:
    assert axes.get_title() == "" and texts_of(axes) == ["raw pixels\n50.0%"]
