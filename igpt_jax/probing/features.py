"""A split's probe features: f^l of all wanted layers, in one forward pass."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import ImageGPTConfig, Params, bind
from igpt_jax.parallel import sharding
from igpt_jax.training.objectives import draw_visible
from igpt_jax.training.state import param_shardings

_MASK_SEED = 0  # an image's masks are the same in every run


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
  """What is computed of an image.

  Attributes:
    layers: of 0 (what enters the first block) to n_layer (the final norm's output), ascending.
    grid: means are taken over each of grid × grid blocks of pixels, and put side by side.
    masks: BERT: the mean over that many masked inputs; 0: nothing is masked. (A linear classifier's
      mean of logits over masks is its logits of the mean features.)
    mask_probability: of a pixel.
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
  """The features asked for of a model; () stands for all layers.

  Raises:
    UserError: a layer that it doesn't have, a grid that doesn't divide its images, masks for a
      model that takes none.
  """
  for layer in layers:
    if not isinstance(layer, int) or not 0 <= layer <= model.n_layer:
      raise UserError(
        f"config.features.layers: {layer!r} of {layers}; expected 0 to {model.n_layer}, the model's layers "
        f"({model.n_layer} is the final norm's output)"
      )
  side = round(model.n_positions**0.5)
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
  """Some images, on every process, in the order of their index.

  Attributes:
    index: int32 [n], their place in the split.
    features: float32 [layers, n, width].
    images: uint8 [n, H, W, 3].
    labels: int32 [n].
  """

  index: np.ndarray
  features: np.ndarray
  images: np.ndarray
  labels: np.ndarray


class FeatureExtractor:
  """Features of a stream of images; compiled once, for one batch shape."""

  def __init__(self, model: ImageGPTConfig, config: FeatureConfig, mesh: Mesh):
    self._mesh = mesh

    def extract(params: Params, batch):
      # The rest goes along: only so are all rows in one order, whatever host read them.
      return pooled_features(model, config, params, batch["tokens"], batch["index"]), batch

    self._extract = jax.jit(
      extract,
      in_shardings=(param_shardings(model, mesh), sharding.sharding(mesh, "batch")),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(
    self, params: Params, batches: Iterable[Mapping[str, np.ndarray]]
  ) -> Iterator[FeatureRows]:
    """Each batch's images that `mask` counts; the device is at the next batch meanwhile.

    Args:
      params: the parameters, on the mesh.
      batches: this host's rows: `tokens`, `image`, `label`, `mask`, `index`.
    """
    before = None
    with jax.set_mesh(self._mesh):
      for batch in batches:
        wanted = {name: batch[name] for name in ("tokens", "image", "label", "mask", "index")}
        begun = self._extract(params, sharding.put_batch(wanted, self._mesh))
        if before is not None:
          yield _rows(before)
        before = begun
    if before is not None:
      yield _rows(before)


def _rows(extracted) -> FeatureRows:
  pooled_LxBxW, rows = jax.device_get(extracted)
  order = np.argsort(rows["index"], kind="stable")
  keep = order[rows["mask"][order]]
  return FeatureRows(
    rows["index"][keep], pooled_LxBxW[:, keep], rows["image"][keep], rows["label"][keep]
  )
