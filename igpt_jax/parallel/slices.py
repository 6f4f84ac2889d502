"""Gradients of several slices: what crosses the network between them, and when."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from igpt_jax.parallel import sharding


def sum_over_slices_once(function: Callable) -> Callable:
  """Returns `function` of every device group's own rows, its results summed over groups and slices.

  Where a function sums gradients of several parts of a batch, each part's sum would cross the network
  between slices. Here the function is computed on the rows of a group of devices with parameters of their
  own (fsdp), and its results are summed once: scattered within a slice, over slices, and gathered again.
  On one slice it is the function as it is.

  Args:
    function: maps (parameters, *rows) to a tree of arrays; `rows` have the logical axis "batch" first.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if sharding.SLICES not in mesh.axis_names:
    return function
  own_rows = PartitionSpec(sharding.COPIES)

  def on_group(params, *rows):
    return jax.lax.psum(function(params, *rows), sharding.COPIES)

  def summed(params, *rows):
    return jax.shard_map(
      on_group,
      mesh=mesh,
      axis_names=set(sharding.COPIES),
      in_specs=(PartitionSpec(), *[own_rows] * len(rows)),
      out_specs=PartitionSpec(),
      check_vma=False,
    )(params, *rows)

  return summed
