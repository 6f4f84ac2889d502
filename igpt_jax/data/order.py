"""The order in which training reads records: a function of the seed and the data alone."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from igpt_jax import errors

if TYPE_CHECKING:
  import grain

# Random generators take 32 bits; some would silently use only the low bits of a longer seed.
MAX_SEED = 2**32 - 1

_COMPARED = 256  # number of a batch's first records whose order the checksum covers


def train_order(n_records: int, seed: int):
  """Returns an endless grain dataset: element i is the i-th record's index, permuted anew every epoch.

  Raises:
    UserError: `seed` isn't in 0..MAX_SEED.
  """
  import grain

  if not 0 <= seed <= MAX_SEED:
    raise errors.UserError(f"seed: {seed}; expected 0 to {MAX_SEED:,}")
  return grain.MapDataset.range(n_records).seed(seed).shuffle().repeat()


def place_in(
  order: grain.MapDataset[int] | Sequence[int], seed: int, first: int, size: int
) -> dict[str, str]:
  """Describes the batch of `size` records from `first` on, with a checksum of its order."""
  drawn = [order[i] for i in range(first, first + min(size, _COMPARED))]
  checksum = zlib.crc32(np.asarray(drawn, np.int32).tobytes())
  return {"order": f"records {first} to {first + size - 1} by seed {seed}, checksum {checksum:08x}"}


@dataclasses.dataclass(frozen=True)
class Stream:
  """One host's share of a training order; attributes as in `pipeline.train_batches`."""

  order: grain.MapDataset[int]
  seed: int
  start_step: int
  process_index: int
  process_count: int

  def place(self, batch: int, read: np.ndarray) -> dict[str, str]:
    """Describes batch number `batch` of this stream; equal on all hosts that read shares of one batch.

    Args:
      batch: number of the batch since `start_step`.
      read: indices of the records that this host has read for it, int32 [B / hosts].
    """
    rows = len(read)
    first = (self.start_step + batch) * rows * self.process_count
    start = first + self.process_index * rows
    as_planned = read.tolist() == [self.order[i] for i in range(start, start + rows)]
    order = "in that order" if as_planned else f"in another: {read[:4].tolist()} …"
    return {**place_in(self.order, self.seed, first, rows * self.process_count), "read": order}
