"""Fréchet distance between two sets of features, a measure of the quality of generated images.

Heusel et al. 2017 take Inception's features; any network's will do. The distance falls with the number
of images: only distances over equally many images, by one network, can be compared.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean [D] and covariance [D, D] of features [N, D], float64."""

  mean: np.ndarray
  covariance: np.ndarray


def moments(features_NxD: np.ndarray) -> Moments:
  """Computes the moments. Raises ValueError for fewer than two rows, or numbers that aren't finite."""
  features = np.asarray(features_NxD, np.float64)
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(f"features of shape {features.shape}; expected [N, D], N at least 2")
  if not np.isfinite(features).all():
    raise ValueError("features that aren't finite")
  return Moments(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def distance(a: Moments, b: Moments) -> float:
  """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), at least 0."""
  values, vectors = np.linalg.eigh(a.covariance)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  # The trace of the product's root, from a symmetric matrix with the same eigenvalues.
  both = np.linalg.eigvalsh(root @ b.covariance @ root)
  shift = np.square(a.mean - b.mean).sum()
  spread = np.trace(a.covariance) + np.trace(b.covariance)
  return max(float(shift + spread - 2 * np.sqrt(np.maximum(both, 0)).sum()), 0.0)
