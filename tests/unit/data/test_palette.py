"""Nearest is exact, ties go down, files are checked, fitting beats guessing."""

import os
import threading

import numpy as np
import pytest

from igpt_jax import errors
from igpt_jax.data import palette as palette_lib
from igpt_jax.data import palette_fit
from igpt_jax.jobs import fit_palette
from support.paths import SHARED

RNG = np.random.default_rng(3)


def _golden(name):
  path = SHARED / "golden" / "palette" / name
  if not path.is_file():
    pytest.skip(f"no {path}: parity with the original's palette is NOT checked here")
  return np.load(path, allow_pickle=False)


def _brute_force(colors, levels):
  """Nearest of whole-numbered levels in whole numbers, lowest index first."""
  difference = colors[:, None].astype(np.int64) - levels[None].astype(np.int64)
  return np.square(difference).sum(-1).argmin(-1)


@pytest.mark.parametrize("k", [1, 17, 512, 1500])
def test_uint8_palette_is_exact_with_ties_to_the_lowest(k):
  levels = RNG.integers(0, 256, (k, 3), np.uint8)
  palette = palette_lib.Palette.from_uint8(np.concatenate([levels, levels[:5]]))
  assert palette.is_uint8
  colors = RNG.integers(0, 256, (4000, 3), np.uint8)
  tokens = palette.encode(colors)
  assert tokens.dtype == np.uint16
  np.testing.assert_array_equal(tokens, _brute_force(colors, palette.colors))
  np.testing.assert_array_equal(palette.encode(colors), tokens)  # from the table


def test_distances_to_far_colours_do_not_overflow():
  """178² fits 16 bits with a sign, 182² doesn't."""
  colors = np.array([[178, 0, 0], [0, 182, 0]], np.uint8)
  for levels in (colors, colors[::-1]):
    found = palette_lib.Palette.from_uint8(levels).encode(np.zeros((1, 3), np.uint8))
    np.testing.assert_array_equal(levels[found], colors[:1])


def test_round_trip_of_its_own_colours():
  levels = np.unique(RNG.integers(0, 256, (600, 3), np.uint8), axis=0)
  palette = palette_lib.Palette.from_uint8(levels)
  np.testing.assert_array_equal(palette.decode(palette.encode(levels)), levels)
  np.testing.assert_array_equal(palette.encode(levels), np.arange(len(levels)))


def test_golden_random_palette():
  golden = _golden("palette.npz")
  palette = palette_lib.Palette(golden["clusters"])
  tokens = palette.encode(golden["images"]).reshape(6, -1)
  clear = golden["gap"] > 1e-6
  np.testing.assert_array_equal(tokens[clear], golden["tokens_hf"][clear])
  np.testing.assert_array_equal(tokens[clear], golden["tokens_exact"][clear])
  assert clear.mean() > 0.99
  decoded = palette.decode(golden["tokens_hf"]).reshape(golden["decoded"].shape)
  np.testing.assert_array_equal(decoded, golden["decoded"])


def test_golden_palette_of_the_original():
  golden = _golden("openai_palette_cifar.npz")
  palette = palette_lib.Palette(golden["clusters"])
  tokens = palette.encode(golden["images"]).reshape(8, -1)
  np.testing.assert_array_equal(tokens, golden["tokens"])


def test_threads_share_the_table():
  palette = palette_lib.Palette.from_uint8(RNG.integers(0, 256, (64, 3), np.uint8))
  colors = RNG.integers(0, 256, (20000, 3), np.uint8)
  expected = _brute_force(colors, palette.colors)
  results = [None] * 8

  def work(i):
    results[i] = palette.encode(colors)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for tokens in results:
    np.testing.assert_array_equal(tokens, expected)


def test_save_and_load(tmp_path):
  palette = palette_lib.Palette(RNG.uniform(-1, 1, (30, 3)).astype(np.float32))
  palette.save(tmp_path / "deep" / "palette.npy")
  loaded = palette_lib.Palette.load(tmp_path / "deep" / "palette.npy")
  assert loaded == palette
  assert os.listdir(tmp_path / "deep") == ["palette.npy"]


@pytest.mark.parametrize(
  ("array", "says"),
  [
    (np.zeros((512, 4), np.float32), r"\[512, 4\]"),
    (np.zeros((0, 3), np.float32), r"\[0, 3\]"),
    (np.zeros(512, np.float32), r"\[512\]"),
    (np.full((4, 3), np.nan, np.float32), "NaN"),
    (np.full((4, 3), 255.0, np.float32), r"255.*\[-1, 1\]"),
    (np.zeros((4, 3), np.uint8), "uint8"),
    (np.array([None, {}], dtype=object), "[Pp]ickle"),
  ],
)
def test_no_palette_is_refused_by_name(tmp_path, array, says):
  np.save(tmp_path / "wrong.npy", array, allow_pickle=True)
  with pytest.raises(errors.UserError, match=says) as caught:
    palette_lib.Palette.load(tmp_path / "wrong.npy")
  assert "wrong.npy" in str(caught.value)


def test_missing_and_foreign_files_are_refused_by_name(tmp_path):
  (tmp_path / "text.npy").write_text("hello")
  (tmp_path / "empty.npy").write_bytes(b"")
  np.savez(tmp_path / "many.npz", a=np.zeros((3, 3), np.float32))
  for name in ("text.npy", "empty.npy", "many.npz", "absent.npy"):
    with pytest.raises(errors.UserError, match=name):
      palette_lib.Palette.load(tmp_path / name)


