"""The schedule at exact steps, and Adam against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
  "settings, expected",
  [
    (
      dict(steps=110, warmup_steps=10),
      {0: 0.0, 1: 0.1, 5: 0.5, 9: 0.9, 10: 1.0, 35: (1 + 0.5**0.5) / 2, 60: 0.5, 110: 0, 500: 0},
    ),
    (dict(steps=100), {0: 1.0, 25: (1 + 0.5**0.5) / 2, 50: 0.5, 100: 0.0}),
    (
      dict(steps=100, warmup_steps=4, schedule="constant"),
      {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 50: 1.0, 100: 1.0, 500: 1.0},
    ),
    (dict(steps=100, schedule="constant"), {0: 1.0, 99: 1.0}),
    (dict(steps=4, warmup_steps=4), {0: 0.0, 3: 0.75, 4: 1.0}),
    (
      dict(steps=100, warmup_steps=4, schedule="wsd", decay_steps=16, decay_shape="linear"),
      {0: 0.0, 1: 0.25, 4: 1.0, 50: 1.0, 84: 1.0, 85: 15 / 16, 92: 0.5, 99: 1 / 16, 100: 0, 500: 0},
    ),
    (
      dict(steps=100, schedule="wsd"),
      {0: 1.0, 80: 1.0, 81: 1 - 0.05**0.5, 85: 0.5, 95: 1 - 0.75**0.5, 100: 0, 500: 0},
    ),
  ],
  ids=[
    "warm-up and cosine",
    "cosine",
    "warm-up and constant",
    "constant",
    "warm-up alone",
    "warm-up, stable, linear",
    "stable, 1-sqrt",
  ],
)
@pytest.mark.parametrize("peak", [1.0, 3e-3])
def test_schedule_at_exact_steps(settings, expected, peak):
  schedule = make_schedule(OptimizerConfig(learning_rate=peak, **settings))
  found = [float(schedule(jnp.asarray(step, jnp.int32))) for step in expected]
  expected = [peak * share for share in expected.values()]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * peak)


def test_trunks_have_one_rate_whatever_the_length():
  """Bit for bit, compiled, as in training."""
  recipes = [
    OptimizerConfig(learning_rate=3e-3, steps=steps, warmup_steps=7, schedule="wsd", **decay)
    for steps, decay in ((50, {}), (999, {}), (47, {"decay_steps": 7, "decay_shape": "linear"}))
  ]
  assert [recipe.decays_from for recipe in recipes] == [40, 800, 40]
  made = [jax.jit(jax.vmap(make_schedule(recipe)))(jnp.arange(40)) for recipe in recipes]
  for rates in made:
    np.testing.assert_array_equal(rates, made[0])
  assert np.all(made[0][7:] == np.float32(3e-3))


@pytest.mark.parametrize(
  "decay, expected",
  [
    ({"decay_steps": 6}, "a decay of 6 leave .* expected more than 10"),
    ({"steps": 5}, "decay of 1"),
  ],
)
def test_a_trunk_without_a_stable_step_is_refused(decay, expected):
  recipe = dict(learning_rate=0.1, steps=10, warmup_steps=4, schedule="wsd") | decay
  with pytest.raises(UserError, match=expected):
    OptimizerConfig(**recipe)
  assert OptimizerConfig(**recipe | {"steps": recipe["steps"] + 1}).decays_from == 5


def test_schedule_rises_then_falls():
  schedule = make_schedule(OptimizerConfig(learning_rate=1.0, steps=300, warmup_steps=30))
  rates = np.asarray(jax.vmap(schedule)(jnp.arange(301)))
  assert np.all(np.diff(rates[:31]) > 0) and np.all(np.diff(rates[30:]) < 0)


def run(config, params, gradients):
  """The parameters after each gradient."""
  optimizer = make_optimizer(config)

  @tiny.jit
  def update(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  state, trace = tiny.jit(optimizer.init)(params), []
  for gradient in gradients:
    params, state = update(params, state, gradient)
    trace.append(params)
  return trace


def numpy_adam(config, params, gradients, *, decayed=()):
  """The same by the book (Kingma & Ba; decoupled decay: Loshchilov & Hutter)."""
  schedule = make_schedule(config)
  params = {name: np.asarray(value, np.float64) for name, value in params.items()}
  m, v = ({name: 0.0 for name in params} for _ in range(2))
  trace = []
  for t, gradient in enumerate(gradients):
    gradient = {name: np.asarray(g, np.float64) for name, g in gradient.items()}
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    for name, g in gradient.items():
      if config.clip_norm and norm > config.clip_norm:
        g = g * config.clip_norm / norm
      m[name] = config.b1 * m[name] + (1 - config.b1) * g
      v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
      m_hat = m[name] / (1 - config.b1 ** (t + 1))
      v_hat = v[name] / (1 - config.b2 ** (t + 1))
      step = m_hat / (np.sqrt(v_hat) + config.eps)
      if name in decayed:
        step = step + config.weight_decay * params[name]
      params[name] = params[name] - float(schedule(t)) * step
    trace.append(dict(params))
  return trace


def example():
  rng = np.random.default_rng(0)
  shapes = {"wte": (3, 4), "g": (2, 4), "sos": (4,)}

  def draw(size):
    return {
      name: (size * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()
    }

  return draw(1.0), [draw(size) for size in (1.0, 3.0, 0.1, 1e-3, 1.0)]


@pytest.mark.parametrize(
  "settings, decayed",
  [
    (dict(), ()),
    (dict(warmup_steps=2), ()),
    (dict(clip_norm=1.5), ()),
    (dict(weight_decay=0.3, b1=0.8, b2=0.9), ("wte",)),
  ],
  ids=["plain", "warm-up", "clipped", "decayed"],
)
def test_adam_against_numpy(settings, decayed):
  config = OptimizerConfig(learning_rate=0.1, steps=5, **settings)
  params, gradients = example()
  found = run(config, params, gradients)
  expected = numpy_adam(config, params, gradients, decayed=decayed)
  for ours, theirs in zip(found, expected, strict=True):
    for name in params:
      np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_papers_recipe_is_the_default():
  config = OptimizerConfig(learning_rate=1e-3, steps=10)
  assert (config.b1, config.b2, config.weight_decay, config.clip_norm) == (0.9, 0.95, 0.0, 0.0)
  assert (config.schedule, config.warmup_steps) == ("cosine", 0)


def test_only_matrices_decay():
  """With zero gradients what moves is what decays: gains don't, though they are stacked."""
  params = tiny.random_params(tiny.make_config())
  config = OptimizerConfig(learning_rate=0.1, steps=10, schedule="constant", weight_decay=0.5)
  after = tiny.leaf_names(run(config, params, [jax.tree.map(jnp.zeros_like, params)])[0])
  for name, before in tiny.leaf_names(params).items():
    shrunk = 1.0 if name.endswith("/g") or name == "sos" else 0.95
    np.testing.assert_allclose(after[name], shrunk * before, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  "field, value",
  [
    ("schedule", "step"), ("steps", 0), ("warmup_steps", -1), ("warmup_steps", 11),
    ("learning_rate", 0.0), ("learning_rate", float("nan")), ("b1", 1.0), ("b2", -0.1),
    ("decay_steps", -1), ("decay_shape", "sqrt"), ("weight_decay", -1.0), ("clip_norm", float("nan")),
  ],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value):
  with pytest.raises(UserError, match=f"train.{field}: {value!r}"):
    OptimizerConfig(**{**dict(learning_rate=0.1, steps=10), field: value})
