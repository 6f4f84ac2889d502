"""Logistic regression on features: what chooses, what is tested, and on what."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from igpt_jax.probing import linear, logistic
from igpt_jax.probing.linear import balanced_subset, few_labels

CLASSES = 3


def probe(*parts, **settings):
  return linear.probe(*parts, n_classes=CLASSES, **settings)


def score(train, strength, part):
  """Accuracy on a part, of scikit-learn's classifier fitted to another."""
  mean, std = train[0].mean(0), train[0].std(0)
  model = LogisticRegression(C=strength, max_iter=1_000).fit((train[0] - mean) / std, train[1])
  return model.score((part[0] - mean) / std, part[1])


def blobs(n, seed, noise=1.0, classes=3):
  """Features of very different scales, of classes that overlap more with more noise."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(classes, size=n)
  centres = 2 * np.eye(classes, 6)
  features = centres[labels] + noise * rng.standard_normal((n, 6))
  return features * np.logspace(-3, 3, 6), labels


def test_separable_classes_are_told_apart():
  result = probe(blobs(200, 0, 0.1), blobs(60, 1, 0.1), blobs(80, 2, 0.1))
  assert result.validation_accuracy == result.test_accuracy == 1.0
  assert result.converged


def test_noise_is_guessed():
  rng = np.random.default_rng(0)

  def draw(n):
    return rng.standard_normal((n, 6)), rng.integers(3, size=n)

  result = probe(draw(300), draw(300), draw(900))
  assert abs(result.test_accuracy - 1 / 3) < 0.06


def test_the_strength_is_chosen_on_validation_alone_and_the_refit_sees_both():
  train, validation, test = blobs(60, 0, 2.0), blobs(200, 1, 2.0), blobs(500, 2, 2.0)
  strengths = (1e-4, 1e-2, 1.0, 100.0)

  scores = [score(train, strength, validation) for strength in strengths]
  best = strengths[int(np.argmax(scores))]
  result = probe(train, validation, test, strengths=strengths)
  assert result.strength == best
  assert result.validation_accuracy == pytest.approx(max(scores))
  folded = tuple(np.concatenate(pair) for pair in zip(train, validation, strict=True))
  assert result.test_accuracy == pytest.approx(score(folded, best, test))
  assert result.test_accuracy != pytest.approx(score(train, best, test))
  # Another test split can't change the choice.
  shuffled = test[0], np.random.default_rng(0).permutation(test[1])
  again = probe(train, validation, shuffled, strengths=strengths)
  assert (again.strength, again.validation_accuracy) == (best, result.validation_accuracy)


def test_too_few_iterations_are_said():
  train = blobs(200, 0, 0.1)
  assert not probe(train, train, train, strengths=(1e4,), max_iterations=2).converged
  assert probe(train, train, train, strengths=(1.0,)).converged


def test_balanced_subsets():
  labels = np.repeat([0, 1, 2], [5, 20, 40])
  rng = np.random.default_rng(0)
  subset = balanced_subset(labels, 5, rng)
  assert len(set(subset)) == 15
  np.testing.assert_array_equal(np.bincount(labels[subset]), [5, 5, 5])
  assert np.any(np.diff(labels[subset]) < 0)  # not sorted by class
  assert set(balanced_subset(labels, 5, rng)) != set(subset)
  again = balanced_subset(labels, 5, np.random.default_rng(0))
  np.testing.assert_array_equal(again, subset)
  with pytest.raises(ValueError, match="class 0 has 5 examples, 6"):
    balanced_subset(labels, 6, rng)


def test_few_labels_are_averages_over_subsets():
  train, validation, test = blobs(300, 0, 2.0), blobs(200, 1, 2.0), blobs(300, 2, 2.0)
  subsets = [balanced_subset(train[1], 4, np.random.default_rng(seed)) for seed in range(5)]
  strengths = (1e-3, 1.0)
  result = few_labels(train, validation, test, subsets, n_classes=CLASSES, strengths=strengths)
  scores = {
    strength: np.array(
      [
        [score((train[0][subset], train[1][subset]), strength, part) for part in (validation, test)]
        for subset in subsets
      ]
    )
    for strength in strengths
  }
  best = max(strengths, key=lambda strength: scores[strength][:, 0].mean())
  assert result.strength == best
  assert result.validation_accuracy == pytest.approx(scores[best][:, 0].mean(), abs=0.01)
  assert result.test_accuracy == pytest.approx(scores[best][:, 1].mean(), abs=0.01)
  assert result.test_std == pytest.approx(scores[best][:, 1].std(ddof=1), abs=0.01)
  assert 0 < result.test_std
  everything = logistic.fit(*train, (1.0,), n_classes=CLASSES).accuracy(*test)[0]
  assert 0.4 < result.test_accuracy < everything


def test_strengths_span_orders_of_magnitude():
  assert list(linear.STRENGTHS) == sorted(linear.STRENGTHS)
  assert linear.STRENGTHS[-1] / linear.STRENGTHS[0] >= 1e4
