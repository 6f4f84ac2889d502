"""Decoding follows TFDS, crops follow the paper, and damage is an error that names the record."""

import io
import math
import tarfile

import cv2
import numpy as np
import pytest
from PIL import Image

from igpt_jax import errors
from igpt_jax.data import image_decoding, palette, transforms
from support.paths import SHARED

RNG = np.random.default_rng(7)
SMOOTH = cv2.resize(
  RNG.integers(0, 256, (6, 8, 3), np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC
)


def _encode(array, kind="png", mode=None, **options):
  picture = Image.fromarray(array)
  if mode:
    picture = picture.convert(mode)
  file = io.BytesIO()
  picture.save(file, kind, **options)
  return file.getvalue()


def test_png_is_exact():
  np.testing.assert_array_equal(image_decoding.decode(_encode(SMOOTH)), SMOOTH)


def test_jpeg_equals_pillow():
  data = _encode(SMOOTH, "jpeg", quality=90)
  np.testing.assert_array_equal(
    image_decoding.decode(data), np.asarray(Image.open(io.BytesIO(data)))
  )


def test_grey_is_repeated():
  grey = SMOOTH[..., 0]
  np.testing.assert_array_equal(image_decoding.decode(_encode(grey)), np.stack([grey] * 3, -1))
  jpeg = image_decoding.decode(_encode(grey, "jpeg", quality=95))
  assert jpeg.shape == SMOOTH.shape
  assert (jpeg[..., 0] == jpeg[..., 2]).all()
  assert np.abs(jpeg[..., 0].astype(int) - grey).mean() < 3


def test_alpha_is_dropped_not_composited():
  alpha = RNG.integers(0, 256, (*SMOOTH.shape[:2], 1), np.uint8)
  data = _encode(np.concatenate([SMOOTH, alpha], -1))
  np.testing.assert_array_equal(image_decoding.decode(data), SMOOTH)
  grey_alpha = np.concatenate([SMOOTH[..., :1], alpha], -1)
  np.testing.assert_array_equal(
    image_decoding.decode(_encode(grey_alpha)), np.repeat(SMOOTH[..., :1], 3, -1)
  )


def test_sixteen_bits_keep_the_high_byte():
  grey = RNG.integers(0, 65536, (20, 30), np.uint16)
  decoded = image_decoding.decode(_encode(grey))
  np.testing.assert_array_equal(decoded, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1))
  color = RNG.integers(0, 65536, (20, 30, 3), np.uint16)
  data = cv2.imencode(".png", color[..., ::-1])[1].tobytes()
  np.testing.assert_array_equal(image_decoding.decode(data), (color >> 8).astype(np.uint8))


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg(adobe):
  data = _encode(SMOOTH, "jpeg", mode="CMYK", quality=98, subsampling=0)
  if not adobe:
    data = _encode(255 - np.asarray(Image.fromarray(SMOOTH).convert("CMYK")), "tiff")
    ink = 255 - np.asarray(Image.open(io.BytesIO(data)))
    file = io.BytesIO()
    Image.fromarray(ink, "CMYK").save(file, "jpeg", quality=98, subsampling=0)
    data = file.getvalue()
    start = data.index(b"\xff\xee")
    length = int.from_bytes(data[start + 2 : start + 4], "big") + 2
    # Without the Adobe segment the stored values are plain ink, so plain ink must be stored.
    inverted = io.BytesIO()
    Image.fromarray(255 - ink, "CMYK").save(inverted, "jpeg", quality=98, subsampling=0)
    data = inverted.getvalue()
    data = data[:start] + data[start + length :]
  decoded = image_decoding.decode(data)
  assert np.abs(decoded.astype(int) - SMOOTH).mean() < 4


def test_exif_rotation_is_ignored():
  exif = Image.Exif()
  exif[0x0112] = 6
  data = _encode(SMOOTH, "jpeg", exif=exif.tobytes())
  assert image_decoding.decode(data).shape == SMOOTH.shape


def test_palette_and_bilevel_and_named_otherwise():
  for mode in ("P", "1"):
    data = _encode(SMOOTH, mode=mode)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(image_decoding.decode(data, "really.JPEG"), expected)


