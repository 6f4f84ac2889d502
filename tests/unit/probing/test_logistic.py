"""Logistic regression at several strengths at once, against scikit-learn at one after the other."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from igpt_jax.probing import logistic
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

STRENGTHS = (1e-4, 1e-2, 1.0, 10.0)


def correlated(n, width, classes, seed=0, decay=1.0, overlap=2.0):
  """Features whose variances decay, mixed with each other, at scales and means of their own."""
  rng = np.random.default_rng(7)  # the same classes for every seed
  spectrum = np.arange(1, width + 1) ** -decay
  mixing = np.linalg.qr(rng.standard_normal((width, width)))[0] * np.logspace(-2, 2, width)
  centres = rng.standard_normal((classes, width)) / overlap
  means = 10 * rng.standard_normal(width)
  rng = np.random.default_rng(seed)
  labels = rng.integers(classes, size=n)
  features = (rng.standard_normal((n, width)) + centres[labels]) * spectrum
  return (features @ mixing + means).astype(np.float32), labels


def sklearn_fit(features, labels, strength, tolerance=1e-6):
  """Its pipeline, and the objective it reaches, in float64."""
  model = make_pipeline(
    StandardScaler(), LogisticRegression(C=strength, tol=tolerance, max_iter=20_000)
  )
  with warnings.catch_warnings():
    warnings.simplefilter("error", ConvergenceWarning)
    model.fit(features.astype(np.float64), labels)
  found = model[-1]
  logits = model.decision_function(features.astype(np.float64))
  if logits.ndim == 1:
    logits = np.stack([np.zeros_like(logits), logits], axis=1)
  value = objective(logits, np.searchsorted(found.classes_, labels), found.coef_, strength)
  return model, value


def objective(logits, labels, weights, strength):
  highest = logits.max(1)
  total = np.exp(logits - highest[:, None]).sum(1)
  losses = np.log(total) + highest - logits[np.arange(len(labels)), labels]
  return strength * losses.sum() + 0.5 * np.square(weights).sum()


def check_against_sklearn(train, test, n_classes, strengths=STRENGTHS, **settings):
  """Objectives as good as scikit-learn's within 1e-4 of them, accuracies within 0.2 points."""
  fit = logistic.fit(*train, strengths, n_classes=n_classes, **settings)
  assert fit.converged.all()
  assert fit.weights.dtype == np.float32
  accuracies = fit.accuracy(*test)
  logits = fit.logits(train[0])
  for s, strength in enumerate(strengths):
    model, value = sklearn_fit(*train, strength)
    assert fit.objective[s] == pytest.approx(value, rel=1e-4)
    weights = fit.weights[s].astype(np.float64)
    if len(np.unique(train[1])) == 2:
      present = np.unique(train[1])
      weights = weights[present[1]] - weights[present[0]]
    # What it says is what its weights come to.
    worth = objective(logits[s].astype(np.float64), train[1], weights, strength)
    assert fit.objective[s] == pytest.approx(worth, rel=1e-5)
    assert accuracies[s] == pytest.approx(model.score(*test), abs=0.002)
  return fit


def test_correlated_features():
  train, test = correlated(1_500, 24, 5), correlated(1_000, 24, 5, seed=1)
  fit = check_against_sklearn(train, test, 5, (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0))
  assert fit.weights.shape == (6, 5, 24) and fit.bias.shape == (6, 5)
  assert fit.mean.shape == fit.scale.shape == (24,)
  assert fit.logits(test[0]).shape == (6, 1_000, 5)
  assert 0.3 < fit.accuracy(*test)[-1] < 0.99  # neither is trivial


def test_digits():
  """Some pixels are constant."""
  features, labels = load_digits(return_X_y=True)
  fit = check_against_sklearn(
    (features[:1_000], labels[:1_000]), (features[1_000:], labels[1_000:]), 10
  )
  constant = features[:1_000].std(0) == 0
  assert constant.any()
  np.testing.assert_array_equal(fit.scale[constant], 1)
  assert np.abs(fit.weights[..., constant]).max() < 1e-6


def test_badly_conditioned_features():
  """Principal variances over ten orders of magnitude; tens of steps all the same."""
  train, test = correlated(800, 16, 3, decay=4.0), correlated(1_000, 16, 3, seed=1, decay=4.0)
  fit = check_against_sklearn(train, test, 3)
  assert fit.iterations.max() < 60


@pytest.mark.parametrize("width", [41, 120])
def test_fewer_rows_than_features(width):
  train, test = correlated(40, width, 3), correlated(1_000, width, 3, seed=1)
  check_against_sklearn(train, test, 3)


