"""A split's probe features: f^l for every layer, in one forward pass."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from igpt_jax.model.image_gpt import ImageGPTConfig, Params, bind
from igpt_jax.parallel import sharding
from igpt_jax.training.state import param_shardings


@dataclasses.dataclass(frozen=True)
class LabelledFeatures:
  """Features of N pictures.

  Attributes:
    features: float32 [n_layer + 1, N, D].
    tokens: uint16 [N, T], what they were computed from.
    labels: int32 [N].
  """

  features: np.ndarray
  tokens: np.ndarray
  labels: np.ndarray


class FeatureExtractor:
  """Mean-pooled normed activations of every layer (paper, section 2.3); compiled once."""

  def __init__(self, config: ImageGPTConfig, mesh: Mesh):
    self._mesh = mesh

    def extract(params: Params, batch):
      # The rest goes along: only so are all rows in one order, whatever host read them.
      return bind(config, params).features(batch["tokens"].astype(jnp.int32)), batch

    self._extract = jax.jit(
      extract,
      in_shardings=(param_shardings(config, mesh), sharding.sharding(mesh, "batch")),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(
    self,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    report: Callable[[int], None] | None = None,
  ) -> LabelledFeatures:
    """Features of all pictures that `mask` counts, on every process, in the order of `index`.

    Args:
      params: the parameters, on the mesh.
      batches: this host's rows: `tokens`, `label`, `mask`, `index`.
      report: called with the number of pictures done.
    """
    features, tokens, labels, done = [], [], [], 0
    with jax.set_mesh(self._mesh):
      for batch in batches:
        wanted = {name: batch[name] for name in ("tokens", "label", "mask", "index")}
        on_mesh = sharding.put_batch(wanted, self._mesh)
        pooled_LxBxD, rows = jax.device_get(self._extract(params, on_mesh))
        order = np.argsort(rows["index"])
        keep = order[rows["mask"][order]]
        features.append(pooled_LxBxD[:, keep])
        tokens.append(rows["tokens"][keep])
        labels.append(rows["label"][keep])
        done += len(keep)
        if report is not None:
          report(done)
    return LabelledFeatures(
      np.concatenate(features, axis=1), np.concatenate(tokens), np.concatenate(labels)
    )