def test_arrays():
  np.testing.assert_array_equal(image_decoding.decode(SMOOTH), SMOOTH)
  assert image_decoding.decode(SMOOTH[..., 0]).shape == SMOOTH.shape
  with pytest.raises(image_decoding.BadRecord, match=r"rec7.*float64"):
    image_decoding.decode(SMOOTH / 255.0, "rec7")


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_truncated_is_named(kind):
  data = _encode(SMOOTH, kind)
  for share in (0.0, 0.02, 0.3, 0.9):
    with pytest.raises(image_decoding.BadRecord, match="n01440764_tench"):
      image_decoding.decode(data[: int(len(data) * share)], "n01440764_tench")


def test_giant_header_is_refused_before_memory_is_spent():
  data = bytearray(_encode(SMOOTH, "jpeg"))
  frame = data.index(b"\xff\xc0")
  data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
  with pytest.raises(image_decoding.BadRecord, match=r"implausible size|exceeds limit"):
    image_decoding.decode(bytes(data))


def test_literal_crop_is_the_papers_words():
  image = cv2.resize(SMOOTH, (500, 375))
  crop = transforms.PaperCrop(300, 400, 20, 110)
  resized = np.asarray(Image.fromarray(image).resize((400, 300), Image.Resampling.BILINEAR))
  window = resized[20:244, 110:334].astype(np.float64)
  expected = window.reshape(32, 7, 32, 7, 3).mean((1, 3))
  got = transforms.crop_literal(image, crop, 32)
  assert np.abs(got - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (96, 96), (224, 3000)])
def test_drawn_crops_are_valid_and_reach_the_edges(size):
  rng = np.random.default_rng(0)
  lefts, sides = [], []
  for _ in range(400):
    crop = transforms.draw_paper_crop(rng, *size)
    assert 256 <= min(crop.height, crop.width) <= 384
    assert abs(crop.width * size[0] / size[1] - crop.height) < 1  # not squeezed
    assert 0 <= crop.top <= crop.height - 224 and 0 <= crop.left <= crop.width - 224
    left, top, right, bottom = crop.source_box(*size)
    assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
    lefts.append(crop.left / (crop.width - 224))
    sides.append(min(crop.height, crop.width))
  assert min(lefts) < 0.05 and max(lefts) > 0.95
  assert min(sides) < 260 and max(sides) > 380


def test_every_short_side_is_drawn_and_offsets_evenly_to_the_last_one():
  rng = np.random.default_rng(0)
  crops = [transforms.draw_paper_crop(rng, 300, 300) for _ in range(20_000)]
  assert {crop.height for crop in crops} == set(range(256, 385))
  left_over = np.array([crop.height - 224 for crop in crops])
  for offsets in (np.array([c.top for c in crops]), np.array([c.left for c in crops])):
    # Of 129 sides the mean share of one offset is 1 in 88: 227 times each, give or take 15.
    assert 150 < (offsets == left_over).sum() < 300
    assert 150 < (offsets == 0).sum() < 300
    assert abs(np.mean(offsets / left_over) - 0.5) < 0.01


@pytest.mark.parametrize("resample", transforms.RESAMPLINGS)
def test_the_paper_s_crops_reach_the_last_row_and_column(resample, monkeypatch):
  monkeypatch.setattr(transforms, "PAPER_SHORT_SIDE", (226, 226))
  image = RNG.integers(0, 256, (226, 226, 3), np.uint8)
  windows = {
    image[top : top + 224, left : left + 224].tobytes() for top in range(3) for left in range(3)
  }
  rng = np.random.default_rng(0)
  seen = {transforms.paper_train(image, rng, 224, resample).tobytes() for _ in range(200)}
  assert seen == windows
  if resample == "fused":
    data = _encode(image)
    seen = {transforms.paper_train_encoded(data, rng, 224).tobytes() for _ in range(100)}
    assert seen == windows


def _photographs():
  """Real images: ImageNet's where a copy lies beside the repository, two that scikit-learn ships."""
  from sklearn import datasets

  pictures = list(datasets.load_sample_images().images)
  archive = SHARED / "data" / "imagenet-sample.tar"
  if archive.is_file():
    with tarfile.open(archive) as tar:
      files = [m for m in tar if m.isfile()][:40]
      pictures += [image_decoding.decode(tar.extractfile(m).read(), m.name) for m in files]
  return pictures


