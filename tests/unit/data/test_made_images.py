"""Images that stand for ImageNet's where there are none."""

import io

import numpy as np
from PIL import Image

from igpt_jax.data import image_decoding, made_images, transforms


def test_made_images_are_as_large_as_imagenets():
  split = made_images.split(6)
  sizes = [len(split[i]["image"]) for i in range(6)]
  assert 95_000 < np.mean(sizes) < 125_000  # ImageNet's mean is 110 kB
  with Image.open(io.BytesIO(split[0]["image"])) as image:
    assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
  assert not split.is_tokens and not split.is_folder and len(split) == 6


def test_made_images_are_the_same_every_time():
  first = made_images.split(2)
  made_images.split.cache_clear()
  again = made_images.split(2)
  assert first is not again and first.fingerprint == again.fingerprint
  assert made_images.split(3).fingerprint != first.fingerprint
  assert first[0]["image"] == again[0]["image"] != again[1]["image"]


def test_made_images_are_neither_flat_nor_noise():
  """A small image of it keeps contrast, as a photograph's does, and its channels agree."""
  record = made_images.split(2)[0]
  pixels = image_decoding.decode(record["image"], record["id"]).astype(float)
  small = transforms.eval_transform("paper", 32)(pixels.astype(np.uint8)).astype(float)
  assert 40 < pixels.std() < 70 and small.std() > 0.6 * pixels.std()
  assert np.corrcoef(pixels[..., 0].ravel(), pixels[..., 1].ravel())[0, 1] > 0.5
