"""Probes by SGD: all classifiers at once are each of them alone, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igpt_jax.parallel import sharding
from igpt_jax.probing import sgd
from igpt_jax.training.state import TrainState
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

CLASSES, STEPS, BATCH = 3, 12, 16
RATES = (1.0, 0.1, 3e38)  # the last one diverges, to infinity and beyond
GROUPS = {"layer": sgd.Linear(2, 8), "pixels": sgd.Linear(1, 5)}


def batches(seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(STEPS):
    labels = rng.integers(CLASSES, size=BATCH).astype(np.int32)
    noise = rng.standard_normal
    yield {
      "label": labels,
      "layer": (noise((BATCH, 2, 8)) + labels[:, None, None]).astype(np.float32),
      "pixels": noise((BATCH, 1, 5)).astype(np.float32),
    }


def extract(frozen, batch):
  scale = frozen["scale"]
  return {name: jnp.swapaxes(batch[name], 0, 1) * scale for name in GROUPS}


def trained(mesh, frozen_scale=1.0):
  """(probes, metrics of every step) after all batches."""
  optimizer = sgd.make_optimizer(RATES, STEPS)
  frozen = {"scale": jnp.float32(frozen_scale)}

  def fresh(frozen) -> TrainState:
    return sgd.make_state(GROUPS, optimizer, len(RATES), CLASSES, frozen, 0)

  with jax.set_mesh(mesh):
    everywhere = sharding.replicated(mesh)
    shardings = sgd.state_shardings(jax.eval_shape(fresh, frozen), mesh, {"scale": everywhere})
    state = tiny.jit(fresh, out_shardings=shardings)(frozen)
    step = tiny.jit(
      sgd.make_train_step(extract, GROUPS, optimizer), out_shardings=(shardings, everywhere)
    )
    told = []
    for batch in batches():
      state, metrics = step(state, sharding.put_batch(batch, mesh))
      told.append({name: float(value) for name, value in metrics.items()})
    assert step._cache_size() == 1
  return state, told


@pytest.fixture(scope="module")
def of_one_device():
  return trained(tiny.mesh_of())


def test_each_classifier_is_as_if_trained_alone(of_one_device):
  state, _ = of_one_device
  for rate_at, rate in enumerate(RATES[:2]):
    for layer in range(2):
      optimizer = optax.sgd(optax.cosine_decay_schedule(rate, STEPS), momentum=0.9)
      params = {"weights": jnp.zeros((8, CLASSES)), "bias": jnp.zeros(CLASSES)}
      opt_state = optimizer.init(params)

      def loss(params, x, labels):
        logits = x @ params["weights"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

      gradient = tiny.jit(jax.grad(loss))
      for batch in batches():
        grads = gradient(params, batch["layer"][:, layer], batch["label"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
      found = state.params["probes"]["layer"]
      for name in params:
        np.testing.assert_allclose(
          found[name][rate_at, layer], params[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_one_that_diverges_spoils_no_other(of_one_device):
  state, told = of_one_device
  weights = np.asarray(state.params["probes"]["layer"]["weights"])
  assert not np.isfinite(weights[2]).all()
  assert np.isfinite(weights[:2]).all()
  assert np.isfinite([each["probe_loss"] for each in told]).all()
  assert told[-1]["probe_loss"] < 0.8 * told[0]["probe_loss"]


@pytest.mark.parametrize("shape", tiny.MESHES, ids=str)
def test_any_mesh_gives_the_same_curve(of_one_device, shape):
  mesh = tiny.mesh_of(shape)
  state, told = trained(mesh)
  for ours, theirs in zip(told, of_one_device[1], strict=True):
    assert ours["probe_loss"] == pytest.approx(theirs["probe_loss"], rel=1e-5)
    assert ours["accuracy"] == theirs["accuracy"]
  weights = state.params["probes"]["layer"]["weights"]
  parts = sharding.axis_parts(mesh, "embed")
  assert weights.addressable_shards[0].data.shape == (3, 2, 8 // parts, CLASSES)


def test_what_is_frozen_stays(of_one_device):
  assert float(of_one_device[0].params["frozen"]["scale"]) == 1.0
  other, _ = trained(tiny.mesh_of(), frozen_scale=0.5)
  left, right = (s.params["probes"]["layer"]["weights"][0] for s in (other, of_one_device[0]))
  assert np.abs(left - right).max() > 0.01


def test_evaluation_counts_what_the_mask_counts(of_one_device):
  state, _ = of_one_device
  batch = next(batches(1))
  step = tiny.jit(sgd.make_eval_step(extract, GROUPS))
  mask = np.arange(BATCH) < 10
  correct, counted = step(state.params, {**batch, "mask": mask})
  assert int(counted) == 10
  probes = state.params["probes"]["pixels"]
  logits = batch["pixels"][:, 0] @ probes["weights"][1, 0] + probes["bias"][1, 0]
  expected = (np.asarray(logits).argmax(-1) == batch["label"])[:10].sum()
  assert int(correct["pixels"][1, 0]) == expected
  assert correct["layer"].shape == (3, 2)