def test_more_rows_than_are_summed_at_once():
  features, labels = correlated(logistic._MANY_ROWS + 37, 8, 3)
  check_against_sklearn((features, labels), (features, labels), 3, (1e-3, 1.0))


def test_features_too_wide_to_rotate(monkeypatch):
  """L-BFGS as it is gets there too, in more steps."""
  train, test = correlated(300, 12, 3), correlated(1_000, 12, 3, seed=1)
  rotated = logistic.fit(*train, STRENGTHS, n_classes=3)
  monkeypatch.setattr(logistic, "WIDEST_ROTATION", 11)
  fit = check_against_sklearn(train, test, 3)
  assert fit.iterations.sum() > 1.5 * rotated.iterations.sum()


def test_two_classes():
  """scikit-learn has one vector for both, and penalises that."""
  train, test = correlated(300, 10, 2), correlated(1_000, 10, 2, seed=1)
  fit = check_against_sklearn(train, test, 2)
  np.testing.assert_allclose(fit.weights[:, 0], -fit.weights[:, 1], atol=1e-5)


@pytest.mark.parametrize("kept", [(0, 2, 3), (1, 3), (2,)])
def test_classes_that_no_row_has(kept):
  """They are as if they didn't exist, as for scikit-learn, and are never guessed."""
  features, labels = correlated(400, 8, 4)
  seen = np.isin(labels, kept)
  train, test = (features[seen], labels[seen]), correlated(1_000, 8, 4, seed=1)
  if len(kept) > 1:
    fit = check_against_sklearn(train, test, 4)
  else:  # scikit-learn refuses
    fit = logistic.fit(*train, STRENGTHS, n_classes=4)
    assert fit.converged.all() and not fit.objective.any()
  missing = np.setdiff1d(range(4), kept)
  assert np.all(fit.bias[:, missing] == -np.inf) and not fit.weights[:, missing].any()
  assert set(fit.logits(test[0]).argmax(-1).flat) <= set(kept)


@pytest.mark.parametrize(
  "n, width, shape",
  [(203, 12, (8, 1, 1)), (30, 50, (2, 2, 2)), (logistic._MANY_ROWS + 5, 6, (1, 8, 1))],
)
def test_eight_devices_equal_one(n, width, shape):
  """Rows that don't divide over them are padded."""
  train, test = correlated(n, width, 4), correlated(500, width, 4, seed=1)
  one = logistic.fit(*train, STRENGTHS, n_classes=4)
  several = logistic.fit(*train, STRENGTHS, n_classes=4, mesh=tiny.mesh_of(shape))
  assert several.converged.all()
  np.testing.assert_allclose(several.objective, one.objective, rtol=2e-5)
  np.testing.assert_allclose(several.accuracy(*test), one.accuracy(*test), atol=0.002)


@pytest.mark.parametrize("mesh", [None, (8, 1, 1)])
def test_subsets_equal_one_by_one(mesh):
  """Each with the mean and the classes of its own rows."""
  mesh = mesh and tiny.mesh_of(mesh)
  (features, labels), test = correlated(600, 20, 3), correlated(500, 20, 3, seed=1)
  rng = np.random.default_rng(0)
  rows = [rng.choice(len(labels), 30, replace=False) for _ in range(3)]
  rows.append(rng.choice(np.flatnonzero(labels != 1), 30, replace=False))
  together = logistic.fit(features, labels, STRENGTHS, n_classes=3, mesh=mesh, rows=rows)
  assert together.weights.shape == (4, 4, 3, 20) and together.mean.shape == (4, 20)
  assert together.logits(test[0]).shape == (4, 4, 500, 3)
  assert together.converged.all()
  for m, subset in enumerate(rows):
    alone = logistic.fit(features[subset], labels[subset], STRENGTHS, n_classes=3)
    np.testing.assert_array_equal(together.mean[m], alone.mean)
    np.testing.assert_allclose(together.objective[m], alone.objective, rtol=2e-5)
    np.testing.assert_allclose(together.accuracy(*test)[m], alone.accuracy(*test), atol=0.002)
    finite = np.isfinite(alone.bias)
    np.testing.assert_array_equal(np.isfinite(together.bias[m]), finite)
    np.testing.assert_allclose(
      together.logits(test[0])[m].swapaxes(1, 2)[finite],
      alone.logits(test[0]).swapaxes(1, 2)[finite],
      atol=0.02,
    )