def _pictures(n, seed):
  rng = np.random.default_rng(seed)
  base = rng.dirichlet([1, 1, 1], n * 16) * rng.gamma(4, 60, (n * 16, 1))
  noise = rng.normal(0, 12, (n * 16, 64, 3))
  return (base[:, None] + noise).clip(0, 255).astype(np.uint8).reshape(n, 32, 32, 3)


def test_few_colours_are_taken_as_they_are():
  levels = np.array([[200, 10, 10], [0, 0, 0], [255, 255, 255], [10, 10, 200]], np.uint8)
  images = levels[RNG.integers(0, 4, (5, 8, 8))]
  palette = palette_fit.fit_palette([images], 16)
  np.testing.assert_array_equal(palette.colors, levels[[1, 3, 0, 2]])  # dark to bright
  error = palette_fit.palette_error(palette, [images])
  assert error.mse == 0 and error.psnr == np.inf and error.n_pixels == 320


def test_a_colour_counts_as_often_as_it_is_there():
  levels = np.repeat(np.array([[0, 20, 40], [100, 20, 240]], np.uint8), [300, 100], axis=0)
  np.testing.assert_array_equal(palette_fit.fit_palette([levels], 1).colors, [[25, 20, 90]])


def test_fit_is_good_distinct_and_repeatable():
  train, held_out = _pictures(40, 0), _pictures(10, 1)
  palette = palette_fit.fit_palette([train[:20], train[20:]], 64)
  assert palette.size == 64 and palette.is_uint8
  assert len(np.unique(palette.colors, axis=0)) == 64
  assert palette == palette_fit.fit_palette([train], 64)
  fitted = palette_fit.palette_error(palette, [held_out])
  pixels = train.reshape(-1, 3)
  chosen = palette_lib.Palette.from_uint8(pixels[RNG.choice(len(pixels), 64, replace=False)])
  guessed = palette_fit.palette_error(chosen, [held_out])
  assert fitted.mse < 0.8 * guessed.mse
  histogram = palette_fit.ColorHistogram()
  histogram.add(train)
  centers = palette_fit._cluster(*histogram.colors(), 64, 0)  # as they are before rounding
  exact = palette_lib.Palette((centers / 127.5 - 1).clip(-1, 1).astype(np.float32))
  assert not exact.is_uint8
  assert palette_fit.palette_error(exact, [held_out]).mse < fitted.mse * 1.01


def test_rounding_never_loses_a_colour():
  # 300 neighbouring greys-to-blues and a few outliers: rounded means collide.
  ramp = np.stack([np.full(256, 100), np.full(256, 100), np.arange(256)], -1).astype(np.uint8)
  images = np.concatenate([np.repeat(ramp, 50, 0), RNG.integers(0, 256, (60, 3), np.uint8)])
  palette = palette_fit.fit_palette([images], 280)
  assert palette.size == 280
  assert len(np.unique(palette.colors, axis=0)) == 280


def test_histogram_counts_every_pixel():
  images = RNG.integers(0, 4, (30, 16, 16, 3), np.uint8)
  histogram = palette_fit.ColorHistogram()
  for image in images:
    histogram.add(image)
  colors, counts = histogram.colors()
  expected, expected_counts = np.unique(images.reshape(-1, 3), axis=0, return_counts=True)
  assert counts.sum() == histogram.n_pixels == images.size // 3
  assert dict(zip(map(tuple, colors), counts, strict=True)) == dict(
    zip(map(tuple, expected), expected_counts, strict=True)
  )


def test_nothing_to_fit():
  with pytest.raises(errors.UserError, match="no images"):
    palette_fit.fit_palette([], 8)
  with pytest.raises(errors.UserError, match="0"):
    palette_fit.fit_palette([np.zeros((1, 3), np.uint8)], 0)


def test_default_palette():
  palette = palette_lib.Palette.default()
  assert palette == palette_lib.Palette.from_setting("default")
  assert palette.size == 512 and palette.is_uint8
  assert len(np.unique(palette.colors, axis=0)) == 512
  # Fine enough for natural colours: no colour between black and white is far from one of it.
  greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
  assert np.abs(palette.decode(palette.encode(greys)).astype(int) - greys).max() <= 12


def test_grey_pictures_get_grey_palettes():
  grey = np.random.default_rng(0).normal(120, 50, (20, 32, 32, 1)).clip(0, 255).astype(np.uint8)
  images = np.repeat(grey, 3, -1)
  palette = palette_fit.fit_palette([images], 32)
  assert palette.size == 32
  assert (palette.colors == palette.colors[:, :1]).all()
  assert (np.diff(palette.colors[:, 0].astype(int)) > 0).all()
  assert palette_fit.palette_error(palette, [images]).mse < 8


def test_finer_palettes_err_less():
  images = _pictures(30, 0)
  errors_ = []
  for k in (128, 1024):
    palette = palette_fit.fit_palette([images], k)
    assert palette.size == k
    errors_.append(palette_fit.palette_error(palette, [images]).mse)
  assert errors_[1] < errors_[0] / 2


@pytest.mark.parametrize("k", [5, 32, 33, 64, 75])
def test_swatches_are_the_colours_and_no_other_square_can_be_taken_for_one(k):
  colors = np.random.default_rng(k).integers(0, 256, (k, 3), np.uint8)
  colors[0] = 255
  image = fit_palette.swatches(colors)
  columns = min(k, 32)
  assert image.shape == (-(-k // columns) * 16, columns * 16, 3)
  squares = image.reshape(-1, 16, columns, 16, 3).swapaxes(1, 2).reshape(-1, 16 * 16, 3)
  np.testing.assert_array_equal(squares[:k], np.repeat(colors[:, None], 256, axis=1))
  assert all(len(np.unique(square, axis=0)) == 2 for square in squares[k:])
