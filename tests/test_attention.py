"""Attention against numpy, one head and one picture at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from igpt_jax.errors import UserError
from igpt_jax.model.attention import attention

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
@pytest.mark.parametrize("implementation", ["auto", "xla"])
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
def test_gradient_against_a_difference(causal):
  qkv = make_qkv()
  rng = np.random.default_rng(1)
  weight = rng.standard_normal(qkv.shape[1:])

  @tiny.jit
  @jax.grad
  def gradient(qkv):
    out = attention(qkv, n_head=N_HEAD, causal=causal, implementation="xla")
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


def test_half_precision_keeps_its_dtype_and_is_close():
  qkv = make_qkv()
  out = attention(jnp.asarray(qkv, jnp.bfloat16), n_head=N_HEAD, causal=True)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), reference(qkv, True), rtol=0, atol=0.05)


def test_scores_far_apart_do_not_overflow():
  out = attention(jnp.asarray(make_qkv() * 100), n_head=N_HEAD, causal=True)
  assert np.all(np.isfinite(out))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_the_fused_kernel_runs_on_each_devices_own_heads(shape):
  """Four pictures, four heads, split over any mesh: as plain attention on one device, both ways."""
  qkv = np.random.default_rng(0).standard_normal((3, 4, 16, 4 * 32)).astype(np.float32)
  weight = np.random.default_rng(1).standard_normal(qkv.shape[1:]).astype(np.float32)

  def run(qkv, implementation):
    def loss(qkv):
      out = attention(qkv, n_head=4, causal=True, implementation=implementation)
      return jnp.sum(out * weight), out

    (_, out), grad = jax.value_and_grad(loss, has_aux=True)(qkv)
    return out, grad

  expected = tiny.jit(functools.partial(run, implementation="xla"))(qkv)
  with jax.set_mesh(tiny.mesh_of(shape)):
    found = tiny.jit(functools.partial(run, implementation="tpu_interpret"))(qkv)
  for ours, plain in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


def test_shapes_the_kernel_does_not_take_are_refused():
  qkv = jnp.asarray(make_qkv())
  with pytest.raises(UserError, match=r"model.attention: 'tpu_interpret'.*head dim 6.*'xla'"):
    attention(qkv, n_head=N_HEAD, causal=True, implementation="tpu_interpret")
  with (
    jax.set_mesh(tiny.mesh_of((1, 2, 4))),
    pytest.raises(UserError, match="2 heads, which don't divide over the mesh"),
  ):
    attention(qkv, n_head=2, causal=True, implementation="tpu_interpret")
