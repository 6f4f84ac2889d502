"""JPEGs made from random numbers, of ImageNet's usual size, to time decoding and cropping without a data set."""

import functools
import hashlib
import io
from typing import Any

import numpy as np
from PIL import Image

from igpt_jax.data.sources import Split

# ImageNet's training images have about 110 kB on average, and most often these pixels.
WIDTH, HEIGHT = 500, 375
_QUALITY = 86  # with which they have about as many bytes
_MEAN, _CONTRAST = 118.0, 55.0  # of pixels, 0 to 255


class _MadeRecords:
  """Images in memory, as a prepared data set stores them."""

  class_names = ()

  def __init__(self, images: list[bytes]):
    self._images = images
    self.name = self.former_name = f"made JPEGs of {WIDTH}×{HEIGHT}, in memory"
    self.identity = hashlib.sha256(b"".join(images)).hexdigest()[:16]

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self._images[index], "label": -1, "id": f"made[{index}]"}


@functools.cache
def split(n_images: int) -> Split:
  """Returns a train split of so many images, the same ones every time."""
  rng = np.random.default_rng(0)
  records = _MadeRecords([_jpeg(rng) for _ in range(n_images)])
  return Split(records, np.arange(n_images, dtype=np.int32), "train")


def _jpeg(rng: np.random.Generator) -> bytes:
  """Returns an image whose contrast falls with frequency as photographs' does, and whose colours agree."""
  rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
  frequency = np.hypot(rows, columns)
  frequency[0, 0] = np.inf  # no constant part
  grey = rng.standard_normal((HEIGHT, WIDTH))
  channels = []
  for _ in range(3):
    noise = 0.8 * grey + 0.6 * rng.standard_normal((HEIGHT, WIDTH))
    smooth = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (HEIGHT, WIDTH))
    channels.append(_MEAN + _CONTRAST * smooth / smooth.std())
  pixels = np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)
  encoded = io.BytesIO()
  Image.fromarray(pixels).save(encoded, "JPEG", quality=_QUALITY)
  return encoded.getvalue()
