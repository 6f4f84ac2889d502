"""L-BFGS's direction is that of the BFGS update, written out as matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.probing import lbfgs


@pytest.mark.parametrize("newest", [0, 3, lbfgs.MEMORY - 1])
@pytest.mark.parametrize("n_pairs", [1, lbfgs.MEMORY])
def test_two_loops_are_the_updates_one_after_the_other(newest, n_pairs):
  """The parameters are a matrix of 2 × 3; the pairs lie in a ring, the oldest after the newest."""
  rng = np.random.default_rng(newest)
  size, shape = 6, (1, 1, 2, 3)
  bends = rng.uniform(0.5, 2.0, size)
  moves = rng.standard_normal((lbfgs.MEMORY, size))
  changes = moves * bends + 0.01 * rng.standard_normal(moves.shape)
  curvatures = 1 / (moves * changes).sum(-1)
  gradient, inverse = rng.standard_normal(size), rng.uniform(0.5, 2.0, size)
  oldest_first = [(newest - back) % lbfgs.MEMORY for back in reversed(range(n_pairs))]
  estimate = np.diag(inverse)
  for at in oldest_first:
    left = np.eye(size) - curvatures[at] * np.outer(moves[at], changes[at])
    estimate = left @ estimate @ left.T + curvatures[at] * np.outer(moves[at], moves[at])
  there = np.isin(np.arange(lbfgs.MEMORY), oldest_first)
  rings = [jnp.asarray(ring.reshape(-1, *shape), jnp.float32) for ring in (moves, changes)]
  found = lbfgs._two_loops(
    jnp.asarray(gradient.reshape(shape), jnp.float32), *rings,
    jnp.asarray(np.where(there, curvatures, 0).reshape(-1, 1, 1), jnp.float32),
    jnp.asarray(inverse.reshape(shape), jnp.float32), jnp.int32(newest),
  )  # fmt: skip
  expected = estimate @ gradient
  np.testing.assert_allclose(np.ravel(found), expected, rtol=0, atol=1e-3 * np.abs(expected).max())
