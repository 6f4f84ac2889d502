"""Writes a checkpoint of a model alone, without a training state, as for converted weights."""

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
  """Orbax' context for writing without a second copy in memory, in pieces that can be read singly.

  Its default, OCDBT, gathers whatever is to be written in memory first; a file for every piece is
  written as it comes. Reading makes no difference between the two.
  """
  context = ocp.Context()
  context.array.saving.use_ocdbt = False
  context.array.saving.storage_options.chunk_byte_size = 64 << 20
  context.memory.deepcopy_host_arrays = False
  return context


def save_params(workdir: str, params: Params, info: CheckpointInfo) -> str:
  """Writes a workdir with one checkpoint without a training state, whole or not at all.

  Args:
    workdir: to make; nothing may be there.
    params: numpy arrays, of any float type.
    info: what the checkpoint says about itself; its path and format are left out.

  Returns:
    The checkpoint's folder.
  """
  workdir = os.path.abspath(workdir)
  items: dict[str, Any] = {"params": params}
  if info.palette is not None:
    items["palette"] = {"centers": np.asarray(info.palette, np.float32)}
  # If its folder can't be made, orbax would leave threads waiting; it also warns that there is no OCDBT
  # to merge.
  with (
    files.new_folder(workdir, "checkpoint to write") as part,
    _sparing_memory(),
    reading.quiet(logging.ERROR),
  ):
    ocp.save_checkpointables(
      os.path.join(part, FOLDER, str(info.step)),
      items,
      custom_metadata=file_sums.with_sums(info.run, file_sums.of_items(items)),
    )
  return os.path.join(workdir, FOLDER, str(info.step))
