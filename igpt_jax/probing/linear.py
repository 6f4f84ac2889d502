"""Linear classifiers on frozen features, as the paper fits them to small data sets.

The strength of the regularisation, which the paper doesn't state, is chosen on the validation
part; the classifier is then fitted again with that part folded back in, and tested once.
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
  """One feature set, probed.

  Attributes:
    strength: the inverse regularisation chosen.
    validation_accuracy: of the classifier fitted to train, at that strength.
    test_accuracy: of the one fitted to train and validation.
    converged: whether L-BFGS got there within its iterations in that last fit.
  """

  strength: float
  validation_accuracy: float
  test_accuracy: float
  converged: bool


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
  """Chooses the strength on validation, refits with it folded in, tests once.

  Under a mesh the images are split over it.
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
  """Indices of `per_class` random examples of each class, in a random order.

  Raises:
    ValueError: a class has fewer.
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
  """Mean over random subsets of the labels.

  Attributes:
    strength: chosen by the mean validation accuracy over the subsets.
    validation_accuracy: that mean.
    test_accuracy, test_std: mean and standard deviation (of a sample) over the subsets.
  """

  strength: float
  validation_accuracy: float
  test_accuracy: float
  test_std: float


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
  """Fits to each subset of train alone, all at once; the strength is one for all subsets."""
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
