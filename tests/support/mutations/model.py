"""Mistakes in the transformer: its blocks, its attention, and what is summed in which dtype."""

from support.mutations.mutation import Mutation

_REFERENCE = "unit/model/test_golden.py::test_model_agrees_with_reference"
_ATTENTION = "unit/model/test_attention.py"
_MODEL = "unit/model/test_image_gpt.py"

MUTATIONS = (
  Mutation(
    "norm-epsilon",
    "model/layers.py",
    "NORM_EPSILON = 1e-5",
    "NORM_EPSILON = 1e-6",
    _REFERENCE,
  ),
  Mutation(
    "norm-less-mean",
    "model/layers.py",
    "jnp.square(x.astype(jnp.float32))",
    "jnp.square(x.astype(jnp.float32) - x.astype(jnp.float32).mean(axis, keepdims=True))",
    _REFERENCE,
  ),
  Mutation(
    "gelu-constant",
    "model/layers.py",
    "jax.nn.sigmoid(1.702 * hidden)",
    "jax.nn.sigmoid(1.7 * hidden)",
    _REFERENCE,
  ),
  Mutation(
    "residual-scale",
    "model/image_gpt.py",
    "1 / math.sqrt(width * config.n_layer)",
    "1 / math.sqrt(width)",
    f"{_MODEL}::test_initial_values",
  ),
  Mutation(
    "positions-shifted",
    "model/image_gpt.py",
    'gather_weight(self.wpe[...], "position", "embed")[:length]',
    'jnp.roll(gather_weight(self.wpe[...], "position", "embed"), 1, 0)[:length]',
    _REFERENCE,
  ),
  Mutation(
    "positions-from-the-end",
    "model/image_gpt.py",
    'gather_weight(self.wpe[...], "position", "embed")[:length]',
    'gather_weight(self.wpe[...], "position", "embed")[-length:]',
    f"{_MODEL}::test_fewer_positions_are_the_first_ones",
  ),
  Mutation(
    "no-start-vector",
    "model/image_gpt.py",
    "jnp.concatenate([start, x[:, :-1]], axis=1)",
    "jnp.concatenate([jnp.zeros_like(start), x[:, :-1]], axis=1)",
    f"{_MODEL}::test_start_vector_and_positions_are_seen_causally",
  ),
  Mutation(
    "input-not-shifted",
    "model/image_gpt.py",
    "jnp.concatenate([start, x[:, :-1]], axis=1)",
    "jnp.concatenate([start, x[:, 1:]], axis=1)",
    f"{_MODEL}::test_causality_by_gradient",
  ),
  Mutation(
    "masked-pixels-seen",
    "model/image_gpt.py",
    "x = x * keep_BxT[..., None].astype(dtype)",
    "x = x * jnp.ones_like(keep_BxT)[..., None].astype(dtype)",
    f"{_MODEL}::test_bert_sees_both_sides_of_what_is_visible",
  ),
  Mutation(
    "bert-causal",
    "model/attention/dispatch.py",
    "is_causal=causal, implementation=library",
    "is_causal=True, implementation=library",
    f"{_MODEL}::test_bert_sees_both_sides_of_what_is_visible",
  ),
  Mutation(
    "tables-tied",
    "model/image_gpt.py",
    "sharded_einsum(_TO_LOGITS, final, self.wtet[...])",
    "sharded_einsum(_TO_LOGITS, final, self.wte[...])",
    f"{_MODEL}::test_initial_loss_is_that_of_the_uniform_distribution",
  ),
  Mutation(
    "no-final-norm",
    "model/image_gpt.py",
    "    return self.ln_f(x_BxTxD), collected",
    "    return x_BxTxD, collected",
    _REFERENCE,
  ),
  Mutation(
    "features-before-the-norm",
    "model/image_gpt.py",
    "collect=lambda block, x, _: pool(block.ln_1(x))",
    "collect=lambda block, x, _: pool(x)",
    f"{_MODEL}::test_features_are_pooled_norms_of_what_enters_each_block",
  ),
  Mutation(
    "features-of-columns",
    "model/image_gpt.py",
    "n.astype(jnp.float32).reshape(blocks)",
    "n.astype(jnp.float32).reshape(blocks).swapaxes(1, 3)",
    "unit/probing/test_features.py::test_layers_and_a_grid_of_blocks",
  ),
  Mutation(
    "pooled-in-bfloat16",
    "model/image_gpt.py",
    "n.astype(jnp.float32).reshape(blocks)",
    "n.astype(jnp.bfloat16).reshape(blocks)",
    f"{_MODEL}::test_features_are_pooled_norms_of_what_enters_each_block",
  ),
  Mutation(
    "cast-before-lookup",
    "model/image_gpt.py",
    'gather_weight(self.wte[...], "vocab", "embed")[tokens_BxT].astype(dtype)',
    'gather_weight(self.wte[...].astype(dtype), "vocab", "embed")[tokens_BxT]',
    "unit/training/test_bfloat16.py::test_each_gradient_is_near_float32s",
  ),
  Mutation(
    "weights-summed-in-bfloat16",
    "model/projection.py",
    '{of_weight}", x, dout, preferred_element_type="float32")',
    '{of_weight}", x, dout)',
    "unit/training/test_bfloat16.py::test_weight_gradients_are_summed_over_devices_in_float32",
  ),
  Mutation(
    "causal-mask-off-by-one",
    "model/attention/blocked.py",
    "jnp.where(key <= query, scores, -jnp.inf)",
    "jnp.where(key <= query + 1, scores, -jnp.inf)",
    f"{_ATTENTION}::test_against_numpy",
  ),
  Mutation(
    "scores-scaled-twice",
    "model/attention/blocked.py",
    "scale = q_flipped.shape[-2] ** -0.5",
    "scale = q_flipped.shape[-2] ** -1.0",
    f"{_ATTENTION}::test_against_numpy",
  ),
  Mutation(
    "softmax-gradient",
    "model/attention/blocked.py",
    "(dweights - delta[..., queries])",
    "dweights",
    f"{_ATTENTION}::test_gradient_against_a_difference",
  ),
  Mutation(
    "fused-norm-of-the-other-half",
    "model/fused_stack.py",
    "layers.scaled_norm(middle, scale_2, gain_2)",
    "layers.scaled_norm(x, scale_2, gain_2)",
    "unit/model/test_layers.py::test_values_and_gradients_are_those_of_the_blocks",
  ),
)
