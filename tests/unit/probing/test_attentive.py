"""Attentive probes: AIM's head, each classifier on its own, and what a mean of positions can't see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.parallel import sharding
from igpt_jax.probing import attentive, feeds, sgd
from igpt_jax.probing import sets as sets_lib
from igpt_jax.probing.attentive import Attentive
from support import own_checkpoint, tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

RATES, SETS, IMAGES, POSITIONS, WIDTH, HEADS, CLASSES = 2, 3, 5, 7, 8, 4, 3
HEAD = Attentive(SETS, WIDTH, HEADS)


def random_head(seed=0):
  """(parameters, features); nothing is zero, as weights and biases are at the start."""
  rng = np.random.default_rng(seed)
  probe = HEAD.init(RATES, CLASSES, jax.random.key(seed))
  probe = {name: rng.standard_normal(leaf.shape).astype("f4") for name, leaf in probe.items()}
  return probe, rng.standard_normal((SETS, IMAGES, POSITIONS, WIDTH)).astype("f4")


def test_a_head_is_multi_head_attention_with_one_query():
  """Keys and values are made here position by position, as AIM's code makes them."""
  probe, features = random_head()
  found = tiny.jit(HEAD.logits)(probe, features)
  assert found.shape == (RATES, SETS, IMAGES, CLASSES)
  size = WIDTH // HEADS
  for rate in range(RATES):
    for each in range(SETS):
      own = {name: leaf[rate, each].astype(np.float64) for name, leaf in probe.items()}
      for image in range(IMAGES):
        x, pooled = features[each, image].astype(np.float64), []
        for head in range(HEADS):
          part = slice(head * size, (head + 1) * size)
          scores = (x @ own["keys"])[:, part] @ own["query"][part] / np.sqrt(size)
          weights = np.exp(scores - scores.max())
          pooled.append(weights / weights.sum() @ (x @ own["values"])[:, part])
        expected = np.concatenate(pooled) @ own["weights"] + own["bias"]
        np.testing.assert_allclose(found[rate, each, image], expected, rtol=1e-4, atol=1e-4)


def test_with_a_query_of_zero_it_is_the_linear_probe_of_means():
  probe, features = random_head(1)
  probe["query"] = np.zeros_like(probe["query"])
  linear = {
    "weights": np.einsum("rfde,rfek->rfdk", probe["values"], probe["weights"]),
    "bias": probe["bias"],
  }
  expected = sgd.Linear(SETS, WIDTH).logits(linear, features.mean(2))
  np.testing.assert_allclose(HEAD.logits(probe, features), expected, rtol=1e-4, atol=1e-4)


def test_where_heads_begin():
  """All rates begin alike, sets don't; a query's scores begin nearly equal."""
  probe = Attentive(2, 64, 4).init(3, 5, jax.random.key(1))
  for name, leaf in probe.items():
    np.testing.assert_array_equal(leaf[0], leaf[2], err_msg=name)
  assert np.abs(probe["keys"][0, 0] - probe["keys"][0, 1]).max() > 0.1
  assert np.std(probe["query"]) == pytest.approx(0.02, rel=0.2)
  for name in ("keys", "values"):
    assert np.std(probe[name]) == pytest.approx(1 / 8, rel=0.05)
  assert not np.any(probe["weights"]) and not np.any(probe["bias"])
  other = Attentive(2, 64, 4).init(3, 5, jax.random.key(2))
  assert np.abs(probe["query"] - other["query"]).max() > 0.01


def test_heads():
  assert attentive.heads_of(0, 16, 2) == 2 and attentive.heads_of(8, 16, 2) == 8
  with pytest.raises(UserError, match=r"probe\.heads: 3 .*16 features.*1, 2, 4, 8, 16.*model's 2"):
    attentive.heads_of(3, 16, 2)


# --- training ----------------------------------------------------------------------------------------

STEPS, BATCH = 150, 64


def marked(seed):
  """Each of three values stands at two of six positions, one of which has the mark: its value counts.

  The sum over positions is the same for all images: a mean knows nothing.
  """
  rng = np.random.default_rng(seed)
  values = np.stack([rng.permutation(np.arange(6) % 3) for _ in range(BATCH)])
  place = rng.integers(6, size=BATCH)
  x = np.zeros((BATCH, 6, 8), np.float32)
  x[..., :3] = np.eye(3)[values]
  x[np.arange(BATCH), place, 3] = 1
  x = (x - x.mean((0, 1))) / (x.std((0, 1)) + 1e-3)
  return {"x": x, "label": values[np.arange(BATCH), place].astype(np.int32)}


TOY = {"layer": Attentive(2, 8, 2), "means": sgd.Linear(1, 8)}


def extract(frozen, batch):
  del frozen
  x = batch["x"]
  return {"layer": jnp.stack([x, x[..., ::-1]]), "means": x.mean(1)[None]}


