"""Arithmetic of meshes and batches: whether they divide over devices. Imports no jax."""

import math

from igpt_jax.errors import UserError

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "tensor")


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int, slices: int = 1) -> tuple[int, ...]:
  """Returns the sizes of the mesh's axes over the devices of each slice.

  Args:
    data, fsdp, tensor: sizes as set; at most one may be -1, which takes what is left.
    devices: devices of one slice.
    slices: number of slices, for messages.

  Raises:
    UserError: the sizes don't multiply to the number of devices.
  """
  sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
  name = f"mesh (data, fsdp, tensor) = ({data}, {fsdp}, {tensor})"
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"{name}: sizes must be positive, with at most one -1; fix: config.mesh")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if free and devices % fixed == 0:
    sizes[free[0]] = devices // fixed
  if math.prod(sizes.values()) != devices:
    nearest = [d for d in range(1, devices + 1) if devices % d == 0]
    whose = "of this run" if slices == 1 else f"of each of the {slices} slices"
    raise UserError(
      f"{name} doesn't multiply to the {devices} devices {whose}; expected sizes that "
      f"divide {devices} ({', '.join(map(str, nearest))}); fix: config.mesh, or leave one "
      "axis at -1"
    )
  return tuple(sizes.values())


def images_per_shard(
  shards: int, batch_size: int, what: str, accumulate: int = 1, slices: int = 1
) -> int:
  """Returns the number of images per data shard and accumulated part.

  Args:
    shards: number of devices, or groups of them, that a batch is split over.
    batch_size: images in a batch.
    what: the setting, for messages.
    accumulate: number of parts that a batch is computed in.
    slices: number of slices among the shards, for messages.

  Raises:
    UserError: the batch isn't divisible.
  """
  parts = shards * accumulate
  if batch_size % parts:
    below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
    near = f"{below} or {above}" if below else f"{above}"
    times = f" × train.accumulate {accumulate}" if accumulate > 1 else ""
    axes = "data × fsdp" if slices == 1 else "slices × data × fsdp"
    raise UserError(
      f"{what}: {batch_size} isn't divisible; expected a multiple of {axes} = "
      f"{shards} of the mesh{times}; nearest: {near}"
    )
  return batch_size // parts
