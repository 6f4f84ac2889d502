"""The training step and the evaluation step: pure functions of (state, batch)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from igpt_jax.model.image_gpt import Params, bind
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel.sharding import constrain
from igpt_jax.parallel.slices import sum_over_slices_once
from igpt_jax.training.objectives import Objective, has_counted, per_image
from igpt_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
  config: ImageGPTConfig,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds train_step(state, batch) -> (state, metrics).

  `batch["tokens"]` is [B, T] or [B, T, codes], any integer type. The metrics are float32 scalars of the state the
  step started from: `loss` in nats per token, the mean over the images that have a predicted token,
  and those of `update`. If nothing is predicted in the whole batch (BERT masks may hide nothing), loss
  and gradient are 0, and the optimizer continues on its moments. The batch is split into `accumulate`
  parts, one after the other, whose gradients are added: only one part's activations are in memory at
  a time. Every device's images are spread evenly over the parts.
  """

  def loss_and_grads(params: Params, tokens, keys):
    batch_size = tokens.shape[0]

    def of_part(params: Params, tokens, keys):
      """The part's share of the mean over the batch, as if every image counted; images that do."""
      nll, weight = objective(bind(config, params), tokens, keys)
      return jnp.sum(per_image(nll, weight)) / batch_size, jnp.sum(has_counted(weight))

    run_part = jax.value_and_grad(of_part, has_aux=True)

    def add_part(total, part):
      return jax.tree.map(jnp.add, total, run_part(params, *part)), None

    def in_parts(rows):
      """[B, ...] -> [parts, B / parts, ...], every device's rows staying where they are."""
      rows = rows.reshape(rows.shape[0] // accumulate, accumulate, *rows.shape[1:])
      return constrain(jnp.swapaxes(rows, 0, 1), None, "batch", *[None] * (rows.ndim - 2))

    def of_parts(params: Params, tokens, keys):
      zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params)
      return jax.lax.scan(add_part, zeros, (in_parts(tokens), in_parts(keys)))[0]

    # One part's gradients cross the network layer by layer, behind the next layer's work.
    of_batch = run_part if accumulate == 1 else sum_over_slices_once(of_parts)
    (loss, counted), grads = of_batch(params, tokens, keys)
    # Scale by the count of the whole batch: parts and devices may have unequal counts.
    scale = batch_size / jnp.maximum(counted, 1.0)
    return jax.tree.map(lambda leaf: leaf * scale, (loss, grads))

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    tokens = batch["tokens"].astype(jnp.int32)
    keys = jax.random.split(key, tokens.shape[0])
    loss, grads = loss_and_grads(state.params, tokens, keys)
    return update(state, grads, {"loss": loss}, optimizer, schedule)

  return train_step


def update(
  state: TrainState,
  grads: Params,
  metrics: Metrics,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
) -> tuple[TrainState, Metrics]:
  """Updates the state with these gradients.

  If the loss or a gradient isn't finite, parameters and moments stay as they were; that is decided
  and counted on the device. The learning rate is that of the step, whichever updates were left out:
  a schedule ends with the run.

  Args:
    state: the state before the step.
    grads: gradients of its parameters.
    metrics: float32 scalars, among them `loss`.
    optimizer, schedule: optax'; the schedule is for the metrics alone.

  Returns:
    The new state; `metrics` with `grad_norm`, `learning_rate`, `skipped_updates` (in the whole run)
    and `skipped_in_row` (up to this step).
  """
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

  def updated():
    opt_state = _at_step(state.opt_state, state.step)
    updates, opt_state = optimizer.update(grads, opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state

  params, opt_state = jax.lax.cond(finite, updated, lambda: (state.params, state.opt_state))
  in_row, in_all = state.skipped
  skipped = jnp.stack([jnp.where(finite, 0, in_row + 1), in_all + ~finite])
  new_state = TrainState(
    step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng, skipped=skipped
  )
  rate = jnp.asarray(schedule(state.step), jnp.float32)
  return new_state, {
    **metrics,
    "grad_norm": norm,
    "learning_rate": rate,
    "skipped_updates": skipped[1].astype(jnp.float32),
    "skipped_in_row": skipped[0].astype(jnp.float32),
  }


def _at_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
  """Returns the optimizer's state with its schedule at `step`: of itself it counts updates alone."""

  def is_schedules(part) -> bool:
    return isinstance(part, optax.ScaleByScheduleState)

  return jax.tree.map(
    lambda part: optax.ScaleByScheduleState(step) if is_schedules(part) else part,
    opt_state,
    is_leaf=is_schedules,
  )


def make_eval_step(
  config: ImageGPTConfig, objective: Objective
) -> Callable[[Params, Batch, jax.Array], Metrics]:
  """Builds eval_step(params, batch, key) -> sums over the images that `batch["mask"]` counts.

  The sums are float32 scalars: `nats` (of the images' nats per token), `images` (their number) and
  `predicted` (the number of those with a predicted token, which alone count in `nats`).
  An image's mask (BERT) depends on `key` and on its `batch["index"]` alone.
  """

  each = make_likelihood(config, objective)

  def eval_step(params: Params, batch: Batch, key: jax.Array) -> Metrics:
    nats, predicted = each(params, batch, key)
    counted = batch["mask"].astype(jnp.float32)
    return {
      "nats": jnp.sum(nats * counted),
      "images": jnp.sum(counted),
      "predicted": jnp.sum(predicted * counted),
    }

  return eval_step


def make_likelihood(
  config: ImageGPTConfig, objective: Objective
) -> Callable[[Params, Batch, jax.Array], tuple[jax.Array, jax.Array]]:
  """Builds likelihood(params, batch, key) -> (each image's nats per token [B], `has_counted` [B])."""

  def likelihood(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = batch["tokens"].astype(jnp.int32)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"])
    nll, weight = objective(bind(config, params), tokens, keys)
    return per_image(nll, weight), has_counted(weight)

  return likelihood
