"""Multinomial logistic regression at several strengths at once: scikit-learn's problem, in JAX.

Solves what StandardScaler and LogisticRegression(C) solve: features scaled to mean 0 and variance 1 over
the rows fitted, and C · Σ loss + ½ ‖W‖² minimised, with an unpenalised bias. Here one pass over the
features serves all strengths, and the features are rotated to their principal axes first. That doesn't
change the problem, but makes its Hessian nearly diagonal, so that L-BFGS needs tens of steps instead of
hundreds. One program serves all layers of a shape.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from igpt_jax.parallel import sharding
from igpt_jax.probing import lbfgs

# Widest Gram matrix to decompose: beyond it that costs more than the iterations it saves.
WIDEST_ROTATION = 6_144
CHUNK = 4_096  # rows at a time, on the host
# From _MANY_ROWS rows on, losses are summed in blocks of _BLOCK: the rounding error of one long float32
# sum would exceed the differences that the line search compares.
_BLOCK, _MANY_ROWS = 64, 4_096
_LEAST_SPREAD = 1e-8  # lower bound of the mean variance of a class's indicator


@dataclasses.dataclass(frozen=True)
class Fit:
  """Classifiers of S strengths; with M subsets of rows, every array has a leading M.

  Attributes:
    mean, scale: [D], those of the rows fitted; scale is 1 where a feature is constant.
    weights: [S, K, D], for standardised features; 0 for a class that no row fitted has.
    bias: [S, K]; -inf for a class that no row fitted has.
    objective: [S], C · Σ loss + ½ ‖W‖² as scikit-learn counts it, which for two classes penalises
      the one vector W[1] - W[0].
    iterations: int [S], steps taken.
    converged: bool [S], True if the largest component of the gradient of objective / (C · N) is
      within the tolerance.
  """

  mean: np.ndarray
  scale: np.ndarray
  weights: np.ndarray
  bias: np.ndarray
  objective: np.ndarray
  iterations: np.ndarray
  converged: np.ndarray

  def logits(self, features: np.ndarray) -> np.ndarray:
    """Features [N, D] -> float32 [S, N, K], or [M, S, N, K]."""
    return np.concatenate([logits for _, logits in self._chunks(features)], axis=-2)

  def accuracy(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of rows [N, D] whose largest logit is their label's: [S], or [M, S]."""
    features, labels = _checked(features, labels, self.bias.shape[-1])
    hits = [
      np.sum(logits.argmax(-1) == labels[start : start + CHUNK], axis=-1)
      for start, logits in self._chunks(features)
    ]
    return np.sum(hits, axis=0) / len(labels)

  def _chunks(self, features):
    features = np.asarray(features)
    lead, (strengths, classes, width) = self.weights.shape[:-3], self.weights.shape[-3:]
    if features.ndim != 2 or features.shape[1] != width:
      raise ValueError(f"features of shape {features.shape}; expected [N, {width}]")
    weights = self.weights.reshape(-1, strengths * classes, width).swapaxes(1, 2)
    moments = self.mean.reshape(-1, width), self.scale.reshape(-1, width)
    subsets = list(zip(*moments, weights, strict=True))
    for start in range(0, max(len(features), 1), CHUNK):
      rows = features[start : start + CHUNK]
      if not np.all(np.isfinite(rows)):
        raise _not_finite(features, np.arange(start, start + len(rows)))
      products = np.stack(
        [((rows - mean) / scale).astype(np.float32) @ weights for mean, scale, weights in subsets]
      )
      split = products.reshape(*lead, len(rows), strengths, classes)
      yield start, np.moveaxis(split, -2, -3) + self.bias[..., None, :]


