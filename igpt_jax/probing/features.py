"""Probe features f^l of a split's images: all layers asked for in one forward pass."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import Params, bind
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import sharding
from igpt_jax.training.objectives import draw_visible
from igpt_jax.training.state import param_shardings

_MASK_SEED = 0  # an image's masks are the same in every run


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
  """Features to compute for each image.

  Attributes:
    layers: ascending, from 0 (the first block's input) to n_layer (the final norm's output).
    grid: pixels are averaged within each of grid × grid blocks; the means are concatenated.
    masks: masked inputs of a BERT model to average over; 0: nothing is masked. (A linear classifier's
      mean of logits over masks is its logits of the mean features.)
    mask_probability: probability that a pixel is masked.
  """

  layers: tuple[int, ...]
  grid: int = 1
  masks: int = 0
  mask_probability: float = 0.15


def feature_config(
  model: ImageGPTConfig,
  *,
  layers: tuple[int, ...] = (),
  grid: int = 1,
  masks: int = 0,
  mask_probability: float = 0.15,
) -> FeatureConfig:
  """Checks the features asked of a model; layers=() stands for all layers.

  Raises:
    UserError: the model has no such layer or takes no masks, or the grid doesn't divide its images.
  """
  for layer in layers:
    if not isinstance(layer, int) or not 0 <= layer <= model.n_layer:
      raise UserError(
        f"config.features.layers: {layer!r} of {layers}; expected 0 to {model.n_layer}, the model's layers "
        f"({model.n_layer} is the final norm's output)"
      )
  side = model.tokens.side(model.n_positions)
  if side % grid:
    divisors = [n for n in range(1, side + 1) if side % n == 0]
    raise UserError(
      f"config.features.grid: {grid} doesn't divide the model's {side}×{side} pixels; expected one of "
      f"{', '.join(map(str, divisors))}"
    )
  if masks and model.causal:
    raise UserError(
      f"config.features.masks: {masks}; the checkpoint is autoregressive and takes no masks; expected 0"
    )
  wanted = tuple(sorted(set(layers))) or tuple(range(model.n_layer + 1))
  return FeatureConfig(wanted, grid, masks, mask_probability)


def pooled_features(
  model: ImageGPTConfig, config: FeatureConfig, params: Params, tokens_BxT, index_B
) -> jax.Array:
  """Mean-pooled normed activations (paper, section 2.3), float32 [layers, B, grid² D]."""
  bound, tokens = bind(model, params), tokens_BxT.astype(jnp.int32)
  layers = np.asarray(config.layers)
  if not config.masks:
    return bound.features(tokens, grid=config.grid)[layers]

  def add(total, draw):
    key = jax.random.fold_in(jax.random.key(_MASK_SEED), draw)
    keys_B = jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)
    keep = draw_visible(keys_B, tokens.shape[1], config.mask_probability)
    return total + bound.features(tokens, keep, config.grid)[layers], None

  shape = (len(layers), len(tokens), config.grid**2 * model.n_embd)
  total, _ = jax.lax.scan(add, jnp.zeros(shape, jnp.float32), jnp.arange(config.masks))
  return total / config.masks


@dataclasses.dataclass(frozen=True)
class FeatureRows:
  """Images with their features, the same on every process, in the order of their index."""

  index: np.ndarray  # int32 [n], place in the split
  features: np.ndarray  # float32 [layers, n, width]
  images: np.ndarray  # uint8 [n, H, W, 3]
  labels: np.ndarray  # int32 [n]


class FeatureExtractor:
  """Computes the features of a stream of images; compiled once, for one batch shape."""

  def __init__(self, model: ImageGPTConfig, config: FeatureConfig, mesh: Mesh):
    self._mesh = mesh

    def extract(params: Params, batch):
      # The batch passes through too, so that its rows keep the order of the features' rows.
      return pooled_features(model, config, params, batch["tokens"], batch["index"]), batch

    self._extract = jax.jit(
      extract,
      in_shardings=(param_shardings(model, mesh), sharding.sharding(mesh, "batch")),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(
    self, params: Params, batches: Iterable[Mapping[str, np.ndarray]]
  ) -> Iterator[FeatureRows]:
    """Yields each batch's rows that `mask` counts, while the device computes the next batch.

    Args:
      params: the parameters, on the mesh.
      batches: this host's rows: `tokens`, `image`, `label`, `mask`, `index`.
    """
    previous = None
    with jax.set_mesh(self._mesh):
      for batch in batches:
        fields = {name: batch[name] for name in ("tokens", "image", "label", "mask", "index")}
        current = self._extract(params, sharding.put_batch(fields, self._mesh))
        if previous is not None:
          yield _rows(previous)
        previous = current
    if previous is not None:
      yield _rows(previous)


def _rows(extracted) -> FeatureRows:
  pooled_LxBxW, rows = jax.device_get(extracted)
  order = np.argsort(rows["index"], kind="stable")
  keep = order[rows["mask"][order]]
  return FeatureRows(
    rows["index"][keep], pooled_LxBxW[:, keep], rows["image"][keep], rows["label"][keep]
  )
