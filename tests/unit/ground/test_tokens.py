"""What a token is: images there and back, the order of codes, the unit of likelihood, and who may ask."""

import math

import numpy as np
import pytest

from igpt_jax.data.palette import Palette
from igpt_jax.errors import UserError
from igpt_jax.tokens import KINDS, TokenSpec, over_codes, spec_of

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), np.uint8)
GREY = Palette.from_uint8(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1))
SHAPES = {"palette": (16,), "channels": (16, 3), "subpixels": (48,)}
DIMENSIONS = {"channels": 3, "subpixels": 1}  # of a token


def spec(kind):
  return spec_of(kind, 256, GREY if kind == "palette" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_images_come_back(kind):
  images = IMAGES if kind != "palette" else GREY.decode(IMAGES[..., 0])
  tokens = spec(kind).encode(images)
  assert tokens.shape == (2, 3, *SHAPES[kind]) and tokens.dtype == np.uint16
  assert SHAPES[kind] == spec(kind).shape(spec(kind).n_positions(4))
  decoded = spec(kind).decode(tokens.astype(np.int32))
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, images)


def test_the_palettes_tokens_are_what_they_were():
  expected = GREY.encode(IMAGES).reshape(2, 3, 16)
  np.testing.assert_array_equal(spec("palette").encode(IMAGES), expected)


@pytest.mark.parametrize("kind", ["channels", "subpixels"])
def test_codes_are_red_green_blue_of_pixels_in_raster_order(kind):
  image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  tokens = spec(kind).encode(image)
  np.testing.assert_array_equal(tokens.reshape(-1), np.arange(12))
  assert tokens.shape == ((4, 3) if kind == "channels" else (12,))


@pytest.mark.parametrize("kind", ["channels", "subpixels"])
def test_equally_likely_levels_are_eight_bits_a_dimension(kind):
  dimensions = DIMENSIONS[kind]
  assert spec(kind).bits_per_dim(dimensions * math.log(256)) == pytest.approx(8, abs=1e-12)
  image_bits = spec(kind).n_positions(4) * dimensions * math.log(256) / math.log(2)
  assert image_bits == pytest.approx(4 * 4 * 3 * 8)


def test_a_palette_has_no_bits_per_dimension():
  assert spec("palette").bits_per_dim(1.0) is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_holds_of_pixels_holds_of_their_positions(kind):
  known = np.random.default_rng(1).random((4, 4)) < 0.5
  of_positions = spec(kind).of_pixels(known)
  assert of_positions.shape == (spec(kind).n_positions(4),)
  np.testing.assert_array_equal(spec(kind).whole_pixels(of_positions), known.reshape(-1))
  image = spec(kind).encode(np.where(known[..., None], np.uint8(200), np.uint8(0)).repeat(3, 2))
  seen = image.reshape(len(of_positions), -1) > 0
  np.testing.assert_array_equal(seen, np.broadcast_to(of_positions[:, None], seen.shape))


def test_a_pixel_of_which_a_part_is_missing_isnt_whole():
  settled = np.array([True, True, False, True, True, True])
  np.testing.assert_array_equal(spec("subpixels").whole_pixels(settled), [False, True])


def test_masks_reach_over_codes():
  mask = np.zeros((2, 16), bool)
  assert over_codes(mask, np.zeros((2, 16))).shape == (2, 16)
  assert over_codes(mask, np.zeros((2, 16, 3))).shape == (2, 16, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_side_of_an_image(kind):
  tokens = spec(kind)
  assert [tokens.side(tokens.n_positions(side)) for side in range(1, 20)] == list(range(1, 20))
  assert tokens.is_square(tokens.n_positions(5)) and not tokens.is_square(tokens.n_positions(5) + 1)


def test_what_isnt_a_kind_is_refused():
  with pytest.raises(UserError, match=r"data.token_kind: 'colours'; expected one of palette, chan"):
    TokenSpec("colours")
  with pytest.raises(UserError, match=r"data.token_kind: subpixels has codes of 256 levels and no"):
    TokenSpec("subpixels", 512)
  with pytest.raises(ValueError, match="a palette that isn't known"):
    TokenSpec().encode(IMAGES)
