"""Logistic regression on frozen features, by scikit-learn's L-BFGS, as the paper does it.

The strength of the regularisation, which the paper doesn't state, is chosen on the validation
part; the classifier is then fitted again with that part folded back in, and tested once.
"""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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


def fit(train: Labelled, strength: float, max_iterations: int):
  """A fitted classifier, and whether it converged."""
  classifier = make_pipeline(
    StandardScaler(), LogisticRegression(C=strength, max_iter=max_iterations)
  )
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", ConvergenceWarning)
    classifier.fit(*train)
  return classifier, not any(issubclass(each.category, ConvergenceWarning) for each in caught)


def probe(
  train: Labelled,
  validation: Labelled,
  test: Labelled,
  *,
  strengths: Sequence[float] = STRENGTHS,
  max_iterations: int = 1_000,
) -> ProbeResult:
  """Chooses the strength on validation, refits with it folded in, tests once."""
  scores = [fit(train, strength, max_iterations)[0].score(*validation) for strength in strengths]
  best = int(np.argmax(scores))
  folded = tuple(np.concatenate(pair) for pair in zip(train, validation, strict=True))
  classifier, converged = fit(folded, strengths[best], max_iterations)
  return ProbeResult(strengths[best], scores[best], classifier.score(*test), converged)


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
    test_accuracy, test_std: mean and standard deviation over the subsets.
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
  strengths: Sequence[float] = STRENGTHS,
  max_iterations: int = 1_000,
) -> FewLabelsResult:
  """Fits to each subset of train alone; the strength is one for all subsets."""
  scores = np.empty((2, len(strengths), len(subsets)))
  features, labels = train
  for s, strength in enumerate(strengths):
    for i, subset in enumerate(subsets):
      classifier, _ = fit((features[subset], labels[subset]), strength, max_iterations)
      scores[:, s, i] = classifier.score(*validation), classifier.score(*test)
  best = int(np.argmax(scores[0].mean(1)))
  return FewLabelsResult(
    strengths[best], scores[0, best].mean(), scores[1, best].mean(), scores[1, best].std()
  )
