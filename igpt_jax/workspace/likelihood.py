"""Likelihood of a split's images under a trained model, in nats per token."""

from jax.sharding import Mesh

from igpt_jax.checkpoint import LoadedModel
from igpt_jax.config.run_fields import DataConfig
from igpt_jax.data.sources import Split
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress
from igpt_jax.training.evaluation import LikelihoodEvaluator
from igpt_jax.training.objectives import make_objective
from igpt_jax.workspace import checkpoint_tokens, streams


def nats_per_token(
  trained: LoadedModel,
  split: Split,
  data: DataConfig,
  mesh: Mesh,
  *,
  batch_size: int,
  images: int = 0,
  masks: int = 1,
) -> float:
  """Returns the mean over the first `images` (0: all). Collective.

  Args:
    trained: the model, with a palette if its tokens need one, unless the split is tokens.
    split, data: the images.
    mesh: the mesh that the model is on.
    batch_size: images at a time.
    images: how many of them.
    masks: BERT: masks of each image.
  """
  kind = trained.run["objective"]
  objective = make_objective(kind, trained.run["mask_probability"])
  spec = None if split.is_tokens else checkpoint_tokens.tokens_of(trained)
  total = min(images or len(split), len(split))
  clock = progress.Countdown(f"likelihood: {total:,} images of {split.name}", total, say)
  evaluator = LikelihoodEvaluator(trained.config, objective, mesh)
  with streams.eval_stream(split, data, spec, mesh, batch_size, total) as batches:
    result = evaluator(
      trained.params,
      batches,
      masks=masks if kind == "masked" else 1,
      report=clock.batches(batch_size),
    )
  return result.nats_per_token
