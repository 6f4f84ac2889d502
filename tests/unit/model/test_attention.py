"""Attention against numpy, one head and one image at a time."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.model.attention.dispatch import SAVED_NAMES, attention, choose
from igpt_jax.parallel import hardware
from support import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCH, LENGTH, N_HEAD, HEAD_DIM = 3, 10, 4, 6


def make_qkv(seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((3, BATCH, LENGTH, N_HEAD * HEAD_DIM)).astype(np.float32)


def reference(qkv, causal):
  out = np.empty(qkv.shape[1:], np.float64)
  for b in range(BATCH):
    for h in range(N_HEAD):
      head = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
      q, k, v = qkv[:, b, :, head].astype(np.float64)
      for t in range(LENGTH):
        seen = t + 1 if causal else LENGTH
        scores = k[:seen] @ q[t] / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max())
        out[b, t, head] = weights @ v[:seen] / weights.sum()
  return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "xla", "blocked"])
def test_against_numpy(causal, implementation):
  qkv = make_qkv()
  out = tiny.jit(
    functools.partial(attention, n_head=N_HEAD, causal=causal, implementation=implementation)
  )(qkv)
  assert out.dtype == jnp.float32
  # The accelerator a test may run on multiplies float32 in fewer bits.
  tolerance = 1e-5 if jax.default_backend() == "cpu" else 1e-2
  np.testing.assert_allclose(out, reference(qkv, causal), rtol=0, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_gradient_against_a_difference(causal, implementation):
  qkv = make_qkv()
  rng = np.random.default_rng(1)
  weight = rng.standard_normal(qkv.shape[1:])

  @tiny.jit
  @jax.grad
  def gradient(qkv):
    out = attention(qkv, n_head=N_HEAD, causal=causal, implementation=implementation)
    return jnp.sum(out * weight.astype(np.float32))

  with jax.default_matmul_precision("highest"):
    found = np.asarray(gradient(qkv), np.float64)
  for part in range(3):  # along a random direction in each of queries, keys, values
    direction = np.zeros(qkv.shape)
    direction[part] = rng.standard_normal(qkv.shape[1:])
    ends = [np.sum(reference(qkv + sign * 1e-5 * direction, causal) * weight) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / 2e-5
    scale = np.linalg.norm(found[part]) * np.linalg.norm(direction)
    assert abs(np.vdot(found, direction) - expected) < 1e-5 * scale
    assert np.abs(found[part]).max() > 0.1


@pytest.mark.parametrize("implementation", ["auto", "blocked"])
def test_half_precision_keeps_its_dtype_and_is_close(implementation):
  qkv = make_qkv()
  out = attention(
    jnp.asarray(qkv, jnp.bfloat16), n_head=N_HEAD, causal=True, implementation=implementation
  )
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), reference(qkv, True), rtol=0, atol=0.05)


@pytest.mark.parametrize("largest", [50, 70, 2000])
def test_scores_of_any_size(largest):
  """Softmax is the same, whether scores are so small that their exponentials are summed as they are or not."""
  qkv = make_qkv()
  by_head = qkv.reshape(3, BATCH, LENGTH, N_HEAD, HEAD_DIM)
  bound = np.prod(np.linalg.norm(by_head[:2], axis=-1).max((1, 2, 3))) / np.sqrt(HEAD_DIM)
  qkv[:2] *= np.sqrt(largest / bound)
  out = tiny.jit(
    functools.partial(attention, n_head=N_HEAD, causal=True, implementation="blocked")
  )(qkv)
  np.testing.assert_allclose(out, reference(qkv, True), rtol=0, atol=2e-4)


@pytest.mark.parametrize("implementation", ["auto", "blocked"])
def test_scores_far_apart_do_not_overflow(implementation):
  def loss(qkv):
    return jnp.sum(attention(qkv, n_head=N_HEAD, causal=True, implementation=implementation))

  out, grad = tiny.jit(jax.value_and_grad(loss))(make_qkv() * 100)
  assert np.isfinite(out) and np.all(np.isfinite(grad))


def both_ways(qkv, weight, **settings):
  """The output, and the gradient of its product with `weight`."""

  def loss(qkv):
    out = attention(qkv, **settings)
    return jnp.sum(out * weight), out

  (_, out), grad = jax.value_and_grad(loss, has_aux=True)(qkv)
  return out, grad


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("implementation", ["tpu_interpret", "blocked"])
def test_each_device_works_on_its_own_heads(shape, implementation):
  """Four images, four heads, split over any mesh: as plain attention on one device, both ways."""
  qkv = np.random.default_rng(0).standard_normal((3, 4, 16, 4 * 32)).astype(np.float32)
  weight = np.random.default_rng(1).standard_normal(qkv.shape[1:]).astype(np.float32)
  run = functools.partial(both_ways, n_head=4, causal=True)
  expected = tiny.jit(functools.partial(run, implementation="xla"))(qkv, weight)
  with jax.set_mesh(tiny.mesh_of(shape)):
    found = tiny.jit(functools.partial(run, implementation=implementation))(qkv, weight)
  for ours, plain in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length, n_head", [(128, 2), (129, 3), (300, 5), (384, 4)])
def test_blocks_of_any_length_and_any_number_of_heads(length, n_head, causal):
  """Full blocks, a last one of a single query, heads that don't divide into groups."""
  qkv = np.random.default_rng(2).standard_normal((3, 1, length, n_head * 8)).astype(np.float32)
  weight = np.random.default_rng(3).standard_normal(qkv.shape[1:]).astype(np.float32)
  run = functools.partial(both_ways, n_head=n_head, causal=causal)
  with jax.default_matmul_precision("highest"):
    expected = tiny.jit(functools.partial(run, implementation="xla"))(qkv, weight)
    found = tiny.jit(functools.partial(run, implementation="blocked"))(qkv, weight)
  for ours, plain in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-5)


