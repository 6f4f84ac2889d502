"""The mesh, and the one table from logical axes to mesh axes.

Only this module names mesh axes. Other modules name what an axis *means* ("embed", "batch") and get
its placement here. Axis types are Auto: the partitioner propagates, and we pin what matters.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from igpt_jax.errors import UserError
from igpt_jax.parallel import hardware, sizes
from igpt_jax.parallel.sizes import MESH_AXES

# The axes of every mesh are MESH_AXES. One over several slices has the axis of slices before them.
SLICES = "slice"
# Those whose devices hold the same parameters, and sum their gradients.
COPIES = (SLICES, "data")

# Logical axis -> mesh axes. A matrix is split over fsdp by its rows (the axis its product sums over),
# so that a device's part of its gradient is contiguous; and over tensor by its heads or hidden units.
# Activations are split over the batch axes. Parameters have a whole copy in every slice, so that only
# sums of gradients cross the network between slices.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  # parameters
  "layers": None,  # scanned over
  "qkv": None,
  "embed": "fsdp",  # n_embd: rows of the matrices that read the residual stream, columns of tables
  "heads": "tensor",  # n_head * head_dim
  "mlp": "tensor",  # 4 * n_embd
  "heads_rows": ("tensor", "fsdp"),  # as rows of the matrices that write to the stream
  "mlp_rows": ("tensor", "fsdp"),
  "vocab": None,  # 512 rows: too few to split
  "position": None,
  "codes": None,  # of a position
  "norm": None,  # gains: n_embd numbers
  # activations
  "batch": (SLICES, "data", "fsdp"),
  "length": None,
  "channels": None,  # n_embd of an activation
}

# A parameter's axis -> its name after it has been gathered over fsdp.
_WHOLE = {"embed": "channels", "heads_rows": "heads", "mlp_rows": "mlp"}


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = 1, devices=None
) -> Mesh:
  """Builds the (data, fsdp, tensor) mesh over `devices` (all devices by default).

  Over several slices it has an axis before these, one of them over each slice's devices: a batch's rows
  are divided over the slices first, whatever the number of hosts.

  Args:
    data, fsdp, tensor: axis sizes within a slice; at most one may be -1, which takes what is left.
    slices: number of slices; -1: as many as the devices say.
    devices: the devices to use, in order.

  Raises:
    UserError: the sizes don't multiply to the number of a slice's devices, or the devices are in another
      number of slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  groups = hardware.by_slice(devices, slices)
  shape = sizes.mesh_sizes(data, fsdp, tensor, len(groups[0]), len(groups))
  grids = [_grid(shape, group) for group in groups]
  names = MESH_AXES if len(groups) == 1 else (SLICES, *MESH_AXES)
  grid = grids[0] if len(groups) == 1 else np.stack(grids)
  return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _grid(shape: tuple[int, ...], devices: Sequence[hardware.Device]) -> np.ndarray:
  """Returns a slice's devices in the order of the mesh, neighbours near each other on TPUs."""
  if devices[0].platform != "tpu" or len(devices) == 1:
    return np.asarray(devices).reshape(shape)
  from jax.experimental import mesh_utils

  try:
    return mesh_utils.create_device_mesh(shape, devices=devices)
  except NotImplementedError:  # sizes that aren't products of the slice's dimensions
    return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)


def _free_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """Returns the axes of a mesh that aren't split by a `shard_map` around."""
  axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in axes if kind != AxisType.Manual)


def _entry(mesh: Mesh | AbstractMesh | None, logical: str | None) -> str | tuple[str, ...] | None:
  """Returns the mesh axes that a logical axis is split over: those that are free on the mesh.

  Without a mesh, it is that of one slice.
  """
  entry = RULES[logical] if logical else None
  if entry is None or isinstance(entry, str):
    return entry
  free = MESH_AXES if mesh is None else _free_axes(mesh)
  return tuple(axis for axis in entry if axis in free)


def mesh_axes(mesh: Mesh | AbstractMesh, logical: str | None) -> tuple[str, ...]:
  """Returns the mesh axes that a logical axis is split over, without those of one device."""
  entry = _entry(mesh, logical) or ()
  return tuple(a for a in ((entry,) if isinstance(entry, str) else entry) if mesh.shape[a] > 1)


