"""The model computes what the released code does, weights imported from both formats.

Against golden files of the original where they are, and always against `numpy_reference`.
Tolerances: float32 noise between frameworks moves logits by 5e-6; the smallest mistake planted in
the model (epsilon 1e-6) by 4e-4.
"""

import functools
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.model.decoding import autoregressive
from igpt_jax.model.image_gpt import bind
from igpt_jax.pretrained import formats, huggingface, openai
from igpt_jax.pretrained.tensor_bundle import Bundle, write_bundle
from igpt_jax.training import joint as joint_lib
from igpt_jax.training.objectives import per_image, token_nll
from igpt_jax.training.state import HEAD
from support import golden_files, numpy_reference

CASES = {
  "a16-openai": ("a16", "openai/model.ckpt-1000"),
  "a16-huggingface": ("a16", "hf"),
  "c8bert-openai": ("c8bert", "openai/model.ckpt-500"),
}


@pytest.fixture(autouse=True)
def full_precision():
  """On an accelerator, float32 matmuls are otherwise done in fewer bits."""
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def load_case(name):
  """(configuration, parameters, inputs, expected outputs, expected gradient norms)."""
  directory, weights = CASES[name]
  loaded = formats.load(golden_files.golden(directory, *weights.split("/")))
  inputs, outputs, grads = (
    golden_files.arrays(directory, f"{file}.npz")
    for file in ("inputs", "outputs_openai", "grads_openai")
  )
  return loaded.config, loaded.params, inputs, outputs, grads


@pytest.fixture(params=CASES)
def case(request):
  return load_case(request.param)


@functools.partial(jax.jit, static_argnums=0)
def losses(config, params, inputs):
  """(logits, per token nll, per image loss)."""
  model = bind(config, params)
  tokens = inputs["tokens"]
  keep = None if config.causal else inputs["keep_mask"]
  weight = jnp.ones(tokens.shape) if keep is None else 1.0 - keep
  logits = model(tokens, keep)
  nll = token_nll(logits, tokens)
  return logits, nll, per_image(nll, weight)


def joint(config, params, inputs, classification=1.0):
  """Fine-tuning's loss with a head at the last layer, and its parts."""
  return joint_lib.joint_loss(
    config,
    joint_lib.JointLoss(layer=config.n_layer, classification=classification),
    {**params, HEAD: inputs["wclf"]},
    inputs["tokens"],
    inputs["labels"],
    None if config.causal else inputs["keep_mask"],
  )


