"""Tokens: what a model's positions hold, and the one place that knows the kinds. Ground floor.

  kind       positions of a pixel   codes of a position           vocabulary of a code
  palette    1                      1: its colour                 colours of the palette
  channels   1                      3: its red, green and blue    256 levels
  subpixels  3: red, green, blue    1: that channel's level       256 levels

A token is what a position holds: with `channels` three codes. Losses are nats per token, so that `channels`
counts the three codes of a pixel together, and `subpixels` each by itself. Bits per dimension are per code of
raw RGB and the same figure for both: exact, without a palette, and without noise added to the levels.

Rooms ask a `TokenSpec`, never the kind by its name.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from igpt_jax.errors import UserError

if TYPE_CHECKING:
  import numpy as np

PALETTE = "palette"
LEVELS = 256  # of a channel
_CHANNELS = 3  # red, green, blue, in this order

# Kind -> codes of a position, positions of a pixel.
_LAYOUTS = {PALETTE: (1, 1), "channels": (_CHANNELS, 1), "subpixels": (1, _CHANNELS)}
KINDS = tuple(_LAYOUTS)


@dataclasses.dataclass(frozen=True)
class TokenSpec:
  """Tokens of a kind: their shape, how images become tokens and tokens images, their unit of likelihood.

  Attributes:
    kind: one of KINDS.
    n_vocab: values of a code.
    palette: the `data.palette.Palette` of the colours that tokens stand for; None: unknown, or raw RGB.

  Raises:
    UserError: there is no such kind, or it has other values.
  """

  kind: str = PALETTE
  n_vocab: int = 512
  palette: Any = None

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"data.token_kind: {self.kind!r}; expected one of {', '.join(KINDS)}")
    if not self.needs_palette and (self.n_vocab != LEVELS or self.palette is not None):
      raise UserError(
        f"data.token_kind: {self.kind} has codes of {LEVELS} levels and no palette, not {self.n_vocab} "
        "colours; expected data.token_kind=palette"
      )

  @property
  def needs_palette(self) -> bool:
    """True if tokens stand for the colours of a palette, not for levels of raw RGB."""
    return self.kind == PALETTE

  @property
  def codes(self) -> int:
    """Codes of a position."""
    return _LAYOUTS[self.kind][0]

  @property
  def per_pixel(self) -> int:
    """Positions of a pixel."""
    return _LAYOUTS[self.kind][1]

  @property
  def rows(self) -> int:
    """Rows of a table with one for each value of each code of a position."""
    return self.codes * self.n_vocab

  @property
  def values(self) -> str:
    """What the codes are, in words, such as "512 colours"."""
    if self.needs_palette:
      return f"{self.n_vocab} colours"
    levels = f"{self.n_vocab} levels"
    return f"{self.codes} × {levels}" if self.codes > 1 else levels

  def n_positions(self, resolution: int) -> int:
    """Positions of a square image."""
    return resolution**2 * self.per_pixel

  def side(self, n_positions: int) -> int:
    """Height and width of the square image with so many positions, rounded down."""
    return math.isqrt(n_positions // self.per_pixel)

  def is_square(self, n_positions: int) -> bool:
    """True if a square image has so many positions."""
    return self.n_positions(self.side(n_positions)) == n_positions

  def shape(self, n_positions: int) -> tuple[int, ...]:
    """Shape of the tokens of an image, [T] or, where a position has several codes, [T, codes]."""
    return (n_positions, self.codes) if self.codes > 1 else (n_positions,)

  def encode(self, images: "np.ndarray") -> "np.ndarray":
    """Maps uint8 [..., H, W, 3] to tokens in raster order, uint16 [..., *shape(T)].

    Raises:
      ValueError: the palette isn't known.
    """
    if not self.needs_palette:
      coded = images.astype("uint16")
    elif self.palette is not None:
      coded = self.palette.encode(images)
    else:
      raise ValueError("tokens of a palette that isn't known")
    *batch, height, width, _ = images.shape
    return coded.reshape(*batch, *self.shape(height * width * self.per_pixel))

  def decode(self, tokens: "np.ndarray") -> "np.ndarray":
    """Inverts `encode` for square images: uint8 [..., R, R, 3]; of a palette, its colours.

    Raises:
      ValueError: the palette isn't known.
    """
    batch = tokens.shape[:-1] if self.codes == 1 else tokens.shape[:-2]
    side = self.side(tokens.shape[len(batch)])
    if not self.needs_palette:
      return tokens.astype("uint8").reshape(*batch, side, side, _CHANNELS)
    if self.palette is None:
      raise ValueError("tokens of a palette that isn't known")
    return self.palette.decode(tokens).reshape(*batch, side, side, _CHANNELS)

  def of_pixels(self, values: "np.ndarray") -> "np.ndarray":
    """Maps a value of every pixel [..., H, W] to one of every position [..., T]."""
    return values.reshape(*values.shape[:-2], -1).repeat(self.per_pixel, axis=-1)

  def whole_pixels(self, settled: "np.ndarray") -> "np.ndarray":
    """Maps bool [..., T] to [..., pixels]: True where all positions of a pixel are."""
    return settled.reshape(*settled.shape[:-1], -1, self.per_pixel).min(axis=-1)

  def bits_per_dim(self, nats_per_token: float) -> float | None:
    """Bits per dimension of raw RGB; None for a palette, whose tokens aren't RGB."""
    return None if self.needs_palette else nats_per_token / (self.codes * math.log(2))


def spec_of(kind: str, n_colours: int, palette: Any = None) -> TokenSpec:
  """Returns the tokens of a kind; `n_colours` and `palette` are a palette's, and of no use to others."""
  if kind != PALETTE:
    return TokenSpec(kind, LEVELS)
  return TokenSpec(kind, n_colours if palette is None else palette.size, palette)


def over_codes(values: Any, tokens: Any) -> Any:
  """Returns values of positions [..., T] that broadcast to tokens [..., T] or [..., T, codes]."""
  return values if values.ndim == tokens.ndim else values[..., None]