# Mean absolute error in levels, PSNR in dB, share of equal tokens. Measured on ImageNet's: 0.13, 56.9,
# 97.3%; 0.44, 49.8, 92.4%; 0.60, 47.2, 90.1%.
@pytest.mark.parametrize(
  ("resolution", "mae", "psnr", "same"),
  [(32, 0.16, 55.5, 0.96), (48, 0.5, 48.5, 0.91), (64, 0.68, 45.5, 0.89)],
)
def test_fused_crop_is_close_to_the_two_steps_on_the_same_box(resolution, mae, psnr, same):
  rng = np.random.default_rng(0)
  colors = palette.Palette.default()
  differences, equal = [], []
  for image in _photographs():
    for _ in range(3):
      crop = transforms.draw_paper_crop(rng, *image.shape[:2])
      fused = transforms.crop_fused(image, crop, resolution)
      box = crop.source_box(*image.shape[:2])
      resized = transforms._resize_box(image, box, transforms.PAPER_CROP)
      two_step = transforms.resize_area(resized, resolution, resolution)
      differences.append((fused.astype(np.float64) - two_step).ravel())
      equal.append((colors.encode(fused) == colors.encode(two_step)).mean())
  differences = np.concatenate(differences)
  assert np.abs(differences).mean() < mae
  assert 10 * np.log10(255**2 / np.square(differences).mean()) > psnr
  assert np.mean(equal) > same


def test_fused_crop_stays_within_half_a_pixel_of_the_literal_one():
  rng = np.random.default_rng(0)
  for height, width in ((375, 500), (500, 333), (96, 180), (1200, 1600)):
    for _ in range(200):
      crop = transforms.draw_paper_crop(rng, height, width)
      left, top, right, bottom = crop.source_box(height, width)
      exact_left = crop.left * width / crop.width
      exact_top = crop.top * height / crop.height
      assert abs(left - exact_left) <= 0.5 + 1e-9 or right == width
      assert abs(top - exact_top) <= 0.5 + 1e-9 or bottom == height
      assert abs(right - left - 224 * width / crop.width) <= 0.5 + 1e-9
      assert abs(bottom - top - 224 * height / crop.height) <= 0.5 + 1e-9


@pytest.mark.parametrize(
  ("kind", "options"),
  [
    ("jpeg", {"subsampling": 0}),
    ("jpeg", {"subsampling": 1}),
    ("jpeg", {"subsampling": 2, "quality": 60}),
    ("jpeg", {"progressive": True}),
    ("jpeg", {"restart_marker_rows": 1}),
    ("jpeg", {"mode": "L"}),
    ("jpeg", {"mode": "CMYK"}),
    ("png", {}),
  ],
)
def test_decoding_only_what_the_crop_needs_changes_nothing(kind, options):
  image = cv2.resize(SMOOTH, (333, 501))
  image = (image + RNG.normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8)
  data = _encode(image, kind, **options)
  whole = image_decoding.decode(data)
  for seed in range(40):
    expected = transforms.paper_train(whole, np.random.default_rng(seed), 32)
    got = transforms.paper_train_encoded(data, np.random.default_rng(seed), 32)
    np.testing.assert_array_equal(got, expected)


def test_decoding_only_what_the_crop_needs_still_notices_truncation():
  data = _encode(cv2.resize(SMOOTH, (333, 501)), "jpeg")
  with pytest.raises(image_decoding.BadRecord, match="rec9"):
    transforms.paper_train_encoded(data[:-500], np.random.default_rng(0), 32, "rec9")


@pytest.mark.parametrize("resolution", [32, 48, 64])
def test_paper_eval_is_a_centre_crop(resolution):
  image = np.zeros((448, 896, 3), np.uint8)
  image[:, 224:672] = 200  # exactly the centre square
  out = transforms.paper_eval(image, resolution)
  assert out.shape == (resolution, resolution, 3)
  assert (out[:, 1:-1] == 200).all()


def test_an_image_of_the_models_own_size_is_not_resized():
  image = RNG.integers(0, 256, (8, 8, 3), np.uint8)
  wide = np.pad(image, ((0, 0), (2, 3), (0, 0)))
  for augment in transforms.AUGMENTATIONS:
    evaluate = transforms.eval_transform(augment, 8)
    np.testing.assert_array_equal(evaluate(image), image)
    np.testing.assert_array_equal(evaluate(wide), image)
    np.testing.assert_array_equal(evaluate(wide.swapaxes(0, 1)), image.swapaxes(0, 1))