def spec(*logical: str | None, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
  """Returns the PartitionSpec of an array with these logical axes (None: replicated)."""
  entries = [_entry(mesh, axis) for axis in logical]
  used = [a for entry in entries if entry for a in ([entry] if isinstance(entry, str) else entry)]
  if len(used) != len(set(used)):
    raise ValueError(f"axes {logical} use a mesh axis twice: {entries}")
  return PartitionSpec(*entries)


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
  return NamedSharding(mesh, spec(*logical, mesh=mesh))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Pins an intermediate array to its place on the current mesh (`jax.set_mesh`), if there is one."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*logical, mesh=mesh))


def gather_weight(weight: jax.Array, *axes: str) -> jax.Array:
  """Returns a weight with logical axes `axes`, gathered over fsdp.

  Used on every layer's weight inside the scan, in its compute dtype, this is fully sharded data
  parallelism. Without it the partitioner moves the activations instead, which are larger.
  """
  return constrain(constrain(weight, *axes), *whole_axes(axes))


def whole_axes(axes: Sequence[str]) -> tuple[str, ...]:
  """Returns a weight's logical axes after `gather_weight`."""
  return tuple(_WHOLE.get(axis, axis) for axis in axes)


def lookup(table: jax.Array, rows: jax.Array, out_axes: Sequence[str | None]) -> jax.Array:
  """Returns rows [..., D] of a table [N, D].

  Args:
    table: [N, D], split like the last axis of the result.
    rows: numbers of rows, int32 [...].
    out_axes: logical axes of the result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if len(_free_axes(mesh)) == len(mesh.axis_names):
    return table[rows]
  # Within a `shard_map` over some axes the partitioner would gather the gradient's rows over the others.
  return per_device(
    lambda table, rows: table[rows], [(None, out_axes[-1]), out_axes[:-1]], out_axes
  )(table, rows)


def sum_of_batch(
  function: Callable, in_axes: Sequence[Sequence[str | None]], weight_axes: Sequence[str]
) -> Callable:
  """Returns `function` of each device's share of activations, summed over the batch's devices.

  A gradient of a weight is such a sum. It is scattered over fsdp as it is computed (reduce-scatter),
  so that a device only gets its own part; the partitioner would first make it whole on every device.

  Args:
    function: maps activations to an array with `weight_axes`, whole but for what is split over tensor.
    in_axes: logical axes of the arguments.
    weight_axes: logical axes of the result.
  """
  total = sum_of_shares(weight_axes)
  return per_device(lambda *shares: total(function(*shares)), in_axes, weight_axes)


def sum_of_shares(weight_axes: Sequence[str]) -> Callable[[jax.Array], jax.Array]:
  """Returns what maps devices' summands to a device's part of their sum, as `sum_of_batch` has it.

  Ask for it outside of `per_device`, and call it within.

  Args:
    weight_axes: logical axes of the summands, which are whole but for what is split over tensor.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return lambda total: total
  batch_axes = mesh_axes(mesh, "batch")
  # Together, so that the compiler scatters the sum within a slice before it crosses the network.
  copies = tuple(axis for axis in batch_axes if axis in COPIES)
  scattered = [at for at, axis in enumerate(weight_axes) if axis in _WHOLE]

  def summed(total: jax.Array) -> jax.Array:
    if "fsdp" in batch_axes:
      if scattered:
        # The TPU's compiler scatters along the first axis; along another it sums the whole array.
        rows_first = jnp.moveaxis(total, scattered[0], 0)
        kept = jax.lax.psum_scatter(rows_first, "fsdp", scatter_dimension=0, tiled=True)
        total = jnp.moveaxis(kept, 0, scattered[0])
      else:
        total = jax.lax.psum(total, "fsdp")
    if copies:
      total = jax.lax.psum(total, copies)
    return total

  return summed


def axis_parts(mesh: Mesh | AbstractMesh, logical: str) -> int:
  """Number of parts that an axis is split into on a mesh."""
  return math.prod(mesh.shape[axis] for axis in mesh_axes(mesh, logical))


def parts_around(logical: str) -> int:
  """Number of parts that the current mesh splits an axis into; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else axis_parts(mesh, logical)


def axis_share(logical: str, size: int) -> int | None:
  """A device's share of an axis of `size` under the current mesh; None if it doesn't divide."""
  parts = parts_around(logical)
  return size // parts if size % parts == 0 else None


def per_device(
  function: Callable, in_axes: Sequence[Sequence[str | None]], out_axes: Sequence
) -> Callable:
  """Returns `function` mapped over the devices of the current mesh (shard_map).

  Args:
    function: computes a device's part of the result from its parts of the arguments.
    in_axes: logical axes of every argument.
    out_axes: logical axes of the result, or a sequence of those for a tuple.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  several = bool(out_axes) and not isinstance(out_axes[0], str | None)
  return jax.shard_map(
    function,
    mesh=mesh,
    axis_names=set(_free_axes(mesh)),
    in_specs=tuple(spec(*axes, mesh=mesh) for axes in in_axes),
    out_specs=tuple(spec(*axes, mesh=mesh) for axes in out_axes)
    if several
    else spec(*out_axes, mesh=mesh),
    check_vma=False,
  )


def batch_shards(mesh: Mesh) -> int:
  """Number of parts that a batch is split into."""
  return axis_parts(mesh, "batch")


def weight_shards(mesh: Mesh) -> int:
  """Number of parts that a weight is split into."""
  return mesh.shape["fsdp"] * mesh.shape["tensor"]


def slice_size(mesh: Mesh | AbstractMesh) -> int:
  """Number of devices of a slice."""
  return math.prod(mesh.shape[axis] for axis in MESH_AXES)


def round_up_batch(mesh: Mesh, n: int) -> int:
  """Returns the smallest batch size of at least n that divides over the mesh."""
  shards = batch_shards(mesh)
  return -(-n // shards) * shards


def pad_rows(rows: np.ndarray, n: int) -> np.ndarray:
  """Returns rows [m, ...] with zeros after them, [n, ...]."""
  return np.pad(rows, [(0, n - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def batch_size_per_shard(
  mesh: Mesh, batch_size: int, what: str = "train.batch_size", accumulate: int = 1
) -> int:
  """Returns the number of images per data shard and accumulated part.

  Raises:
    UserError: the batch isn't divisible by the batch axes of the mesh times its parts.
  """
  slices = mesh.shape.get(SLICES, 1)
  return sizes.images_per_shard(batch_shards(mesh), batch_size, what, accumulate, slices)


def check_model_fits(mesh: Mesh | AbstractMesh, *, n_head: int, n_embd: int) -> None:
  """Checks that a model divides over the mesh.

  Raises:
    UserError: its heads don't divide over tensor, or its width over fsdp (times tensor, where a
      matrix' rows are split over both).
  """
  tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
  if n_head % tensor:
    fits = [n for n in range(1, n_head + 1) if n_head % n == 0]
    raise UserError(
      f"mesh.tensor: {tensor} doesn't divide the model's {n_head} heads; expected one of "
      f"{', '.join(map(str, fits))}"
    )
  if n_embd % (fsdp * tensor):
    fits = [n for n in range(1, n_embd + 1) if n_embd % (n * tensor) == 0]
    nearest = sorted(sorted(fits, key=lambda n: abs(n - fsdp))[:4])
    raise UserError(
      f"mesh.fsdp: {fsdp} (× tensor {tensor}) doesn't divide the model's width {n_embd}; nearest "
      f"that do: {', '.join(map(str, nearest))}; fix: config.mesh, with the rest over data"
    )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Maps this process' rows of a batch [B/hosts, ...] to global arrays [B, ...] over the batch axes."""
  target = sharding(mesh, "batch")
  return {
    name: jax.make_array_from_process_local_data(target, rows) for name, rows in batch.items()
  }


def put_global(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """Maps rows [B, ...] that every process holds to one global array over the batch axes."""
  target = sharding(mesh, "batch")
  return jax.make_array_from_callback(rows.shape, target, lambda index: rows[index])


def input_share(mesh: Mesh) -> tuple[int, int]:
  """Returns the share of every batch that this process reads, and the number of shares.

  There are as many shares as processes, or fewer where one copy of the model spans several processes
  (`mesh.tensor` beyond a host): those hold and read the same rows.

  Raises:
    UserError: the rows of two processes overlap in part.
  """
  shards = batch_shards(mesh)
  indices = sharding(mesh, "batch").devices_indices_map((shards,))
  held: dict[int, set[int]] = {}  # process -> rows
  for device, (rows,) in indices.items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  shares = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, shares)) != shards or len({len(share) for share in shares}) > 1:
    raise UserError(
      f"config.mesh: {dict(mesh.shape)} over {jax.process_count()} processes splits a batch unevenly "
      "among them; expected devices of one image that divide those of a host, or are a multiple"
    )
  return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)