def trained(rates, steps, mesh=None):
  """(state, losses of every step)"""
  mesh = mesh or tiny.mesh_of()
  optimizer = attentive.make_optimizer(rates, STEPS)

  def fresh(frozen):
    return sgd.make_state(TOY, optimizer, len(rates), 3, frozen, seed=0)

  with jax.set_mesh(mesh):
    shardings = sgd.state_shardings(jax.eval_shape(fresh, {}), mesh, {})
    state = tiny.jit(fresh, out_shardings=shardings)({})
    step = tiny.jit(
      sgd.make_train_step(extract, TOY, optimizer),
      out_shardings=(shardings, sharding.replicated(mesh)),
    )
    losses = []
    for number in range(steps):
      state, metrics = step(state, sharding.put_batch(marked(number), mesh))
      losses.append(float(metrics["probe_loss"]))
  return state, losses


def test_it_finds_what_a_mean_has_lost():
  state, _ = trained((3e-2,), STEPS)
  evaluate = tiny.jit(sgd.make_eval_step(extract, TOY))
  correct, counted = evaluate(state.params, marked(10**6) | {"mask": np.ones(BATCH, bool)})
  assert (np.asarray(correct["layer"]) > 0.95 * counted).all()
  assert correct["means"][0, 0] < 0.6 * counted


def test_no_classifier_depends_on_another():
  """Neither on one of another rate, which diverges, nor on another set's."""
  together, losses = trained((1e-2, 1e38), 8)
  alone, _ = trained((1e-2,), 8)
  for name in TOY:
    for key, leaf in alone.params["probes"][name].items():
      np.testing.assert_allclose(
        together.params["probes"][name][key][0], leaf[0], rtol=1e-4, atol=1e-6, err_msg=key
      )
  assert not np.isfinite(np.asarray(together.params["probes"]["layer"]["weights"][1])).all()
  assert np.isfinite(losses).all()


@pytest.fixture(scope="module")
def on_one_device():
  return trained((3e-2, 1e-3), 60)[1]


@pytest.mark.parametrize("shape", tiny.MESHES, ids=str)
def test_any_mesh_gives_the_same_curve(on_one_device, shape):
  mesh = tiny.mesh_of(shape)
  state, losses = trained((3e-2, 1e-3), 60, mesh)
  np.testing.assert_allclose(losses, on_one_device, rtol=1e-3)
  assert losses[-1] < 0.8 * losses[0]
  parts = sharding.axis_parts(mesh, "embed")
  for name in ("keys", "values"):
    leaf = state.params["probes"]["layer"][name]
    assert leaf.addressable_shards[0].data.shape == (2, 2, 8 // parts, 8)


# --- features ----------------------------------------------------------------------------------------


def test_features_are_those_of_all_positions_normalised(tmp_path, monkeypatch):
  """In raster order, with mean 0 and variance 1 over training images; stored or computed anew."""
  monkeypatch.setattr(jax, "devices", lambda *args: jax.local_devices()[:1])
  settings = tiny.settings_of(changes={
    "checkpoint": own_checkpoint.write(tmp_path / "run", resolution=8),
    "probe.pooling": "attentive", "probe.batch_size": 64, "features.batch_size": 64,
    "features.images": 120, "features.eval_images": 20, "features.layers": (0, 2),
    "features.baselines": ("random",),
  })  # fmt: skip
  pooled = sets_lib.open_source(settings, str(tmp_path))
  source, model = feeds.by_position(pooled), pooled.trained.config
  found = []
  for cached in (True, False):
    chosen = tiny.changed(settings, {"probe.cached": cached})
    feed = feeds.open_feed(chosen, str(tmp_path), source)
    head = Attentive(2, model.n_embd, model.n_head)
    assert feed.groups == {"layer": head, "random": head}
    parts, extract = [], tiny.jit(feed.extract)
    for batch in feed.rows_of("train"):
      features = extract(feed.frozen, batch)
      parts.append({name: np.asarray(x)[:, batch["mask"]] for name, x in features.items()})
    found.append({name: np.concatenate([p[name] for p in parts], axis=1) for name in feed.groups})
  for name, x in found[0].items():
    assert x.shape == (2, 120, 64, model.n_embd)
    np.testing.assert_allclose(x, found[1][name], rtol=0, atol=1e-3)
    np.testing.assert_allclose(x.mean((1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(x.var((1, 2)), 1, rtol=0.02)
  # Their means over positions are the mean's features, normalised alike; and positions differ.
  sets = sets_lib.extract(settings, str(tmp_path), pooled)
  moments = jax.device_get(feed.frozen["moments"]["layer"])
  x = found[0]["layer"]
  for at, layer in enumerate(each for each in sets if each.kind == "layer"):
    expected = (layer.parts()[0][0] - moments["mean"][at]) * moments["scale"][at]
    np.testing.assert_allclose(x[at].mean(1), expected, rtol=1e-3, atol=1e-3)
  assert np.abs(x[0][:, 0] - x[0][:, 1]).max() > 0.1
