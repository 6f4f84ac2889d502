"""One update: what isn't finite changes nothing but the counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from igpt_jax.training.state import TrainState
from igpt_jax.training.step import update

# (loss, gradient) of each step -> skipped (in a row, in all) after it.
STEPS = [
  ((1.0, 1.0), (0, 0)),
  ((np.nan, 1.0), (1, 1)),  # the loss alone
  ((1.0, np.inf), (2, 2)),  # the gradient alone
  ((1.0, 2.0), (0, 2)),
  ((np.inf, 1.0), (1, 3)),
]


def test_what_isnt_finite_is_left_out_and_counted():
  optimizer = optax.sgd(0.5)
  params = {"w": jnp.ones(2)}
  state = TrainState(
    jnp.int32(0), params, optimizer.init(params), jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.int32)
  )
  step = jax.jit(
    lambda state, loss, slope: update(
      state, {"w": jnp.stack([slope, 0.0])}, {"loss": loss}, optimizer, lambda count: 0.5
    )
  )
  expected = 1.0
  for (loss, slope), skipped in STEPS:
    state, told = step(state, jnp.float32(loss), jnp.float32(slope))
    expected -= 0.5 * slope if np.isfinite([loss, slope]).all() else 0.0
    np.testing.assert_array_equal(state.params["w"], [expected, 1.0])
    assert (int(told["skipped_in_row"]), int(told["skipped_updates"])) == skipped
    np.testing.assert_array_equal(state.skipped, skipped)
  assert int(state.step) == len(STEPS)