def test_logits_and_losses(case):
  config, params, inputs, outputs, _ = case
  logits, nll, image_loss = losses(config, params, inputs)
  np.testing.assert_allclose(logits, outputs["gen_logits"], rtol=0, atol=5e-5)
  np.testing.assert_allclose(nll, outputs["per_token_nll"], rtol=0, atol=5e-5)
  np.testing.assert_allclose(image_loss, outputs["per_image_loss"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(jnp.mean(image_loss), outputs["gen_loss"], rtol=0, atol=1e-5)


def test_classification(case):
  """Fine-tuning's both losses, its logits and its accuracy."""
  config, params, inputs, outputs, _ = case
  total, parts = joint(config, params, inputs)
  np.testing.assert_allclose(parts["generative_loss"], outputs["gen_loss"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(parts["classification_loss"], outputs["clf_loss"], rtol=0, atol=1e-5)
  expected = outputs["gen_loss"] + outputs["clf_loss"]
  np.testing.assert_allclose(total, expected, rtol=0, atol=2e-5)
  np.testing.assert_allclose(100 * parts["accuracy"], outputs["accuracy_pct"], rtol=0, atol=1e-3)
  class_logits, image_loss = joint_lib.forward(
    config,
    {**params, HEAD: inputs["wclf"]},
    inputs["tokens"],
    None if config.causal else inputs["keep_mask"],
    layer=config.n_layer,
  )
  np.testing.assert_allclose(class_logits, outputs["clf_logits"], rtol=0, atol=5e-5)
  np.testing.assert_allclose(image_loss, outputs["per_image_loss"], rtol=0, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def inner_states(config, params, tokens, keep):
  """(hidden states [L + 1, B, T, D] as transformers gives them, the probe's features)."""
  model = bind(config, params)
  final, entering = model.hidden(model.embed(tokens, keep), collect=lambda block, x, qkv: x)
  return jnp.concatenate([entering, final[None]]), model.features(tokens, keep)


def test_hidden_states_and_features(case):
  config, params, inputs, outputs, _ = case
  hidden, features = inner_states(config, params, inputs["tokens"], inputs.get("keep_mask"))
  np.testing.assert_allclose(hidden, outputs["hidden_states"], rtol=0, atol=5e-5)
  last = bind(config, params).ln_f(jnp.asarray(outputs["last_block_out"]))
  np.testing.assert_allclose(last, outputs["hidden_states"][-1], rtol=0, atol=5e-5)
  np.testing.assert_allclose(features, outputs["pooled_ln"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("objective", ["norm", "norm_joint"])
def test_gradient_norms(case, objective):
  """Of every variable, under the generative loss and with the classifier's added (1:1)."""
  config, params, inputs, _, norms = case

  def loss(params, wclf):
    weight = 1.0 if objective == "norm_joint" else 0.0
    return joint(config, params, inputs | {"wclf": wclf}, weight)[0]

  grads, grad_wclf = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, inputs["wclf"])
  found = {
    name: np.linalg.norm(value)
    for name, value in openai.foreign_tensors(openai.table(config), grads)
  }
  if objective == "norm_joint":
    found["model/clf/wclf"] = np.linalg.norm(grad_wclf)
  expected = {
    key.removeprefix(objective + "/"): value
    for key, value in norms.items()
    if key.startswith(objective + "/")
  }
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["a16-openai", "a16-huggingface"])
def test_transformers_outputs(name):
  """Hugging Face's own implementation agrees: another witness of the same numbers."""
  config, params, inputs, _, _ = load_case(name)
  outputs = golden_files.arrays("a16", "outputs_hf.npz")
  logits, _, image_loss = losses(config, params, inputs)
  np.testing.assert_allclose(logits[:1], outputs["gen_logits_first_image"], rtol=0, atol=5e-5)
  np.testing.assert_allclose(image_loss, outputs["per_image_loss"], rtol=0, atol=1e-5)
  _, features = inner_states(config, params, inputs["tokens"], None)
  np.testing.assert_allclose(features, outputs["pooled_ln"], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
  "output, n_given", [("greedy_from_sos", 0), ("greedy_half_completion", 128)]
)
def test_greedy_completion_matches_transformers(output, n_given):
  """Cached decoding takes the very pixels that transformers' generate takes."""
  config, params, inputs, _, _ = load_case("a16-openai")
  expected = golden_files.arrays("a16", "outputs_hf.npz")[output]
  complete = jax.jit(
    functools.partial(
      autoregressive.complete, config, sampling=autoregressive.SamplingConfig(temperature=0.0)
    )
  )
  keys = jax.random.split(jax.random.key(0), len(expected))
  samples = complete(params, prompt_BxP=inputs["tokens"][:, :n_given], keys_B=keys)
  np.testing.assert_array_equal(samples.tokens, expected)


@pytest.mark.parametrize("name", ["a16", "c8bert"])
def test_reference_agrees_with_the_original(name):
  prefix = golden_files.golden(name, "openai", f"model.ckpt-{1000 if name == 'a16' else 500}")
  inputs = golden_files.arrays(name, "inputs.npz")
  outputs = golden_files.arrays(name, "outputs_openai.npz")
  with Bundle(prefix) as bundle:
    variables = {name: bundle.read(name) for name in bundle.entries}
  found = numpy_reference.forward(variables, inputs["tokens"], inputs.get("keep_mask"))
  for key, theirs in {
    "logits": "gen_logits",
    "nll": "per_token_nll",
    "per_image": "per_image_loss",
    "hidden_states": "hidden_states",
    "last_block_out": "last_block_out",
    "pooled": "pooled_ln",
  }.items():
    np.testing.assert_allclose(found[key], outputs[theirs], rtol=0, atol=1e-5, err_msg=key)


# --- From here on nothing is needed but this repository. ---

SHAPES = {
  "autoregressive": dict(n_layer=3, n_head=4, n_embd=32, n_vocab=64, n_positions=49, causal=True),
  "bert": dict(n_layer=2, n_head=3, n_embd=24, n_vocab=512, n_positions=36, causal=False),
  "one head": dict(n_layer=1, n_head=1, n_embd=16, n_vocab=7, n_positions=16, causal=True),
}


def random_case(shape, seed=0):
  """(variables, tokens, keep mask or None), random but for a constant first image."""
  rng = np.random.default_rng(seed + 1)
  variables = numpy_reference.random_variables(seed, **shape)
  tokens = rng.integers(shape["n_vocab"], size=(3, shape["n_positions"]), dtype=np.int32)
  tokens[0] = shape["n_vocab"] - 1
  keep = None if shape["causal"] else (rng.random(tokens.shape) > 0.15).astype(np.uint8)
  return variables, tokens, keep


def import_variables(variables):
  with tempfile.TemporaryDirectory() as directory:
    prefix = os.path.join(directory, "model.ckpt-1")
    write_bundle(prefix, variables.items())
    return formats.load(prefix)


@pytest.mark.parametrize("shape", SHAPES)
def test_model_agrees_with_reference(shape):
  variables, tokens, keep = random_case(SHAPES[shape])
  expected = numpy_reference.forward(variables, tokens, keep)
  loaded = import_variables(variables)
  inputs = {"tokens": tokens, "keep_mask": keep}
  logits, nll, image_loss = losses(loaded.config, loaded.params, inputs)
  np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=5e-5)
  np.testing.assert_allclose(nll, expected["nll"], rtol=0, atol=5e-5)
  np.testing.assert_allclose(image_loss, expected["per_image"], rtol=0, atol=1e-5)
  hidden, features = inner_states(loaded.config, loaded.params, tokens, keep)
  np.testing.assert_allclose(features, expected["pooled"], rtol=0, atol=5e-5)
  np.testing.assert_allclose(hidden, expected["hidden_states"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape", ["autoregressive", "bert"])
def test_gradients_agree_with_reference(shape):
  """Along a random direction in each variable, against the reference's central difference."""
  variables, tokens, keep = random_case(SHAPES[shape])
  loaded = import_variables(variables)
  inputs = {"tokens": tokens, "keep_mask": keep}
  loss = jax.jit(lambda params: jnp.mean(losses(loaded.config, params, inputs)[2]))
  grads = jax.grad(loss)(loaded.params)
  rng = np.random.default_rng(5)
  for name, grad in openai.foreign_tensors(openai.table(loaded.config), grads):
    direction = rng.standard_normal(grad.shape)
    step = 1e-5
    ends = [
      numpy_reference.forward(
        variables | {name: variables[name] + sign * step * direction}, tokens, keep
      )["per_image"].mean()
      for sign in (1, -1)
    ]
    expected = (ends[0] - ends[1]) / (2 * step)
    tolerance = 1e-4 * np.linalg.norm(grad) * np.linalg.norm(direction)
    assert abs(np.vdot(grad, direction) - expected) <= tolerance, name


@pytest.mark.parametrize("mistake", ["epsilon", "tanh gelu", "q and k swapped", "last position"])
def test_a_mistake_would_show(mistake):
  """The comparison above can fail: each of these moves some logit by well over its tolerance."""
  variables, tokens, _ = random_case(SHAPES["autoregressive"])
  right = numpy_reference.forward(variables, tokens)["logits"]
  wrong, options = dict(variables), {}
  if mistake == "epsilon":
    options["epsilon"] = 1e-6
  elif mistake == "tanh gelu":
    options["activation"] = lambda x: (
      0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    )
  elif mistake == "q and k swapped":
    wrong["model/h0/attn/q_proj"] = variables["model/h0/attn/k_proj"]
    wrong["model/h0/attn/k_proj"] = variables["model/h0/attn/q_proj"]
  else:
    wrong["model/wpe"] = np.roll(variables["model/wpe"], 1, axis=0)
  moved = np.abs(numpy_reference.forward(wrong, tokens, **options)["logits"] - right).max()
  assert moved > 4 * 5e-5


def test_huggingface_layout_agrees_with_reference(tmp_path):
  """Both layouts of the same weights give the same model, whichever way they were written."""
  variables, tokens, _ = random_case(SHAPES["autoregressive"])
  loaded = import_variables(variables)
  huggingface.write_directory(tmp_path / "hf", loaded.config, loaded.params)
  again = formats.load(tmp_path / "hf")
  logits = losses(again.config, again.params, {"tokens": tokens})[0]
  expected = numpy_reference.forward(variables, tokens)["logits"]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5)
