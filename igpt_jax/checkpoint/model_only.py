"""Writes checkpoints of a model without a training state, for converted weights."""

import logging
import os
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from igpt_jax import files
from igpt_jax.checkpoint import file_sums, reading
from igpt_jax.checkpoint.folders import FOLDER
from igpt_jax.checkpoint.reading import CheckpointInfo
from igpt_jax.model.image_gpt import Params


def _sparing_memory() -> ocp.Context:
  """Returns an orbax context that writes without a second copy in memory, one file for every chunk.

  Its default, OCDBT, first collects everything in memory. Reading is the same for both.
  """
  context = ocp.Context()
  context.array.saving.use_ocdbt = False
  context.array.saving.storage_options.chunk_byte_size = 64 << 20
  context.memory.deepcopy_host_arrays = False
  return context


def save_params(workdir: str, params: Params, info: CheckpointInfo) -> str:
  """Writes, all or nothing, a workdir with one checkpoint without a training state.

  Args:
    workdir: the folder to make; must not exist.
    params: numpy arrays of any float type.
    info: the checkpoint's description; its path and format are ignored.

  Returns:
    The checkpoint's folder.
  """
  workdir = files.place("workdir", workdir)
  items: dict[str, Any] = {"params": params}
  if info.palette is not None:
    items["palette"] = {"centers": np.asarray(info.palette, np.float32)}
  # Make the folder first: if orbax fails to, it leaves threads waiting. `quiet` is for its warning that
  # there is no OCDBT to merge.
  with (
    files.new_folder(workdir, "checkpoint to write") as part,
    _sparing_memory(),
    reading.quiet(logging.ERROR),
  ):
    run = file_sums.with_sums(info.run, file_sums.of_items(items))
    path = os.path.join(part, FOLDER, str(info.step))
    ocp.save_checkpointables(path, items, custom_metadata=run)
  return os.path.join(workdir, FOLDER, str(info.step))
