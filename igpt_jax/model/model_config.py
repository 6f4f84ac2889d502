"""Configuration of a model, and the published models' shapes."""

import dataclasses
from typing import Any

from igpt_jax.errors import UserError
from igpt_jax.model.parametrisation import Scale, scale_of
from igpt_jax.tokens import PALETTE, TokenSpec

REMAT_POLICIES = ("none", "names", "offload", "full")
POSITIONS = ("learned", "axial", "rope2d")
OPTIONS = (
  "positions",
  "qk_norm",
  "value_embeddings",
  "x0_skip",
)  # of which the paper's model has none


@dataclasses.dataclass(frozen=True)
class ImageGPTConfig:
  """Configuration of a model. Parameters are float32 whatever `dtype` is.

  Attributes:
    n_layer, n_head, n_embd: depth, heads, width.
    n_vocab: values of a code, of a palette its colours; also the number of output classes.
    n_positions: positions of an image: its pixels, height × width, or three for each (`tokens`).
    causal: autoregressive, with a start vector; False: BERT, neither shift nor start vector.
    dtype: dtype of activations and matmuls, "float32" or "bfloat16".
    remat: policy of what the backward pass recomputes: "none" keeps all activations, "names" keeps the
      matmuls' and the attention's outputs, "offload" keeps those in the host's memory, "full" keeps
      one vector per block and position.
    attention: one of `attention.dispatch.IMPLEMENTATIONS`.
    positions: "learned", a table of all positions, as in the paper; "axial", the sum of a table of rows
      and one of columns; "rope2d", rotations of queries and keys by row and column, without a table, so
      that the model takes images of any size. Where a pixel has several positions, "learned" is the sum of
      tables of rows, columns and channels (Child et al. 2019, "Generating Long Sequences with Sparse
      Transformers"), and "rope2d" has a table of channels.
    qk_norm: RMS norms of every head's queries and keys, with gains.
    value_embeddings: every block adds a table's row, chosen by the token, to the values (Zhou et al.
      2024, "Value Residual Learning"; tables as in the modded-nanogpt speed runs); the tables begin at 0.
    x0_skip: every block adds the embeddings, times gains that begin at 0, to its input.
    parametrisation: what initial values and learning rates depend on, not what the model computes: one
      of `parametrisation.PARAMETRISATIONS`.
    base_embd, base_layer: complete_p: the shape at which it is the standard one.
    token_kind: what a position holds, one of `igpt_jax.tokens.KINDS`.
  """

  n_layer: int
  n_head: int
  n_embd: int
  n_vocab: int = 512
  n_positions: int = 1024
  causal: bool = True
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  positions: str = "learned"
  qk_norm: bool = False
  value_embeddings: bool = False
  x0_skip: bool = False
  parametrisation: str = "standard"
  base_embd: int = 0
  base_layer: int = 0
  token_kind: str = PALETTE

  def __post_init__(self):
    for name in ("n_layer", "n_head", "n_embd", "n_vocab", "n_positions"):
      if getattr(self, name) < 1:
        raise UserError(f"model.{name}: {getattr(self, name)}; expected a positive number")
    if self.n_vocab < 2:
      raise UserError(
        f"model.n_vocab: {self.n_vocab}; expected 2 colours or more: one is no choice"
      )
    if self.n_embd % self.n_head:
      most = min(self.n_embd, 4_096)  # a width may be any number that a file names
      fits = [h for h in range(1, most + 1) if self.n_embd % h == 0]
      nearest = sorted(sorted(fits, key=lambda h: abs(h - self.n_head))[:3])
      raise UserError(
        f"model.n_embd: {self.n_embd} isn't divisible by model.n_head: {self.n_head}; "
        f"expected heads that divide it, such as {', '.join(map(str, nearest))}"
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(f"model.dtype: {self.dtype!r}; expected 'float32' or 'bfloat16'")
    if self.remat not in REMAT_POLICIES:
      raise UserError(f"model.remat: {self.remat!r}; expected one of {', '.join(REMAT_POLICIES)}")
    if self.positions not in POSITIONS:
      raise UserError(
        f"model.positions: {self.positions!r}; expected one of {', '.join(POSITIONS)}"
      )
    if self.tables_by_place and not self.tokens.is_square(self.n_positions):
      raise UserError(
        f"model.positions: {self.positions} is for square images, not {self.n_positions} positions; "
        "expected learned"
      )
    if self.tokens.per_pixel > 1:
      self._check_several_positions()
    if self.positions == "rope2d" and self.head_dim % 4:
      raise UserError(
        f"model.positions: rope2d takes heads of 4 channels, 8, 12, …, not n_embd / n_head = "
        f"{self.head_dim}; fix: another model.n_head"
      )

    _ = self.scale  # raises if its settings have a mistake

  def _check_several_positions(self) -> None:
    if self.positions == "axial":
      raise UserError(
        f"model.positions: axial; with data.token_kind={self.token_kind} learned positions are tables of rows, "
        "columns and channels already; expected learned or rope2d"
      )
    if not self.causal:
      raise UserError(
        f"objective: masked; with data.token_kind={self.token_kind} a BERT model would predict the channels of a "
        "pixel apart from each other; expected data.token_kind=channels, or objective=autoregressive"
      )

  @property
  def tokens(self) -> TokenSpec:
    """What the positions hold, without the colours of a palette."""
    return TokenSpec(self.token_kind, self.n_vocab)

  @property
  def tables_by_place(self) -> bool:
    """True if positions depend on a pixel's row and column each, so that images must be square."""
    return self.positions != "learned" or self.tokens.per_pixel > 1

  def bits_per_dim(self, nats_per_token: float) -> float | None:
    """Bits per dimension of raw RGB; None for a palette, and for BERT, whose nats are no image's likelihood."""
    return self.tokens.bits_per_dim(nats_per_token) if self.causal else None

  @property
  def scale(self) -> Scale:
    """Ratio of its shape to the base shape."""
    return scale_of(
      self.parametrisation,
      n_embd=self.n_embd,
      n_layer=self.n_layer,
      base_embd=self.base_embd,
      base_layer=self.base_layer,
    )

  @property
  def head_dim(self) -> int:
    return self.n_embd // self.n_head

  @property
  def options(self) -> dict[str, Any]:
    """What makes the model another than the paper's, by name."""
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    values = {name: getattr(self, name) for name in OPTIONS}
    return {name: value for name, value in values.items() if value != defaults[name]}


@dataclasses.dataclass(frozen=True)
class Preset:
  """Shape of a published model and its learning rates (paper, section 3.3 and appendix).

  `remat` is that of CPUs, where it is the fastest; on accelerators it is chosen (training/arrangement.py).
  """

  n_layer: int
  n_embd: int
  n_head: int
  learning_rate: float
  learning_rate_masked: float
  remat: str


# XL's number of heads isn't published. 24 heads of 128 fill the 128 lanes of a TPU's matrix unit
# and of a GPU's fused attention, where S, M, L's own head sizes (64, 128, 96) don't all do.
# BERT learning rates for S, M, L are from the paper's appendix; XL was never trained as BERT and
# takes the autoregressive rate.
PRESETS = {
  "s": Preset(24, 512, 8, 3e-3, 1e-2, "names"),
  "m": Preset(36, 1024, 8, 3e-3, 3e-3, "names"),
  "l": Preset(48, 1536, 16, 1e-3, 1e-3, "names"),
  "xl": Preset(60, 3072, 24, 3e-4, 3e-4, "full"),
}
