"""Fine-tuning: the generative loss and a classifier's, one update, one evaluation (paper, 3.4).

The classifier is one matrix [n_classes, D] without a bias, read from features pooled over positions,
as in the released code. It is the leaf `state.HEAD` of the parameters.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import Params, bind
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import sharding
from igpt_jax.training.evaluation import EVAL_SEED, mean_nats, sum_metrics
from igpt_jax.training.objectives import draw_visible, has_counted, per_image, token_nll
from igpt_jax.training.state import HEAD, TrainState, head_sharding, param_shardings
from igpt_jax.training.step import Batch, Metrics, update

# (logits [..., C], labels [...]) -> nats of the labels [...].
class_nll = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class JointLoss:
  """generative · L_gen + classification · L_clf.

  Attributes:
    layer: layer whose features the head reads, 0 to n_layer: the norm applied to that block's input,
      and for n_layer the final norm's output.
    generative, classification: weights; the paper's are 1 and 1. Without a generative weight the
      logits over the palette aren't computed.
    mask_probability: BERT only: the share of pixels that are masked, in fine-tuning too.
  """

  layer: int
  generative: float = 1.0
  classification: float = 1.0
  mask_probability: float = 0.15


def model_params(params: Params) -> Params:
  """Returns the model's parameters without the head."""
  return {name: leaf for name, leaf in params.items() if name != HEAD}