def test_a_crop_is_what_a_resize_of_the_whole_image_gives_there():
  rng = np.random.default_rng(0)
  for size in ((375, 500), (500, 333), (96, 180), (30, 900), (1, 40), (224, 224)):
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    for _ in range(3):
      crop = transforms.draw_paper_crop(rng, *size)
      whole = Image.fromarray(image).resize((crop.width, crop.height), Image.Resampling.BILINEAR)
      window = np.asarray(whole, np.int16)[crop.top :, crop.left :][:224, :224]
      difference = np.abs(transforms.crop_literal(image, crop, 224) - window)
      assert difference.max() <= 2 and difference.mean() < 0.3  # Pillow's rounding


def test_cifar_augmentation_shifts_and_mirrors():
  image = RNG.integers(0, 256, (32, 32, 3), np.uint8)
  padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
  windows = {}
  for top in range(9):
    for left in range(9):
      window = padded[top : top + 32, left : left + 32]
      windows[window.tobytes()] = (top, left, False)
      windows[window[:, ::-1].tobytes()] = (top, left, True)
  rng = np.random.default_rng(0)
  seen = {windows[transforms.cifar_train(image, rng, 32).tobytes()] for _ in range(2000)}
  assert len(seen) == 162


@pytest.mark.parametrize(("side", "reach"), [(4, 1), (8, 1), (16, 2), (33, 4)])
def test_shift_moves_by_up_to_an_eighth_over_black(side, reach):
  image = RNG.integers(1, 256, (side, side, 3), np.uint8)
  padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)))
  places = [(top, left) for top in range(2 * reach + 1) for left in range(2 * reach + 1)]
  windows = {padded[t : t + side, x : x + side].tobytes(): (t, x) for t, x in places}
  rng = np.random.default_rng(0)
  seen = [windows[transforms.shift_train(image, rng, side).tobytes()] for _ in range(2000)]
  assert set(seen) == set(places)
  assert 0.4 < np.mean([s == (reach, reach) for s in seen]) < 0.65  # every other one stays


@pytest.mark.parametrize(("height", "width"), [(20, 20), (20, 31), (1, 3)])
def test_photos_are_cropped_anywhere_and_mirrored(height, width):
  """Crops of an image whose pixels tell their place: 70 to 100% of the shorter side, never past an edge."""
  rows, columns = np.mgrid[:height, :width]
  image = np.stack([rows, columns, rows], -1).astype(np.uint8)
  rng = np.random.default_rng(0)
  sides, lefts, rights, mirrored = set(), set(), set(), []
  most = min(height, width)
  for _ in range(1000):
    crop = transforms.photo_train(image, rng, most)
    assert crop.shape == (most, most, 3)
    left, right = sorted((int(crop[0, 0, 1]), int(crop[0, -1, 1])))
    mirrored.append(crop[0, 0, 1] > crop[0, -1, 1])
    sides.add(int(crop[-1, 0, 0]) - int(crop[0, 0, 0]) + 1)
    lefts.add(left)
    rights.add(right)
  assert max(rights) < width
  assert sides <= set(range(math.ceil(0.7 * most) - 1, most + 1)) and most in sides
  if most > 1:
    assert len(sides) > 3 and 0.4 < np.mean(mirrored) < 0.6
    assert {0, width - most} <= lefts and max(rights) == width - 1


def test_fit():
  image = RNG.integers(0, 256, (32, 32, 3), np.uint8)
  assert transforms.fit(image, 32) is image
  wide = np.concatenate(
    [np.zeros((32, 16, 3), np.uint8), image, np.zeros((32, 16, 3), np.uint8)], 1
  )
  np.testing.assert_array_equal(transforms.fit(wide, 32), image)
  mean = image.reshape(16, 2, 16, 2, 3).mean((1, 3))
  assert np.abs(transforms.fit(image, 16) - mean).max() <= 0.5
  assert transforms.fit(image, 64).shape == (64, 64, 3)


def test_unknown_recipes_are_refused():
  with pytest.raises(errors.UserError, match="papper"):
    transforms.train_transform("papper", 32)
  with pytest.raises(errors.UserError, match="resolution"):
    transforms.eval_transform("paper", 225)
