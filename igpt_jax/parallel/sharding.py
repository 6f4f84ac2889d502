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

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. A matrix is split over fsdp by its rows (the axis its product sums over),
# so that a device's part of its gradient is contiguous; and over tensor by its heads or hidden units.
# Activations are split over both batch axes.
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
  "norm": None,  # gains: n_embd numbers
  # activations
  "batch": ("data", "fsdp"),
  "length": None,
  "channels": None,  # n_embd of an activation
}

# A parameter's axis -> its name after it has been gathered over fsdp.
_WHOLE = {"embed": "channels", "heads_rows": "heads", "mlp_rows": "mlp"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """Builds the (data, fsdp, tensor) mesh over `devices` (all devices by default).

  Args:
    data, fsdp, tensor: axis sizes; at most one may be -1, which takes what is left.
    devices: the devices to use, in order.

  Raises:
    UserError: the sizes don't multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
  name = f"mesh (data, fsdp, tensor) = ({data}, {fsdp}, {tensor})"
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"{name}: sizes must be positive, with at most one -1; fix: config.mesh")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if free and len(devices) % fixed == 0:
    sizes[free[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    nearest = [d for d in range(1, len(devices) + 1) if len(devices) % d == 0]
    raise UserError(
      f"{name} doesn't multiply to the {len(devices)} devices of this run; expected sizes that "
      f"divide {len(devices)} ({', '.join(map(str, nearest))}); fix: config.mesh, or leave one "
      "axis at -1"
    )
  shape = tuple(sizes.values())
  if devices[0].platform == "tpu" and len(devices) > 1:
    from jax.experimental import mesh_utils

    try:
      grid = mesh_utils.create_device_mesh(shape, devices=devices)
    except NotImplementedError:  # sizes that aren't products of the slice's dimensions
      grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
  else:
    grid = np.asarray(devices).reshape(shape)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(*logical: str | None) -> PartitionSpec:
  """Returns the PartitionSpec of an array with these logical axes (None: replicated)."""
  entries = [None if axis is None else RULES[axis] for axis in logical]
  used = [a for entry in entries if entry for a in ([entry] if isinstance(entry, str) else entry)]
  if len(used) != len(set(used)):
    raise ValueError(f"axes {logical} use a mesh axis twice: {entries}")
  return PartitionSpec(*entries)


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
  return NamedSharding(mesh, spec(*logical))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Pins an intermediate array to its place on the current mesh (`jax.set_mesh`), if there is one."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*logical))


def gather_weight(weight: jax.Array, *axes: str) -> jax.Array:
  """Returns a weight with logical axes `axes`, gathered over fsdp.

  Used on every layer's weight inside the scan, in its compute dtype, this is fully sharded data
  parallelism. Without it the partitioner moves the activations instead, which are larger.
  """
  return constrain(constrain(weight, *axes), *(_WHOLE.get(axis, axis) for axis in axes))


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
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  batch_axes = [axis for axis in RULES["batch"] or () if mesh.shape[axis] > 1]
  scattered = [at for at, axis in enumerate(weight_axes) if axis in _WHOLE]

  def summed(*shares):
    total = function(*shares)
    for axis in reversed(batch_axes):
      if axis == "fsdp" and scattered:
        # The TPU's compiler scatters along the first axis; along another it sums the whole array.
        rows_first = jnp.moveaxis(total, scattered[0], 0)
        kept = jax.lax.psum_scatter(rows_first, axis, scatter_dimension=0, tiled=True)
        total = jnp.moveaxis(kept, 0, scattered[0])
      else:
        total = jax.lax.psum(total, axis)
    return total

  return per_device(summed, in_axes, weight_axes)


def axis_parts(mesh: Mesh | AbstractMesh, logical: str) -> int:
  """Number of parts that an axis is split into on a mesh."""
  entry = RULES[logical] or ()
  return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry))


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
    in_specs=tuple(spec(*axes) for axes in in_axes),
    out_specs=tuple(spec(*axes) for axes in out_axes) if several else spec(*out_axes),
    check_vma=False,
  )


# The TPU's compiler exchanges along the first axis; for another it would copy more, in float32.


def _gather_side(parts: jax.Array, side: int, names: tuple[str, ...]) -> jax.Array:
  """Gathers the axis `side` of matrices [n, rows, columns] over mesh axes, and keeps a share of them."""
  devices = jax.lax.axis_size(names)
  parts = jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=0, tiled=True)
  parts = jnp.moveaxis(parts.reshape(devices, -1, *parts.shape[1:]), 0, side)
  return parts.reshape(*parts.shape[:side], -1, *parts.shape[side + 2 :])


def _scatter_side(parts: jax.Array, side: int, names: tuple[str, ...]) -> jax.Array:
  """Undoes `_gather_side`."""
  devices = jax.lax.axis_size(names)
  parts = parts.reshape(*parts.shape[:side], devices, -1, *parts.shape[side + 1 :])
  parts = jnp.moveaxis(parts, side, 0)
  parts = parts.reshape(-1, *parts.shape[2:])
  return jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=0, tiled=True)


def on_whole_matrices(function: Callable, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Returns `function` of matrices that are split over devices; each is made whole on one of them.

  All devices share the work, those too that hold the same numbers. Left to itself the partitioner
  computes every matrix in parts, with a sum over devices after each product. The matrices change
  places by all-to-all, and by an all-gather to the copies in the end; if they don't divide among the
  devices, there are zeros among them.

  Args:
    function: maps [n, rows, columns] to as many, each by itself; zeros to anything finite.
    x: matrices [..., rows, columns], split along the last two axes alone.
    axes: logical axes of `x`, and of the result.
  """

  def stacked(part: jax.Array) -> jax.Array:
    return part.reshape(-1, *part.shape[-2:])

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(stacked(x)).reshape(x.shape)
  sides = [RULES[axis] or () if axis else () for axis in axes[-2:]]
  sides = [(side,) if isinstance(side, str) else side for side in sides]
  sides = [tuple(name for name in side if mesh.shape[name] > 1) for side in sides]
  moves = [(at, side) for at, side in enumerate(sides, start=1) if side]
  copies = tuple(
    name for name in mesh.axis_names if mesh.shape[name] > 1 and name not in sides[0] + sides[1]
  )
  n = math.prod(x.shape[:-2])
  padded = -(-n // mesh.size) * mesh.size
  share = padded // math.prod(mesh.shape[name] for name in copies)

  def on_device(part):
    parts = jnp.pad(stacked(part), ((0, padded - n), (0, 0), (0, 0)))
    if copies:
      first = jax.lax.axis_index(copies) * share
      parts = jax.lax.dynamic_slice_in_dim(parts, first, share)
    for side, names in moves:
      parts = _gather_side(parts, side, names)
    parts = function(parts)
    for side, names in reversed(moves):
      parts = _scatter_side(parts, side, names)
    if copies:
      parts = jax.lax.all_gather(parts, copies, tiled=True)
    return parts[:n].reshape(part.shape)

  return per_device(on_device, [axes], axes)(x)


def batch_shards(mesh: Mesh) -> int:
  """Number of parts that a batch is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def weight_shards(mesh: Mesh) -> int:
  """Number of parts that a weight is split into."""
  return mesh.shape["fsdp"] * mesh.shape["tensor"]


def round_up_batch(mesh: Mesh, n: int) -> int:
  """Returns the smallest batch size of at least n that divides over the mesh."""
  shards = batch_shards(mesh)
  return -(-n // shards) * shards


def batch_size_per_shard(
  mesh: Mesh, batch_size: int, what: str = "train.batch_size", accumulate: int = 1
) -> int:
  """Returns the number of images per data shard and accumulated part.

  Raises:
    UserError: the batch isn't divisible by the batch axes of the mesh times its parts.
  """
  parts = batch_shards(mesh) * accumulate
  if batch_size % parts:
    below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
    near = f"{below} or {above}" if below else f"{above}"
    times = f" × train.accumulate {accumulate}" if accumulate > 1 else ""
    raise UserError(
      f"{what}: {batch_size} isn't divisible; expected a multiple of data × fsdp = "
      f"{batch_shards(mesh)} of the mesh{times}; nearest: {near}"
    )
  return batch_size // parts


def check_model_fits(mesh: Mesh, *, n_head: int, n_embd: int) -> None:
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