def test_layers_of_one_shape_share_a_program():
  logistic.compiled_solver.cache_clear()
  program = logistic.compiled_solver(None, logistic.WIDEST_ROTATION)
  for layer in range(4):
    features, labels = correlated(97, 9, 3, seed=layer)
    logistic.fit(
      features, labels, np.array(STRENGTHS) * (1 + layer), n_classes=3,
      max_iterations=100 + layer, tolerance=1e-4 / (1 + layer),
    )  # fmt: skip
  assert program._cache_size() == 1
  logistic.fit(features[:, :8], labels, STRENGTHS, n_classes=3)
  assert program._cache_size() == 2


def test_too_few_steps_are_said():
  train = correlated(300, 10, 3)
  fit = logistic.fit(*train, STRENGTHS, n_classes=3, max_iterations=3)
  assert not fit.converged[-1] and fit.iterations.max() == 3
  none = logistic.fit(*train, STRENGTHS, n_classes=3, max_iterations=0)
  assert not none.converged.any() and not none.iterations.any() and not none.weights.any()
  # Nor can float32 get anywhere; it gives up, with the best it has.
  vain = logistic.fit(*train, (1.0,), n_classes=3, tolerance=1e-12)
  assert not vain.converged.any() and vain.iterations[0] < 1_000
  enough = logistic.fit(*train, (1.0,), n_classes=3)
  assert enough.converged.all() and vain.objective[0] == pytest.approx(enough.objective[0])


def test_the_tolerance_holds_for_standardised_features():
  """The gradient, by numpy in float64, is within it, as scikit-learn measures it."""
  features, labels = correlated(500, 30, 4)
  fit = logistic.fit(features, labels, STRENGTHS, n_classes=4, tolerance=1e-4)
  scaled = (features.astype(np.float64) - fit.mean) / fit.scale
  for s, strength in enumerate(STRENGTHS):
    logits = scaled @ fit.weights[s].T.astype(np.float64) + fit.bias[s]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    residual = odds / odds.sum(1, keepdims=True) - np.eye(4)[labels]
    slopes = (residual.T @ scaled + fit.weights[s] / strength) / len(labels)
    assert max(np.abs(slopes).max(), np.abs(residual.mean(0)).max()) < 1.05e-4


def test_standardised_as_by_scikit_learn():
  rng = np.random.default_rng(0)
  features = rng.standard_normal((50, 4)) * [1, 1e-6, 1e6, 0] + [1e4, 0, 1, 0.1]
  out = np.empty(features.shape, np.float32)
  mean, scale = logistic.standardise(features, out)
  expected = StandardScaler().fit(features)
  np.testing.assert_allclose(mean, expected.mean_)
  np.testing.assert_allclose(scale, expected.scale_)
  np.testing.assert_allclose(out, expected.transform(features), atol=1e-6)


def test_bad_input_is_named():
  features, labels = correlated(20, 4, 3)
  for bad in (-1, 3):
    wrong = labels.copy()
    wrong[7] = bad
    with pytest.raises(ValueError, match=f"labels: {bad} at row 7 .* expected 0 to 2"):
      logistic.fit(features, wrong, STRENGTHS, n_classes=3)
  for bad in (np.nan, np.inf):
    wrong = features.copy()
    wrong[5, 2] = bad
    with pytest.raises(ValueError, match=f"features: {bad} at row 5, feature 2"):
      logistic.fit(wrong, labels, STRENGTHS, n_classes=3)
    with pytest.raises(ValueError, match=f"features: {bad} at row 5, feature 2"):
      logistic.fit(wrong, labels, STRENGTHS, n_classes=3, rows=[[1, 5, 6]])
  with pytest.raises(ValueError, match="float64; expected integers"):
    logistic.fit(features, labels * 1.0, STRENGTHS, n_classes=3)
  with pytest.raises(ValueError, match=r"labels of shape \(19,\)"):
    logistic.fit(features, labels[1:], STRENGTHS, n_classes=3)
  with pytest.raises(ValueError, match="above 0"):
    logistic.fit(features, labels, (1.0, 0.0), n_classes=3)
  with pytest.raises(ValueError, match=r"rows: .*\[M, n\]"):
    logistic.fit(features, labels, STRENGTHS, n_classes=3, rows=[1, 2])
  fit = logistic.fit(features, labels, STRENGTHS, n_classes=3)
  with pytest.raises(ValueError, match=r"expected \[N, 4\]"):
    fit.logits(features[:, :3])
  with pytest.raises(ValueError, match="features: inf at row 5, feature 2"):
    fit.accuracy(wrong, labels)
  with pytest.raises(ValueError, match="labels: 3 at row 7"):
    fit.accuracy(features, np.where(np.arange(20) == 7, 3, labels))