def fit(
  features: np.ndarray,
  labels: np.ndarray,
  strengths: Sequence[float],
  *,
  n_classes: int,
  max_iterations: int = 1_000,
  tolerance: float = 1e-4,
  mesh: Mesh | None = None,
  rows: np.ndarray | Sequence[np.ndarray] | None = None,
) -> Fit:
  """Fits a classifier at every strength.

  Args:
    features: [N, D], whole on every process.
    labels: int [N].
    strengths: [S], inverse regularisation strengths, scikit-learn's C.
    n_classes: K. Classes that no row has get no probability, as if they didn't exist.
    max_iterations: L-BFGS steps at most.
    tolerance: scikit-learn's tol, compared with the gradient's largest component.
    mesh: splits the rows over its batch axes; None: the default device.
    rows: int [M, n], subsets of one size to fit instead, all at once.

  Raises:
    ValueError: a label that is no class, a feature that isn't finite, shapes or settings that
      don't fit.
  """
  features, labels = _checked(features, labels, n_classes)
  strengths_S = np.asarray(strengths, np.float64)
  if strengths_S.ndim != 1 or not len(strengths_S) or not np.all(strengths_S > 0):
    raise ValueError(f"strengths: {strengths_S.tolist()}; expected one or more above 0")
  if rows is None:
    subsets, n = [slice(None)], len(features)
  else:
    subsets = np.asarray(rows)
    if subsets.ndim != 2 or not np.issubdtype(subsets.dtype, np.integer) or not subsets.size:
      raise ValueError(f"rows: {subsets.dtype} of shape {subsets.shape}; expected integers [M, n]")
    n = subsets.shape[1]

  shards = 1 if mesh is None else sharding.batch_shards(mesh)
  multiple = shards * (_BLOCK if n >= _MANY_ROWS else 1)
  padded = -(-n // multiple) * multiple
  x_MxNxD = np.zeros((len(subsets), padded, features.shape[1]), np.float32)
  y_MxN = np.empty((len(subsets), padded), np.int32)
  moments = []
  for x, y, subset in zip(x_MxNxD, y_MxN, subsets, strict=True):
    try:
      moments.append(standardise(features[subset], x[:n]))
    except FloatingPointError:
      raise _not_finite(features, np.arange(len(features))[subset]) from None
    y[:n] = labels[subset]
    y[n:] = y[0]  # an existing class, so that the masked rows' loss is finite
  mean, scale = map(np.stack, zip(*moments, strict=True))
  present_MxK = np.stack([np.bincount(y, minlength=n_classes) > 0 for y in y_MxN])
  # With two classes softmax splits scikit-learn's w into ±w/2, whose squares sum to half of w's.
  twice = np.where(present_MxK.sum(1) == 2, 2.0, 1.0)
  penalty_MxS = (twice[:, None] / (strengths_S * n)).astype(np.float32)
  mask_N = (np.arange(padded) < n).astype(np.float32)

  inputs = [
    (x_MxNxD, (None, "batch", None)), (y_MxN, (None, "batch")), (mask_N, ("batch",)),
    (present_MxK, (None, None)), (penalty_MxS, (None, None)),
    (np.int32(max_iterations), ()), (np.float32(tolerance), ()),
  ]  # fmt: skip
  program = compiled_solver(mesh, WIDEST_ROTATION)
  if mesh is None:
    solved = program(*(values for values, _ in inputs))
  else:
    with jax.set_mesh(mesh):
      solved = program(*(_put(values, mesh, axes) for values, axes in inputs))
  weights, bias, value, iterations, converged = jax.device_get(solved)
  bias = np.where(present_MxK[:, None], bias, -np.inf).astype(np.float32)
  objective = value.astype(np.float64) * strengths_S * n
  arrays = (mean, scale, weights, bias, objective, iterations, converged)
  return Fit(*arrays) if rows is not None else Fit(*(array[0] for array in arrays))


def _checked(features, labels, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
  features, labels = np.asarray(features), np.asarray(labels)
  if features.ndim != 2 or not features.size or labels.shape != features.shape[:1]:
    raise ValueError(
      f"features of shape {features.shape} with labels of shape {labels.shape}; expected [N, D] "
      "and [N]"
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"labels: {labels.dtype}; expected integers")
  wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
  if len(wrong):
    raise ValueError(
      f"labels: {labels[wrong[0]]} at row {wrong[0]} ({len(wrong)} such rows); expected "
      f"0 to {n_classes - 1}"
    )
  return features, labels


def _not_finite(features: np.ndarray, rows: np.ndarray) -> ValueError:
  at, column = np.argwhere(~np.isfinite(features[rows]))[0]
  return ValueError(
    f"features: {features[rows[at], column]} at row {rows[at]}, feature {column}; expected finite "
    "numbers"
  )


def _put(values: np.ndarray, mesh: Mesh, axes: tuple) -> jax.Array:
  target = sharding.sharding(mesh, *axes)
  return jax.make_array_from_callback(values.shape, target, lambda index: values[index])


def standardise(features: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Writes features [N, D] to `out`, scaled to mean 0 and variance 1 like StandardScaler's.

  Returns:
    Mean and scale [D], float64. A feature that is constant up to rounding has scale 1.

  Raises:
    FloatingPointError: a feature isn't finite.
  """
  n = len(features)
  parts = [slice(start, start + CHUNK) for start in range(0, n, CHUNK)]
  mean: Any = sum(features[part].sum(0, dtype=np.float64) for part in parts) / n
  if not np.all(np.isfinite(mean)):
    raise FloatingPointError
  square: Any = sum(np.square(features[part] - mean).sum(0) for part in parts) / n
  eps = np.finfo(np.float64).eps
  constant = square <= n * eps * square + (n * mean * eps) ** 2
  scale = np.where(constant, 1.0, np.sqrt(square))
  for part in parts:
    out[part] = (features[part] - mean) / scale
  return mean, scale


@functools.cache
def compiled_solver(mesh: Mesh | None, widest_rotation: int):
  """Returns the jitted solver for a mesh; it compiles once per shape."""
  solve = functools.partial(_solve, widest_rotation)
  if mesh is None:
    return jax.jit(solve)
  return jax.jit(solve, out_shardings=sharding.replicated(mesh))


def _solve(
  widest_rotation, x_MxNxD, y_MxN, mask_N, present_MxK, penalty_MxS, max_iterations, tolerance
):
  """Weights [M, S, K, D], bias [M, S, K], objective / (C · N), iterations and converged [M, S]."""
  with jax.default_matmul_precision("highest"):
    x_MxRxN, basis_MxDxR = _principal_axes(x_MxNxD, widest_rotation)
    ones = jnp.broadcast_to(mask_N, (*x_MxRxN.shape[:1], 1, *mask_N.shape))
    x_MxRxN = sharding.constrain(jnp.concatenate([x_MxRxN, ones], 1), None, None, "batch")
    n = mask_N.sum()
    if basis_MxDxR is None:
      # No axis is known to vary less than another; the bound keeps the first step short enough.
      variance_MxR = jnp.full(x_MxRxN.shape[:2], x_MxNxD.shape[-1], jnp.float32)
    else:
      variance_MxR = jnp.square(x_MxRxN).sum(-1) / n
    # The bias, the last row, isn't penalised.
    penalty_MxSxR = penalty_MxS[..., None] * jnp.append(jnp.ones(x_MxRxN.shape[1] - 1), 0.0)

    value_and_gradient = functools.partial(
      _value_and_gradient, x_MxRxN, y_MxN, mask_N / n, present_MxK, penalty_MxSxR, variance_MxR
    )
    largest = functools.partial(_largest, rotated=basis_MxDxR is not None)
    shape = (*penalty_MxS.shape, present_MxK.shape[1], x_MxRxN.shape[1])
    state = lbfgs.minimise(value_and_gradient, shape, largest, max_iterations, tolerance)
    converged = largest(state.gradient) <= tolerance
    weights, bias = state.w[..., :-1], state.w[..., -1]
    if basis_MxDxR is not None:
      weights = jnp.einsum("mskr,mdr->mskd", weights, basis_MxDxR)
  return weights, bias, state.value, state.iterations, converged


def _principal_axes(x_MxNxD, widest: int):
  """Returns rows in principal axes [M, R, N], and those orthonormal axes [M, D, R], R = min(N, D).

  The solution is unchanged: rows lie in the span of the axes, and so do the weights of least penalty.
  Where min(N, D) > `widest` the rows are returned as they are, and None.
  """
  n, width = x_MxNxD.shape[1:]
  if min(n, width) > widest:
    return jnp.swapaxes(x_MxNxD, 1, 2), None
  if width <= n:
    gram = jnp.einsum("mnd,mne->mde", x_MxNxD, x_MxNxD)
    axes = jnp.linalg.eigh(gram)[1]
    return jnp.einsum("mdr,mnd->mrn", axes, x_MxNxD), axes
  # Axes from the rows' Gram matrix would be far from orthogonal in directions of little variance.
  few_rows = sharding.constrain(x_MxNxD, None, None, None)
  span, coordinates_MxRxN = jnp.linalg.qr(jnp.swapaxes(few_rows, 1, 2))
  gram = jnp.einsum("mrn,mqn->mrq", coordinates_MxRxN, coordinates_MxRxN)
  turned = jnp.linalg.eigh(gram)[1]
  return jnp.einsum("mqr,mqn->mrn", turned, coordinates_MxRxN), span @ turned


def _largest(gradient, rotated: bool):
  """Largest component of the gradients [M, S, K, R], in standardised features: [M, S].

  After a rotation an upper bound: the norm of a class's gradient.
  """
  sizes = jnp.linalg.norm(gradient, axis=-1) if rotated else jnp.abs(gradient).max(-1)
  return sizes.max(-1)


def _value_and_gradient(x_MxRxN, y_MxN, share_N, present_MxK, penalty_MxSxR, variance_MxR, w):
  """Mean loss + penalty [M, S], its gradient like w [M, S, K, R], and a preconditioner.

  The preconditioner [M, S, 1, R] approximates the inverse of the Hessian's diagonal, as if a row's
  probabilities didn't depend on its features. All classes share it, so that their weights keep summing
  to 0.

  Rows that are classified with certainty keep their precision: the other classes' odds are summed, not
  subtracted from 1. N is the last axis, so that reductions over K read contiguous memory.
  """
  z_MxSxKxN = jnp.einsum("mskr,mrn->mskn", w, x_MxRxN)
  z_MxSxKxN += jnp.where(present_MxK, 0.0, -jnp.inf)[:, None, :, None]
  hit = (jnp.arange(present_MxK.shape[1])[:, None] == y_MxN[:, None])[:, None]
  own = jnp.where(hit, z_MxSxKxN, 0.0).sum(2)
  highest = z_MxSxKxN.max(2)
  odds = jnp.exp(z_MxSxKxN - highest[:, :, None])
  total = odds.sum(2)
  others = jnp.where(hit, 0.0, odds).sum(2)
  loss = jnp.where(own >= highest, jnp.log1p(others), jnp.log(total) + (highest - own))
  residual = jnp.where(hit, -others[:, :, None], odds) * (share_N / total)[:, :, None]
  gradient = jnp.einsum("mskn,mrn->mskr", residual, x_MxRxN)
  shrunk = penalty_MxSxR[:, :, None] * w
  spread = (odds * (total[:, :, None] - odds)).sum(2) * (share_N / total**2)
  spread = spread.sum(-1) / jnp.maximum(present_MxK.sum(1) - 1, 1)[:, None]
  value = _sum_rows(loss * share_N) + 0.5 * (shrunk * w).sum((-1, -2))
  bends_MxSxR = jnp.maximum(spread, _LEAST_SPREAD)[..., None] * variance_MxR[:, None]
  return value, gradient + shrunk, (1 / (bends_MxSxR + penalty_MxSxR))[:, :, None]


def _sum_rows(values):
  """Sum over the last axis, in blocks where there are many rows."""
  n = values.shape[-1]
  if n >= _MANY_ROWS and n % _BLOCK == 0:
    blocks = values.reshape(*values.shape[:-1], n // _BLOCK, _BLOCK).sum(-1)
    values = jax.lax.optimization_barrier(blocks)  # else XLA merges both sums into one
  return values.sum(-1)
