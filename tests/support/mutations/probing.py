"""Mistakes in probing: what features are of, and what is fitted to and chosen on which split."""

from support.mutations.mutation import Mutation

_FEATURES = "unit/probing/test_features.py"
_CHOICES = "unit/probing/test_probe_choices.py"
_LINEAR = "unit/probing/test_linear_probe.py"
_CHOSEN = f"{_LINEAR}::test_the_strength_is_chosen_on_validation_alone_and_the_refit_sees_both"
_LOGISTIC = "unit/probing/test_logistic.py"
_SGD = "unit/probing/test_sgd_probe.py"
_ATTENTIVE = "unit/probing/test_attentive.py"

MUTATIONS = (
  Mutation(
    "features-of-the-layer-below",
    "probing/features.py",
    "bound.features(tokens, grid=config.grid)[layers]",
    "bound.features(tokens, grid=config.grid)[layers - 1]",
    f"{_FEATURES}::test_features_of_a_stream",
  ),
  Mutation(
    "feature-masks-alike",
    "probing/features.py",
    "jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)",
    "jax.vmap(lambda index: key)(index_B)",
    f"{_FEATURES}::test_masks_are_a_pictures_own",
  ),
  Mutation(
    "feature-draws-alike",
    "probing/features.py",
    "jax.random.fold_in(jax.random.key(_MASK_SEED), draw)",
    "jax.random.fold_in(jax.random.key(_MASK_SEED), 0)",
    f"{_FEATURES}::test_masks_are_a_pictures_own",
  ),
  Mutation(
    "features-of-padding",
    "probing/features.py",
    'keep = order[rows["mask"][order]]',
    "keep = order",
    f"{_FEATURES}::test_features_of_a_stream",
  ),
  Mutation(
    "labels-in-another-order",
    "probing/features.py",
    'rows["image"][keep], rows["label"][keep]',
    'rows["image"][keep], rows["label"][: len(keep)]',
    f"{_FEATURES}::test_features_of_a_stream",
  ),
  Mutation(
    "axes-of-test-images",
    "probing/sets.py",
    'train = stores["train"]',
    'train = stores["test"]',
    f"{_CHOICES}::test_principal_axes_are_those_of_training_images",
  ),
  Mutation(
    "axes-of-test-images-by-sgd",
    "probing/feeds.py",
    'train = self._stores[LAYERS]["train"]',
    'train = self._stores[LAYERS]["test"]',
    f"{_CHOICES}::test_principal_axes_are_those_of_training_images",
  ),
  Mutation(
    "layer-chosen-on-test",
    "probing/probe_tables.py",
    'max(rows, key=lambda row: row["validation_accuracy"])',
    'max(rows, key=lambda row: row["test_accuracy"])',
    f"{_CHOICES}::test_the_best_layer_is_validations",
  ),
  Mutation(
    "rate-chosen-on-test",
    "probing/sgd_run.py",
    "zip(layers, validation_RxF.argmax(0), strict=True)",
    "zip(layers, test_RxF.argmax(0), strict=True)",
    f"{_CHOICES}::test_the_best_learning_rate_is_validations",
  ),
  Mutation(
    "strength-chosen-on-test",
    "probing/linear.py",
    "logistic.fit(*train, strengths, **settings).accuracy(*validation)",
    "logistic.fit(*train, strengths, **settings).accuracy(*test)",
    _CHOSEN,
  ),
  Mutation(
    "no-refit-with-validation",
    "probing/linear.py",
    "zip(train, validation, strict=True)",
    "zip(train, (part[:0] for part in validation), strict=True)",
    _CHOSEN,
  ),
  Mutation(
    "few-labels-chosen-on-test",
    "probing/linear.py",
    "on_validation_MxS = fitted.accuracy(*validation)",
    "on_validation_MxS = fitted.accuracy(*test)",
    f"{_LINEAR}::test_few_labels_are_averages_over_subsets",
  ),
  Mutation(
    "one-class-often",
    "probing/linear.py",
    "rng.choice(of_class, per_class, replace=False)",
    "rng.choice(of_class, per_class)",
    f"{_LINEAR}::test_balanced_subsets",
  ),
  Mutation(
    "standardised-by-the-rows-tested",
    "probing/logistic.py",
    "((rows - mean) / scale)",
    "((rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-12))",
    f"{_LOGISTIC}::test_correlated_features",
  ),
  Mutation(
    "scale-without-the-mean",
    "probing/logistic.py",
    "sum(np.square(features[part] - mean).sum(0) for part in parts) / n",
    "sum(np.square(features[part]).sum(0) for part in parts) / n",
    f"{_LOGISTIC}::test_standardised_as_by_scikit_learn",
  ),
  Mutation(
    "two-classes-penalised-once",
    "probing/logistic.py",
    "np.where(present_MxK.sum(1) == 2, 2.0, 1.0)",
    "np.where(present_MxK.sum(1) == 2, 1.0, 1.0)",
    f"{_LOGISTIC}::test_two_classes",
  ),
  Mutation(
    "bias-penalised",
    "probing/logistic.py",
    "jnp.append(jnp.ones(x_MxRxN.shape[1] - 1), 0.0)",
    "jnp.append(jnp.ones(x_MxRxN.shape[1] - 1), 1.0)",
    f"{_LOGISTIC}::test_correlated_features",
  ),
  Mutation(
    "absent-classes-likely",
    "probing/logistic.py",
    "jnp.where(present_MxK, 0.0, -jnp.inf)",
    "jnp.where(present_MxK, 0.0, 0.0)",
    f"{_LOGISTIC}::test_classes_that_no_row_has",
  ),
  Mutation(
    "stops-ten-times-too-early",
    "probing/lbfgs.py",
    "return (largest <= tolerance) & (-0.5 * slope <= PROMISE * value)",
    "return largest <= 10 * tolerance",
    f"{_LOGISTIC}::test_the_tolerance_holds_for_standardised_features",
  ),
  Mutation(
    "newest-pair-first",
    "probing/lbfgs.py",
    "at = (newest + 1 + ahead) % MEMORY",
    "at = (newest - ahead) % MEMORY",
    "unit/probing/test_lbfgs.py::test_two_loops_are_the_updates_one_after_the_other",
  ),
  Mutation(
    "cosine-of-the-probe-too-long",
    "probing/sgd.py",
    "optax.cosine_decay_schedule(1.0, steps)",
    "optax.cosine_decay_schedule(1.0, steps + 1)",
    f"{_SGD}::test_each_classifier_is_as_if_trained_alone",
  ),
  Mutation(
    "probe-tested-on-padding",
    "probing/sgd.py",
    '(logits.argmax(-1) == batch["label"]) & batch["mask"]',
    '(logits.argmax(-1) == batch["label"])',
    f"{_SGD}::test_evaluation_counts_what_the_mask_counts",
  ),
  Mutation(
    "rates-in-another-order",
    "probing/sgd.py",
    "rates.reshape(-1, *[1] * (u.ndim - 1))",
    "rates[::-1].reshape(-1, *[1] * (u.ndim - 1))",
    f"{_SGD}::test_each_classifier_is_as_if_trained_alone",
  ),
  Mutation(
    "attention-unscaled",
    "probing/attentive.py",
    "asked * of_heads[1] ** -0.5",
    "asked",
    f"{_ATTENTIVE}::test_a_head_is_multi_head_attention_with_one_query",
  ),
  Mutation(
    "positions-not-normalised",
    "probing/feeds.py",
    '(positions - moments["mean"]) * moments["scale"]',
    'positions - moments["mean"]',
    f"{_ATTENTIVE}::test_features_are_those_of_all_positions_normalised",
  ),
  Mutation(
    "rows-counted-before-they-are-written",
    "probing/store.py",
    "    for array in self._arrays:\n      array.flush()\n    self._store._done(",
    "    self._store._done(",
    "unit/probing/test_feature_store.py::test_rows_are_flushed_before_they_count",
  ),
)
