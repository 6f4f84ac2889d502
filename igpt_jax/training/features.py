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
      return bind(config, params).features(batch["tokens"].astype(jnp.int32))

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
    """Features of all pictures that `mask` counts, on every process, in the stream's order.

    Args:
      params: the parameters, on the mesh.
      batches: this host's rows: `tokens`, `label`, `mask`.
      report: called with the number of pictures done.
    """
    features, tokens, labels, done = [], [], [], 0
    with jax.set_mesh(self._mesh):
      for batch in batches:
        on_mesh = sharding.put_batch({"tokens": batch["tokens"]}, self._mesh)
        pooled_LxBxD = jax.device_get(self._extract(params, on_mesh))
        rows = _all_hosts({name: batch[name] for name in ("tokens", "label", "mask")})
        keep = rows["mask"]
        features.append(pooled_LxBxD[:, keep])
        tokens.append(rows["tokens"][keep])
        labels.append(rows["label"][keep])
        done += int(keep.sum())
        if report is not None:
          report(done)
    return LabelledFeatures(
      np.concatenate(features, axis=1), np.concatenate(tokens), np.concatenate(labels)
    )


def _all_hosts(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every process' rows, process after process: the row order of the global batch."""
  if jax.process_count() == 1:
    return rows
  from jax.experimental import multihost_utils

  gathered = multihost_utils.process_allgather(rows)
  return {name: value.reshape(-1, *value.shape[2:]) for name, value in gathered.items()}
