"""Mistakes in drawing: the key-value cache, the filters, BERT's order, and what samples' nats count."""

from support.mutations.mutation import Mutation

_DECODING = "unit/model/test_decoding.py"
_CACHED = f"{_DECODING}::test_cached_logits_are_those_of_the_full_forward"
_CODES = "unit/model/test_codes.py"
_FILTERS = f"{_DECODING}::test_filters_against_numpy"
_LITERAL = "unit/model/test_decoding_masked.py::test_greedy_is_that_of_a_literal_loop"
_NATS = "jobs/test_drawn_nats.py"

MUTATIONS = (
  Mutation(
    "newest-key-unseen",
    "model/decoding/attend.py",
    "jnp.arange(block.length) <= last",
    "jnp.arange(block.length) < last",
    _CACHED,
  ),
  Mutation(
    "cache-position-off-by-one",
    "model/decoding/decode_step.py",
    "at = position - prompt.length - done.length",
    "at = position - prompt.length - done.length - 1",
    _CACHED,
  ),
  Mutation(
    "decoded-position-shifted",
    "model/decoding/decode_step.py",
    "tables.wpe[position]",
    "tables.wpe[position - 1]",
    _CACHED,
  ),
  Mutation(
    "first-pixel-without-start",
    "model/decoding/decode_step.py",
    "jnp.where(position == 0, tables.sos, embedded)",
    "jnp.where(position < 0, tables.sos, embedded)",
    _CACHED,
  ),
  Mutation(
    "codes-rounded-before-they-are-summed",
    "model/decoding/decode_step.py",
    'of_codes = dtype if model.config.tokens.codes == 1 else jnp.dtype("float32")',
    "of_codes = dtype",
    f"{_CODES}::test_parameters_may_be_kept_as_they_are_multiplied",
  ),
  Mutation(
    "prompt-keys-for-values",
    "model/decoding/cache.py",
    "store(qkv_3xBxTxE[1].reshape(shape), qkv_3xBxTxE[2].reshape(shape), dtype)",
    "store(qkv_3xBxTxE[1].reshape(shape), qkv_3xBxTxE[1].reshape(shape), dtype)",
    _CACHED,
  ),
  Mutation(
    "int8-by-the-mean",
    "model/decoding/cache.py",
    "jnp.max(jnp.abs(x), axis=-1, keepdims=True)",
    "jnp.mean(jnp.abs(x), axis=-1, keepdims=True)",
    f"{_DECODING}::test_cache_dtypes",
  ),
  Mutation(
    "nats-of-the-pixel-before",
    "model/decoding/autoregressive.py",
    "jax.lax.dynamic_update_slice_in_dim(nll, nats[:, None], position, axis=1)",
    "jax.lax.dynamic_update_slice_in_dim(nll, nats[:, None], column, axis=1)",
    f"{_DECODING}::test_nll_is_that_of_the_full_forward",
  ),
  Mutation(
    "one-draw-for-all-pixels",
    "model/decoding/draw.py",
    "jax.random.fold_in(key, turn)",
    "jax.random.fold_in(key, 0)",
    f"{_DECODING}::test_samples_follow_the_distribution",
  ),
  Mutation(
    "greedy-draws",
    "model/decoding/draw.py",
    "jnp.where(values.greedy, logits, noisy)",
    "jnp.where(values.greedy, noisy, noisy)",
    f"{_DECODING}::test_greedy_takes_the_likeliest_everywhere",
  ),
  Mutation(
    "temperature-multiplies",
    "model/decoding/draw.py",
    "np.float32(1) / np.float32(self.temperature or 1)",
    "np.float32(self.temperature or 1)",
    _FILTERS,
  ),
  Mutation(
    "temperature-after-top-p",
    "model/decoding/draw.py",
    "jax.nn.softmax(ordered, axis=-1)",
    "jax.nn.softmax(ordered / values.inverse_temperature, axis=-1)",
    _FILTERS,
  ),
  Mutation(
    "top-k-keeps-one-more",
    "model/decoding/draw.py",
    "jnp.clip(top_k, 1, logits.shape[-1]) - 1",
    "jnp.clip(top_k, 0, logits.shape[-1] - 1)",
    _FILTERS,
  ),
  Mutation(
    "top-p-keeps-one-less",
    "model/decoding/draw.py",
    "(before >= top_p)",
    "(before + probability >= top_p)",
    _FILTERS,
  ),
  Mutation(
    "top-p-of-all-colours",
    "model/decoding/draw.py",
    "  ordered = jnp.where(ordered < kth, -jnp.inf, ordered)\n",
    "",
    _FILTERS,
  ),
  Mutation(
    "least-confident-first",
    "model/decoding/masked.py",
    "jnp.argsort(jnp.where(settled, jnp.inf, nats), axis=1, stable=True)",
    "jnp.argsort(jnp.where(settled, jnp.inf, -nats), axis=1, stable=True)",
    _LITERAL,
  ),
  Mutation(
    "unmasking-by-another-cosine",
    "model/decoding/masked.py",
    "jnp.cos(jnp.pi / 2 * done / steps)",
    "jnp.cos(jnp.pi / 2 * (done - 1) / steps)",
    _LITERAL,
  ),
  Mutation(
    "settled-pixels-unseen",
    "model/decoding/masked.py",
    "model.hidden(model.embed(tokens, settled))",
    "model.hidden(model.embed(tokens, settled & (nll == 0)))",
    _LITERAL,
  ),
  Mutation(
    "keep-rounded-down",
    "sampling/completer.py",
    "round(keep * resolution)",
    "int(keep * resolution)",
    "unit/sampling/test_completer.py::test_the_share_that_is_kept_is_rounded_to_rows",
  ),
  Mutation(
    "all-samples-of-an-image-alike",
    "sampling/completer.py",
    "return fold_in(\n",
    "return (lambda keys, numbers: keys)(\n",
    "unit/sampling/test_completer.py::test_a_samples_key_is_of_seed_image_and_number",
  ),
  Mutation(
    "all-images-drawn-alike",
    "sampling/completer.py",
    "jax.random.fold_in(base, identity)",
    "jax.random.fold_in(base, 0)",
    "unit/sampling/test_completer.py::test_a_samples_key_is_of_seed_image_and_number",
  ),
  Mutation(
    "frechet-without-the-cross-term",
    "sampling/frechet.py",
    "root @ b.covariance @ root",
    "root @ a.covariance @ root",
    "jobs/test_quality.py::test_the_distance_is_gaussians",
  ),
  Mutation(
    "frechet-of-means-unsquared",
    "sampling/frechet.py",
    "np.square(a.mean - b.mean).sum()",
    "np.abs(a.mean - b.mean).sum()",
    "jobs/test_quality.py::test_the_distance_is_gaussians",
  ),
  Mutation(
    "sample-nats-with-prompts",
    "jobs/sample.py",
    "completed_nll = completions.nll[:, completer.reader.positions(rows_given) :]",
    "completed_nll = completions.nll",
    f"{_NATS}::test_of_samples_and_completions",
  ),
  Mutation(
    "quality-nats-with-prompts",
    "jobs/quality.py",
    "float(of_completions[:, reader.positions(rows_given) :].mean())",
    "float(of_completions.mean())",
    f"{_NATS}::test_of_quality",
  ),
)
