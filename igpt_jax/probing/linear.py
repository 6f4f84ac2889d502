"""Linear classifiers on frozen features, as the paper fits them to small data sets.

The strength of the regularisation, which the paper doesn't state, is chosen on the validation
split; the classifier is then fitted again to train and validation together, and tested once.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from igpt_jax.probing import logistic

# Inverse regularisation strengths, after each feature is scaled to unit variance.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

Labelled = tuple[np.ndarray, np.ndarray]  # features [N, D], labels [N]


@dataclasses.dataclass(frozen=True)
class ProbeResult:
  """Accuracies of the probe of one feature set."""

  strength: float  # inverse regularisation strength, chosen on validation
  validation_accuracy: float  # fitted to train at that strength
  test_accuracy: float  # fitted to train and validation
  converged: bool  # True if the last fit converged within max_iterations


def probe(
  train: Labelled,
  validation: Labelled,
  test: Labelled,
  *,
  n_classes: int,
  strengths: Sequence[float] = STRENGTHS,
  max_iterations: int = 1_000,
  mesh: Mesh | None = None,
) -> ProbeResult:
  """Chooses the strength on validation, refits to train and validation, and tests once.

  The rows are sharded over the mesh, if one is given.
  """
  settings = {"n_classes": n_classes, "max_iterations": max_iterations, "mesh": mesh}
  scores = logistic.fit(*train, strengths, **settings).accuracy(*validation)
  best = int(np.argmax(scores))
  features, labels = (np.concatenate(pair) for pair in zip(train, validation, strict=True))
  fitted = logistic.fit(features, labels, strengths[best : best + 1], **settings)
  (accuracy,) = fitted.accuracy(*test)
  return ProbeResult(
    strengths[best], float(scores[best]), float(accuracy), bool(fitted.converged[0])
  )


def balanced_subset(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
  """Draws indices of `per_class` random examples of each class, in a random order.

  Raises:
    ValueError: a class has fewer examples.
  """
  chosen = []
  for label in np.unique(labels):
    of_class = np.flatnonzero(labels == label)
    if len(of_class) < per_class:
      raise ValueError(f"class {label} has {len(of_class)} examples, {per_class} are wanted")
    chosen.append(rng.choice(of_class, per_class, replace=False))
  return rng.permutation(np.concatenate(chosen))


@dataclasses.dataclass(frozen=True)
class FewLabelsResult:
  """Accuracies over random subsets of the labels."""

  strength: float  # chosen by the mean validation accuracy
  validation_accuracy: float  # mean over the subsets
  test_accuracy: float  # mean over the subsets
  test_std: float  # sample standard deviation over the subsets


def few_labels(
  train: Labelled,
  validation: Labelled,
  test: Labelled,
  subsets: Sequence[np.ndarray],
  *,
  n_classes: int,
  strengths: Sequence[float] = STRENGTHS,
  max_iterations: int = 1_000,
) -> FewLabelsResult:
  """Fits to each subset of train alone, all at once; one strength is chosen for all subsets."""
  fitted = logistic.fit(
    *train, strengths, n_classes=n_classes, max_iterations=max_iterations, rows=np.stack(subsets)
  )
  on_validation_MxS = fitted.accuracy(*validation)
  best = int(np.argmax(on_validation_MxS.mean(0)))
  on_test_M = fitted.accuracy(*test)[:, best]
  return FewLabelsResult(
    strengths[best],
    float(on_validation_MxS[:, best].mean()),
    float(on_test_M.mean()),
    float(on_test_M.std(ddof=1)) if len(subsets) > 1 else 0.0,
  )
