"""The training state: one plain pytree, and where each leaf of it lives."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from igpt_jax.model.image_gpt import ImageGPTConfig, Params, init_params, param_axes
from igpt_jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a step reads and writes.

  Attributes:
    step: int32 [], updates made so far.
    params: nested dict of float32 arrays.
    opt_state: optax' state.
    rng: uint32 [2], key data; step k draws from fold_in(rng, k) and the state never changes it.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState
  rng: jax.Array


def init_state(
  config: ImageGPTConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """A fresh state; call it under `jax.jit` with the shardings of `state_shardings`."""
  params_key, rng = jax.random.split(jax.random.key(seed))
  params = init_params(config, params_key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    rng=jax.random.key_data(rng),
  )


def abstract_state(config: ImageGPTConfig, optimizer: optax.GradientTransformation) -> TrainState:
  """Shapes and dtypes of the state, without making it."""
  return jax.eval_shape(lambda: init_state(config, optimizer, 0))


def state_shardings(
  config: ImageGPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """A NamedSharding for every leaf: moments lie where their parameter lies, scalars everywhere.

  Left to itself jit returns replicated Adam moments, and recompiles in step 2.
  """
  params = param_shardings(config, mesh)
  everywhere = sharding.replicated(mesh)
  abstract = abstract_state(config, optimizer)
  moments = optax.tree.map_params(
    optimizer,
    lambda _, target: target,
    abstract.opt_state,
    params,
    transform_non_params=lambda _: everywhere,
  )
  return TrainState(step=everywhere, params=params, opt_state=moments, rng=everywhere)


def param_shardings(config: ImageGPTConfig, mesh: Mesh) -> Params:
  return jax.tree.map(
    lambda axes: sharding.sharding(mesh, *axes),
    param_axes(config),
    is_leaf=lambda node: isinstance(node, tuple),
  )


def make_state(
  config: ImageGPTConfig,
  optimizer: optax.GradientTransformation,
  seed: int,
  mesh: Mesh,
  params: Params | None = None,
) -> TrainState:
  """A fresh state, made in place on the mesh: no device ever holds more than its share.

  Args:
    params: to begin with, on the mesh already; None: random ones.
  """

  def fresh() -> TrainState:
    state = init_state(config, optimizer, seed)
    return state if params is None else dataclasses.replace(state, params={})

  shardings = state_shardings(config, optimizer, mesh)
  if params is not None:
    shardings = dataclasses.replace(shardings, params={})
  with jax.set_mesh(mesh):
    state = jax.jit(fresh, out_shardings=shardings)()
  return state if params is None else dataclasses.replace(state, params=params)
