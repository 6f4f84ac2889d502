"""The training state, a plain pytree, and the shardings of its leaves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from igpt_jax.model.image_gpt import Params, init_params, param_axes
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import sharding

HEAD = "clf"  # name of a classifier's weights among the parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """State that a step reads and writes.

  Attributes:
    step: int32 [], steps made so far.
    params: nested dict of float32 arrays: the model's, and in fine-tuning the head HEAD
      [n_classes, n_embd].
    opt_state: optax' state.
    rng: uint32 [2], key data; step k draws from fold_in(rng, k) and the state never changes it.
    skipped: int32 [2], steps whose update was skipped as it wasn't finite: in a row up to now, and
      in all.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState
  rng: jax.Array
  skipped: jax.Array


def init_state(
  config: ImageGPTConfig, optimizer: optax.GradientTransformation, seed: int, n_classes: int = 0
) -> TrainState:
  """Returns an initial state; call it under `jax.jit` with the shardings of `state_shardings`.

  Args:
    config: the model's.
    optimizer: optax' transformation.
    seed: seed of the parameters, and of what the steps draw.
    n_classes: classes of a head, which is zero; 0: no head.
  """
  params_key, rng = jax.random.split(jax.random.key(seed))
  params = init_params(config, params_key)
  if n_classes:
    params[HEAD] = jnp.zeros((n_classes, config.n_embd), jnp.float32)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    rng=jax.random.key_data(rng),
    skipped=jnp.zeros(2, jnp.int32),
  )


def abstract_state(
  config: ImageGPTConfig, optimizer: optax.GradientTransformation, n_classes: int = 0
) -> TrainState:
  """Returns shapes and dtypes of the state without allocating it."""
  return jax.eval_shape(lambda: init_state(config, optimizer, 0, n_classes))


def state_bytes(config: ImageGPTConfig, optimizer: optax.GradientTransformation) -> int:
  """Returns the bytes of a training state: parameters and the optimizer's moments."""
  leaves = jax.tree.leaves(abstract_state(config, optimizer))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def state_shardings(
  config: ImageGPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, n_classes: int = 0
) -> TrainState:
  """Returns a NamedSharding for every leaf: moments lie with their parameter, scalars everywhere.

  Without them jit returns replicated Adam moments, and recompiles in step 2.
  """
  params = param_shardings(config, mesh)
  if n_classes:
    params[HEAD] = head_sharding(mesh)
  everywhere: Any = sharding.replicated(mesh)
  opt_state = abstract_state(config, optimizer, n_classes).opt_state

  def is_absent(moment) -> bool:  # of a parameter that another optimizer updates
    return isinstance(moment, optax.MaskedNode)

  moments = optax.tree.map_params(
    optimizer,
    lambda moment, param: moment if is_absent(moment) else param,
    opt_state,
    params,
    transform_non_params=lambda _: everywhere,
    is_leaf=is_absent,
  )
  return TrainState(
    step=everywhere, params=params, opt_state=moments, rng=everywhere, skipped=everywhere
  )


def param_shardings(config: ImageGPTConfig, mesh: Mesh) -> Params:
  return jax.tree.map(
    lambda axes: sharding.sharding(mesh, *axes),
    param_axes(config),
    is_leaf=lambda node: isinstance(node, tuple),
  )


def head_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of a classifier's weights [n_classes, n_embd]."""
  return sharding.sharding(mesh, None, "embed")


def make_state(
  config: ImageGPTConfig,
  optimizer: optax.GradientTransformation,
  seed: int,
  mesh: Mesh,
  params: Params | None = None,
  n_classes: int = 0,
) -> TrainState:
  """Returns an initial state, made in place on the mesh: no device ever holds more than its share.

  Args:
    config, optimizer, seed: as for `init_state`.
    mesh: the mesh of the state.
    params: initial parameters, on the mesh already, with or without a head; None: random ones.
    n_classes: classes of a head, which is zero if `params` has none; 0: no head.
  """
  loaded = params or {}

  def without_loaded(state: TrainState) -> TrainState:
    missing = {name: leaf for name, leaf in state.params.items() if name not in loaded}
    return dataclasses.replace(state, params=missing)

  def make() -> TrainState:
    return without_loaded(init_state(config, optimizer, seed, n_classes))

  shardings = without_loaded(state_shardings(config, optimizer, mesh, n_classes))
  with jax.set_mesh(mesh):
    state = jax.jit(make, out_shardings=shardings)()
  return dataclasses.replace(state, params={**state.params, **loaded})