def test_a_rematerialised_block_gives_the_same_gradient():
  """Attention's names are saved: the backward pass takes the output and log-sum-exp as they were."""
  qkv = np.random.default_rng(4).standard_normal((3, 2, 256, 2 * 8)).astype(np.float32)
  weight = np.random.default_rng(5).standard_normal(qkv.shape[1:]).astype(np.float32)
  policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)

  def loss(qkv):
    return jnp.sum(weight * attention(qkv, n_head=2, causal=True, implementation="blocked"))

  plain = tiny.jit(jax.grad(loss))(qkv)
  again = jax.grad(jax.checkpoint(loss, policy=policy))
  np.testing.assert_allclose(tiny.jit(again)(qkv), plain, rtol=0, atol=1e-5)
  # Two loops over heads forward, of which one is empty, and one backward: nothing runs twice.
  program = str(jax.make_jaxpr(again)(qkv))
  assert (program.count("while["), program.count("scan[")) == (2, 1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU chooses")
def test_a_cpu_takes_blocks_where_there_is_more_than_one():
  def chosen(batch, length, n_head=4):
    return choose(jax.ShapeDtypeStruct((3, batch, length, n_head * 8), jnp.float32), n_head)

  assert chosen(8, 1024) == chosen(1, 256) == "blocked"
  assert chosen(8, 128) == "xla"
  with jax.set_mesh(tiny.mesh_of((1, 2, 4))):
    assert chosen(8, 1024) == "blocked"
    assert chosen(1, 1024) == "xla"  # one image for two devices
    assert chosen(8, 1024, n_head=2) == "xla"


@pytest.mark.parametrize(
  ("capability", "head_dim", "dtype", "expected"),
  [
    ((9, 0), 64, jnp.bfloat16, "cudnn"),
    ((9, 0), 64, jnp.float16, "cudnn"),
    ((9, 0), 64, jnp.float32, "xla"),
    ((9, 0), 256, jnp.bfloat16, "cudnn"),
    ((9, 0), 264, jnp.bfloat16, "xla"),
    ((10, 0), 256, jnp.bfloat16, "cudnn"),
    ((8, 0), 128, jnp.bfloat16, "cudnn"),
    ((8, 9), 136, jnp.bfloat16, "xla"),
    ((8, 0), 8, jnp.bfloat16, "cudnn"),
    ((8, 0), 12, jnp.bfloat16, "xla"),
    ((7, 5), 64, jnp.bfloat16, "xla"),
    (None, 64, jnp.bfloat16, "xla"),  # another maker's
  ],
)
def test_a_gpu_takes_cudnn_where_that_takes_the_heads(
  monkeypatch, capability, head_dim, dtype, expected
):
  monkeypatch.setattr(hardware, "platform", lambda: "gpu")
  monkeypatch.setattr(hardware, "cuda_capability", lambda: capability)
  assert choose(jax.ShapeDtypeStruct((3, 8, 63, 3 * head_dim), dtype), 3) == expected
  if expected == "xla":
    qkv = jnp.zeros((3, 1, 4, 3 * head_dim), dtype)
    with pytest.raises(UserError, match=r"model.attention: 'cudnn' doesn't take .*fix: 'xla'"):
      attention(qkv, n_head=3, causal=True, implementation="cudnn")


def test_what_gpu_it_is(monkeypatch):
  """As jax tells a device of NVIDIA's; here there is none."""

  def device(version, capability):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(client=client, compute_capability=capability)

  assert hardware.cuda_capability() is None
  monkeypatch.setattr(hardware, "platform", lambda: "gpu")
  for version, capability, expected in (
    ("PJRT C API\ncuda 12090", "9.0", (9, 0)),
    ("PJRT C API\ncuda 13000", "12.1", (12, 1)),
    ("PJRT C API\nrocm 60300", "gfx942", None),
  ):
    monkeypatch.setattr(jax, "local_devices", lambda v=version, c=capability: [device(v, c)])
    assert hardware.cuda_capability() == expected


def test_a_kernel_of_another_device_is_refused(monkeypatch):
  monkeypatch.setattr(hardware, "platform", lambda: "cpu")
  with pytest.raises(UserError, match=r"model.attention: 'tpu' doesn't take .*expected a TPU"):
    attention(jnp.asarray(make_qkv()), n_head=N_HEAD, causal=True, implementation="tpu")


def test_shapes_the_kernel_does_not_take_are_refused():
  qkv = jnp.asarray(make_qkv())
  with pytest.raises(UserError, match=r"model.attention: 'tpu_interpret'.*head dim 6.*'xla'"):
    attention(qkv, n_head=N_HEAD, causal=True, implementation="tpu_interpret")
  with (
    jax.set_mesh(tiny.mesh_of((1, 2, 4))),
    pytest.raises(UserError, match="2 heads, which don't divide over the mesh"),
  ):
    attention(qkv, n_head=2, causal=True, implementation="tpu_interpret")
  with (
    jax.set_mesh(tiny.mesh_of((1, 2, 4))),
    pytest.raises(UserError, match="'blocked' doesn't take 2 heads"),
  ):
    attention(qkv, n_head=2, causal=True, implementation="blocked")
