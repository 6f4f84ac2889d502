"""What decides a completion: how many rows are given, and the key of each sample."""

import jax
import numpy as np
import pytest

from igpt_jax.sampling import completer
from igpt_jax.sampling.completer import InputImage, prompt_rows


@pytest.mark.parametrize(
  ("keep", "resolution", "rows"),
  [
    (0.5, 32, 16),
    (0.5, 8, 4),
    (0.7, 8, 6),
    (0.55, 8, 4),
    (0.01, 32, 1),
    (0.99, 32, 31),
    (0.3, 4, 1),
  ],
)
def test_the_share_that_is_kept_is_rounded_to_rows(keep, resolution, rows):
  assert prompt_rows(keep, resolution) == rows


def test_a_samples_key_is_of_seed_image_and_number():
  images = [InputImage(name, np.full(16, n, np.int32)) for n, name in enumerate("ab")]

  def keys(images, numbers, padded, seed):
    return np.asarray(jax.random.key_data(completer.sample_keys(images, numbers, padded, seed)))

  found = keys(images, np.arange(3), 6, seed=5)
  assert len({tuple(key) for key in found}) == 6
  # Each by itself, padded or not, by another name, is the same.
  renamed = InputImage("c", images[1].tokens)
  np.testing.assert_array_equal(keys([renamed], np.array([2, 0]), 4, seed=5)[:2], found[[5, 3]])
  assert not np.any(np.all(keys(images, np.arange(3), 6, seed=6) == found, axis=1))
