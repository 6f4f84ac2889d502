"""L-BFGS for many convex problems at once, each with its own step size, in one loop on the device.

Every turn evaluates all problems once. A problem accepts its step, or halves it and tries again in the
next turn; problems that are done stay as they are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MEMORY = 10  # pairs kept, as scipy's
NOISE = 1e-6  # relative error of a value
# A problem goes on while the quadratic model promises a larger decrease, relative to the value: in
# directions of little variance a small gradient alone doesn't mean convergence.
PROMISE = 1e-6
_SMALLEST_STEP = 2.0**-24
_PATIENCE = 30  # steps that lower neither value nor gradient: the limit of float32 is reached


class State(NamedTuple):
  """State of all problems, [M, S] unless noted; W stands for their matrices, [M, S, K, R]."""

  w: jax.Array  # W
  value: jax.Array
  gradient: jax.Array  # W
  direction: jax.Array  # W
  slope: jax.Array  # derivative of the value along the direction
  step: jax.Array
  moves: jax.Array  # [MEMORY, *W]: differences of w
  changes: jax.Array  # [MEMORY, *W]: differences of the gradient
  curvatures: jax.Array  # [MEMORY, M, S]: 1 / inner product of each pair; 0 where there is no pair
  factor: jax.Array  # scale of the preconditioner
  turn: jax.Array  # evaluations so far
  iterations: jax.Array
  calmest: jax.Array  # smallest gradient size so far
  stale: jax.Array  # steps without progress
  done: jax.Array


def _dot(a, b):
  return (a * b).sum((-1, -2))


def _spread(values):
  return values[..., None, None]


def minimise(value_and_gradient: Callable, shape, largest: Callable, max_iterations, tolerance):
  """Minimises convex functions of matrices, side by side, from zero.

  Args:
    value_and_gradient: function of W that returns values [M, S], gradients W and a preconditioner that
      broadcasts to W: about the inverse of the Hessian's diagonal.
    shape: shape of W, [M, S, K, R].
    largest: function of gradients W that returns their sizes [M, S], compared with the tolerance.
    max_iterations: number of steps at most.
    tolerance: a problem is done where its gradient is no larger and L-BFGS's quadratic model promises
      a decrease of no more than `PROMISE` of its value.

  Returns:
    The last state. A problem whose gradient is larger than the tolerance has reached `max_iterations`
    or the limit of float32.
  """
  w = jnp.zeros(shape, jnp.float32)
  value, gradient, inverse = value_and_gradient(w)
  direction = -inverse * gradient
  slope = _dot(direction, gradient)
  problems = shape[:2]
  history = jnp.zeros((MEMORY, *shape), jnp.float32)
  start = State(
    w, value, gradient, direction, slope,
    step=jnp.ones(problems), moves=history, changes=history,
    curvatures=jnp.zeros((MEMORY, *problems)), factor=jnp.ones(problems),
    turn=jnp.int32(0), iterations=jnp.zeros(problems, jnp.int32),
    calmest=largest(gradient), stale=jnp.zeros(problems, jnp.int32),
    done=_settled(largest(gradient), slope, value, tolerance) | (max_iterations < 1),
  )  # fmt: skip

  def turn(old: State) -> State:
    move = _spread(old.step) * old.direction
    value, gradient, inverse = value_and_gradient(old.w + move)
    falls = value <= old.value + 1e-4 * old.step * old.slope
    # Where values differ by less than their rounding error, slopes decide (Hager and Zhang 2005, the
    # approximate Wolfe condition).
    slope = _dot(gradient, old.direction)
    level = (value <= old.value * (1 + NOISE)) & (slope <= -0.8 * old.slope)
    accepted = ~old.done & (falls | level)

    change = gradient - old.gradient
    bend = _dot(move, change)
    usable = accepted & (bend > 0)
    # All problems share one slot per turn; those without a usable pair lose their oldest one.
    at = old.turn % MEMORY
    moves = old.moves.at[at].set(jnp.where(_spread(usable), move, 0))
    changes = old.changes.at[at].set(jnp.where(_spread(usable), change, 0))
    curvatures = old.curvatures.at[at].set(jnp.where(usable, 1 / jnp.where(usable, bend, 1), 0))
    stiffness = jnp.where(usable, _dot(change, inverse * change), 1)
    factor = jnp.where(usable, bend / stiffness, old.factor)

    w = jnp.where(_spread(accepted), old.w + move, old.w)
    value = jnp.where(accepted, value, old.value)
    gradient = jnp.where(_spread(accepted), gradient, old.gradient)
    newton = -_two_loops(gradient, moves, changes, curvatures, _spread(factor) * inverse, at)
    downhill = _dot(newton, gradient) < 0
    newton = jnp.where(_spread(downhill), newton, -inverse * gradient)
    direction = jnp.where(_spread(accepted), newton, old.direction)
    slope = _dot(direction, gradient)
    step = jnp.where(accepted, 1.0, old.step / 2)
    iterations = old.iterations + accepted
    size = largest(gradient)
    gained = (size < old.calmest) | (value < old.value * (1 - NOISE))
    stale = jnp.where(gained, 0, old.stale + accepted)
    stuck = (step < _SMALLEST_STEP) | (stale >= _PATIENCE) | (iterations >= max_iterations)
    settled = accepted & _settled(size, slope, value, tolerance)
    return State(
      w, value, gradient, direction, slope, step, moves, changes, curvatures,
      factor, old.turn + 1, iterations, jnp.minimum(size, old.calmest), stale,
      old.done | settled | stuck,
    )  # fmt: skip

  return jax.lax.while_loop(lambda state: ~jnp.all(state.done), turn, start)


def _settled(largest, slope, value, tolerance):
  return (largest <= tolerance) & (-0.5 * slope <= PROMISE * value)


def _two_loops(gradient, moves, changes, curvatures, inverse, newest):
  """The inverse Hessian's estimate times the gradient (Nocedal and Wright 2006, algorithm 7.4)."""

  def forwards(back, carry):
    q, factors = carry
    at = (newest - back) % MEMORY
    factor = curvatures[at] * _dot(moves[at], q)
    return q - _spread(factor) * changes[at], factors.at[at].set(factor)

  def backwards(ahead, q):
    at = (newest + 1 + ahead) % MEMORY  # the oldest first
    return q + _spread(factors[at] - curvatures[at] * _dot(changes[at], q)) * moves[at]

  q, factors = jax.lax.fori_loop(0, MEMORY, forwards, (gradient, jnp.zeros_like(curvatures)))
  return jax.lax.fori_loop(0, MEMORY, backwards, inverse * q)
