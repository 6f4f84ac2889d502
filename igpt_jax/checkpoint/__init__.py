"""Checkpoints: the only package that imports orbax.

A checkpoint holds everything that a run needs to resume and that another job needs to use it:

  WORKDIR/checkpoints/STEP/
    params     the model's parameters
    head       a classifier's weights, if there is one
    training   step, optimizer state, RNG
    palette    the colours, float32 [k, 3] in [-1, 1], so that a checkpoint alone can be sampled from
    (metadata) the run as JSON: model, objective, config, data position, elapsed time; all checksums

Writes are asynchronous and atomic: a step's folder appears when it is complete. A converted checkpoint
has no `training`: every job can read it, but no run can resume from it. `reading` is for every job,
`writing` for jobs that train, `model_only` for converted weights, `one_file` for a model that is handed on
as one file.
"""

from igpt_jax.checkpoint.folders import (
  FOLDER,
  copy,
  find,
  is_unfinished,
  latest_step,
  move,
  path_of,
  remove,
  whole_steps,
)
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
  "copy",
  "describe",
  "find",
  "is_unfinished",
  "latest_step",
  "load_head",
  "load_host_params",
  "load_params",
  "load_pretrained",
  "move",
  "newest",
  "path_of",
  "remove",
  "save_params",
  "whole_steps",
  "with_params",
]