def forward(
  config: ImageGPTConfig,
  params: Params,
  tokens_BxT: jax.Array,
  keep_BxT: jax.Array | None,
  *,
  layer: int,
  generative: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
  """Runs both heads in one pass.

  Args:
    config: the model's.
    params: the model's parameters and the head.
    tokens_BxT: images.
    keep_BxT: BERT: True where a pixel is visible.
    layer: layer whose features the head reads.
    generative: False skips the second result.

  Returns:
    Logits over classes, float32 [B, n_classes]; every image's nats per token [B] (0 where nothing
    is masked), or None.
  """

  def pool(n):
    return jnp.mean(n.astype(jnp.float32), axis=1)

  model = bind(config, model_params(params))
  # Collecting takes a slower way through the blocks, so do it only for a layer within them.
  middle = layer < config.n_layer
  final, pooled = model.hidden(
    model.embed(tokens_BxT, keep_BxT),
    collect=(lambda block, x, _: pool(block.ln_1(x))) if middle else None,
  )
  features = pooled[layer] if middle else pool(final)
  class_logits = jnp.einsum("bd,cd->bc", features, params[HEAD], precision="highest")
  if not generative:
    return class_logits, None
  nll = token_nll(model.logits(final, tokens_BxT), tokens_BxT)
  return class_logits, per_image(nll, _predicted(tokens_BxT, keep_BxT))


def _predicted(tokens_BxT: jax.Array, keep_BxT: jax.Array | None) -> jax.Array:
  """1 where the generative loss counts a token, else 0; float32 [B, T]."""
  if keep_BxT is None:
    return jnp.ones(tokens_BxT.shape[:2], jnp.float32)
  return 1.0 - keep_BxT.astype(jnp.float32)


def joint_loss(
  config: ImageGPTConfig,
  loss: JointLoss,
  params: Params,
  tokens_BxT: jax.Array,
  labels_B: jax.Array,
  keep_BxT: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
  """Returns the weighted loss, and its parts `classification_loss`, `accuracy` and `generative_loss`.

  The last only if it has a weight: the mean over the images that have a predicted token, 0 if none do.
  """
  class_logits, generative = forward(
    config, params, tokens_BxT, keep_BxT, layer=loss.layer, generative=loss.generative > 0
  )
  hits = jnp.argmax(class_logits, axis=-1) == labels_B
  parts = {
    "classification_loss": jnp.mean(class_nll(class_logits, labels_B)),
    "accuracy": jnp.mean(hits.astype(jnp.float32)),
  }
  total = loss.classification * parts["classification_loss"]
  if generative is not None:
    predicted = jnp.sum(has_counted(_predicted(tokens_BxT, keep_BxT)))
    parts["generative_loss"] = jnp.sum(generative) / jnp.maximum(predicted, 1.0)
    total = total + loss.generative * parts["generative_loss"]
  return total, parts


def _visible(config: ImageGPTConfig, keys_B: jax.Array, mask_probability: float):
  """The pixels that a BERT model sees, bool [B, T]; None for an autoregressive one, which sees all."""
  return None if config.causal else draw_visible(keys_B, config.n_positions, mask_probability)


def make_finetune_step(
  config: ImageGPTConfig,
  loss: JointLoss,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds train_step(state, batch) -> (state, metrics).

  `batch["tokens"]` is [B, T] or [B, T, codes], any integer type, `batch["label"]` int32 [B]. The metrics are float32
  scalars of the state the step started from: `loss`, the parts of `joint_loss`, `grad_norm`,
  `learning_rate`. Masks are drawn as in pretraining, from the step and the row.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    tokens = batch["tokens"].astype(jnp.int32)
    keep = _visible(config, jax.random.split(key, tokens.shape[0]), loss.mask_probability)

    def loss_fn(params: Params):
      return joint_loss(config, loss, params, tokens, batch["label"], keep)

    (total, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return update(state, grads, {"loss": total, **parts}, optimizer, schedule)

  return train_step


def vote(logits_KxBxC: jax.Array) -> jax.Array:
  """The majority class of K predictions [B]; of equally frequent ones, that of the largest mean logit."""
  n_classes = logits_KxBxC.shape[-1]
  votes_BxC = jax.nn.one_hot(jnp.argmax(logits_KxBxC, axis=-1), n_classes).sum(0)
  leading = votes_BxC == votes_BxC.max(-1, keepdims=True)
  return jnp.argmax(jnp.where(leading, logits_KxBxC.mean(0), -jnp.inf), axis=-1)


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of a classifier and its model on some images.

  Attributes:
    images: number of images.
    accuracy: that of the single pass; BERT: of the majority vote over the masks.
    accuracy_of_mean: that of the mean logits over the masks; without masks equal to `accuracy`.
    classification_loss: nats per image, mean over masks.
    nats_per_token: generative, mean over the masks that hide something; nan if none does.
  """

  images: int
  accuracy: float
  accuracy_of_mean: float
  classification_loss: float
  nats_per_token: float


class Classifier:
  """Scorer of images under a model with a head; compiled once for each batch shape.

  Args:
    config: the model's.
    mesh: the mesh of parameters and batches.
    layer: layer whose features the head reads.
    mask_probability: BERT only.
    masks: BERT: number of masks per image. They depend on `evaluation.EVAL_SEED` and the image's
      index, and are those that job evaluate draws.
  """

  def __init__(
    self,
    config: ImageGPTConfig,
    mesh: Mesh,
    *,
    layer: int,
    mask_probability: float = 0.15,
    masks: int = 1,
  ):
    self._mesh = mesh
    draws = 1 if config.causal else masks

    def score(params: Params, batch: Batch) -> Metrics:
      """Sums over the images that `batch["mask"]` counts."""
      tokens = batch["tokens"].astype(jnp.int32)

      def once(seed):
        key = jax.random.key(seed)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"])
        keep = _visible(config, keys, mask_probability)
        logits_BxC, nats_B = forward(config, params, tokens, keep, layer=layer)
        return logits_BxC, nats_B, has_counted(_predicted(tokens, keep))

      seeds = jnp.arange(EVAL_SEED, EVAL_SEED + draws)
      logits_KxBxC, nats_KxB, predicted_KxB = jax.lax.map(once, seeds)
      labels, counted = batch["label"], batch["mask"].astype(jnp.float32)
      # Masked rows have label -1: clamp it so that the loss stays finite.
      label_nats_KxB = jax.vmap(class_nll, (0, None))(logits_KxBxC, jnp.maximum(labels, 0))
      by_image = {
        "images": jnp.ones_like(counted),
        "accuracy": vote(logits_KxBxC) == labels,
        "accuracy_of_mean": jnp.argmax(logits_KxBxC.mean(0), axis=-1) == labels,
        "classification_loss": label_nats_KxB.mean(0),
        "nats": nats_KxB.sum(0),
        "predicted": predicted_KxB.sum(0),
      }
      return {name: jnp.sum(values * counted) for name, values in by_image.items()}

    params = {**param_shardings(config, mesh), HEAD: head_sharding(mesh)}
    shardings = params, sharding.sharding(mesh, "batch")
    self._score = jax.jit(score, in_shardings=shardings, out_shardings=sharding.replicated(mesh))

  def __call__(
    self,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    report: Callable[[int], None] | None = None,
  ) -> Scores:
    """Scores images.

    Args:
      params: the model's parameters and the head, on the mesh.
      batches: this host's rows: `tokens`, `label`, `mask` (which rows count), `index`.
      report: called with the number of batches done.
    """

    def computed() -> Iterator[Metrics]:
      for done, batch in enumerate(batches, 1):
        fields = {name: batch[name] for name in ("tokens", "label", "mask", "index")}
        yield self._score(params, sharding.put_batch(fields, self._mesh))
        if report is not None:
          report(done)

    with jax.set_mesh(self._mesh):
      totals = sum_metrics(computed())
    images = totals.pop("images", 0)
    if not images:
      raise ValueError("no images to classify")
    return Scores(
      images=round(images),
      nats_per_token=mean_nats(totals.pop("nats"), totals.pop("predicted")),
      **{name: total / images for name, total in totals.items()},
    )


def check_layer(layer: int, n_layer: int, head: int | None) -> int:
  """Returns the layer that the head reads; `head` is the one that a trained head reads, if any.

  Raises:
    UserError: there is no such layer, or the trained head reads another.
  """
  if not -1 <= layer <= n_layer:
    raise UserError(
      f"finetune.layer: {layer}; expected 0 to the model's n_layer {n_layer}, or -1 for the last"
    )
  layer = n_layer if layer == -1 else layer
  if head is not None and head != layer:
    raise UserError(
      f"finetune.layer: {layer}; the checkpoint's head reads layer {head}; "
      f"fix: --config.finetune.layer={head}, or a checkpoint without a head"
    )
  return layer
