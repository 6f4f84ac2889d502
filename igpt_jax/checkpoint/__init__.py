"""Checkpoints: the only room that imports orbax.

One checkpoint is everything a run needs to go on and everything another job needs to use it:

  WORKDIR/checkpoints/STEP/
    params     the model's parameters
    head       a classifier's weights, where there is one
    training   step, optimizer state, RNG
    palette    the colours, float32 [k, 3] in [-1, 1], so that a checkpoint alone can be sampled from
    (metadata) the run as JSON: model, objective, config, data position, elapsed time; checksums of all

Writes are asynchronous and atomic: a step's folder appears when it is whole. An imported checkpoint
has no `training`: every job can read it, but no run can go on from it. `reading` is for every job,
`writing` for those that train, `model_only` for what is converted.
"""

from igpt_jax.checkpoint.folders import FOLDER, find, latest_step, path_of, whole_steps
from igpt_jax.checkpoint.model_only import save_params
from igpt_jax.checkpoint.reading import (
  CheckpointInfo,
  LoadedModel,
  describe,
  load_head,
  load_host_params,
  load_params,
  load_pretrained,
  newest,
  with_params,
)
from igpt_jax.checkpoint.writing import SAVE_ERRORS, Checkpoints, Resumed

__all__ = [
  "FOLDER",
  "SAVE_ERRORS",
  "CheckpointInfo",
  "Checkpoints",
  "LoadedModel",
  "Resumed",
  "describe",
  "find",
  "latest_step",
  "load_head",
  "load_host_params",
  "load_params",
  "load_pretrained",
  "newest",
  "path_of",
  "save_params",
  "whole_steps",
  "with_params",
]
