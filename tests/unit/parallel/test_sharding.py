"""The mesh, the table from meanings to mesh axes, and how batches get there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from igpt_jax.errors import UserError
from igpt_jax.parallel import sharding
from support import tiny


def test_mesh_takes_all_devices_by_default():
  mesh = sharding.make_mesh()
  assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
  # What a library's default might be: Explicit axes put shardings into types.
  assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
  "asked, got",
  [
    ((-1, 2, 2), (2, 2, 2)), ((2, -1, 1), (2, 4, 1)), ((1, 1, -1), (1, 1, 8)),
    ((2, 2, 2), (2, 2, 2)), ((-1, 8, 1), (1, 8, 1)),
  ],
)  # fmt: skip
def test_minus_one_takes_what_is_left(asked, got):
  tiny.mesh_of((8, 1, 1))
  mesh = sharding.make_mesh(*asked, devices=jax.devices()[:8])
  assert tuple(mesh.shape.values()) == got
  assert list(mesh.devices.flat) == jax.devices()[:8]


@pytest.mark.parametrize(
  "asked, message",
  [
    ((3, 1, 1), r"\(3, 1, 1\) doesn't multiply to the 8 devices.*1, 2, 4, 8.*config.mesh"),
    ((-1, 3, 1), r"\(-1, 3, 1\) doesn't multiply to the 8 devices"),
    ((2, 2, 1), "doesn't multiply to the 8 devices"),
    ((-1, -1, 1), "at most one -1"),
    ((0, 1, 8), "must be positive"),
    ((-2, 1, 4), "must be positive"),
  ],
)
def test_impossible_meshes_are_refused(asked, message):
  tiny.mesh_of((8, 1, 1))
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(*asked, devices=jax.devices()[:8])


def test_spec_translates_meanings():
  assert sharding.spec("layers", "embed", "mlp") == P(None, "fsdp", "tensor")
  assert sharding.spec("batch", None, "heads") == P(("data", "fsdp"), None, "tensor")
  assert sharding.spec() == P()
  with pytest.raises(KeyError):
    sharding.spec("embedding")


@pytest.mark.parametrize("axes", [("embed", "embed"), ("batch", "embed"), ("heads", "mlp")])
def test_a_mesh_axis_is_used_once(axes):
  with pytest.raises(ValueError, match="twice"):
    sharding.spec(*axes)


def test_constrain_pins_under_a_mesh_alone():
  x = jnp.arange(64.0).reshape(8, 8)

  def lowered(mesh):
    run = tiny.jit(lambda x: sharding.constrain(x, "batch", "heads") + 1)
    if mesh is None:
      return run.lower(x).as_text(), run(x)
    with jax.set_mesh(mesh):
      return run.lower(x).as_text(), run(x)

  for mesh in (None, tiny.mesh_of()):
    text, result = lowered(mesh)
    assert "sharding_constraint" not in text
    np.testing.assert_array_equal(result, x + 1)
  mesh = tiny.mesh_of((2, 2, 2))
  text, result = lowered(mesh)
  assert "sharding_constraint" in text
  assert result.sharding.is_equivalent_to(sharding.sharding(mesh, "batch", "heads"), 2)
  np.testing.assert_array_equal(result, x + 1)


@pytest.mark.parametrize("shape, shards", [((8, 1, 1), 8), ((2, 2, 2), 4), ((1, 2, 4), 2)])
def test_batch_is_split_over_data_and_fsdp(shape, shards):
  mesh = tiny.mesh_of(shape)
  assert sharding.batch_shards(mesh) == shards
  assert sharding.batch_size_per_shard(mesh, 16) == 16 // shards
  batch = {
    "tokens": np.arange(48, dtype=np.uint16).reshape(16, 3),
    "index": np.arange(16, dtype=np.int32),
  }
  for rows in (
    sharding.put_batch(batch, mesh),
    {k: sharding.put_global(v, mesh) for k, v in batch.items()},
  ):
    for name, value in batch.items():
      assert rows[name].dtype == value.dtype
      np.testing.assert_array_equal(rows[name], value)
      assert rows[name].sharding.is_equivalent_to(sharding.sharding(mesh, "batch"), value.ndim)
      starts = {shard.index[0].start or 0 for shard in rows[name].addressable_shards}
      assert starts == set(range(0, 16, 16 // shards))


def test_a_batch_that_does_not_divide_is_refused():
  mesh = tiny.mesh_of((2, 2, 2))
  with pytest.raises(UserError, match=r"train.batch_size: 10 .* = 4 .*nearest: 8 or 12"):
    sharding.batch_size_per_shard(mesh, 10)
  with pytest.raises(UserError, match=r"evaluate.batch_size: 3 .*nearest: 4$"):
    sharding.batch_size_per_shard(mesh, 3, "evaluate.batch_size")


def test_a_batch_is_divided_into_parts_that_divide():
  mesh = tiny.mesh_of((2, 2, 2))
  assert sharding.batch_size_per_shard(mesh, 24, accumulate=3) == 2
  with pytest.raises(
    UserError, match=r"train.batch_size: 20 .* = 4 .* × train.accumulate 2; .* 16 or 24"
  ):
    sharding.batch_size_per_shard(mesh, 20, accumulate=2)
  with pytest.raises(UserError, match=r"train.batch_size: 4 .*accumulate 4; nearest: 16$"):
    sharding.batch_size_per_shard(mesh, 4, accumulate=4)


def test_a_model_that_does_not_divide_over_the_mesh_is_refused():
  sharding.check_model_fits(tiny.mesh_of((2, 2, 2)), n_head=2, n_embd=16)
  sharding.check_model_fits(tiny.mesh_of((8, 1, 1)), n_head=3, n_embd=21)
  with pytest.raises(UserError, match=r"mesh.tensor: 4 .* 6 heads; expected one of 1, 2, 3, 6$"):
    sharding.check_model_fits(tiny.mesh_of((1, 2, 4)), n_head=6, n_embd=48)
  with pytest.raises(
    UserError, match=r"mesh.fsdp: 8 \(× tensor 1\) .* 36; nearest .* 4, 6, 9, 12;"
  ):
    sharding.check_model_fits(tiny.mesh_of((1, 8, 1)), n_head=2, n_embd=36)
  # Rows that are split over both: 4 columns of heads a device would do for tensor alone.
  with pytest.raises(UserError, match=r"mesh.fsdp: 2 \(× tensor 4\) .* width 12; nearest .* 1, 3;"):
    sharding.check_model_fits(tiny.mesh_of((1, 2, 4)), n_head=4, n_embd=12)


def test_a_devices_share_of_an_axis():
  assert sharding.axis_share("heads", 8) == 8  # no mesh around
  with jax.set_mesh(tiny.mesh_of((1, 2, 4))):
    assert sharding.axis_share("heads", 8) == 2
    assert sharding.axis_share("heads", 6) is None
    assert sharding.axis_share("batch", 6) == 3
    assert sharding.axis_share("length", 7) == 7
  with jax.set_mesh(tiny.mesh_of((2, 2, 2))):
    assert sharding.axis_share("batch", 8) == 2
    assert sharding.axis_share("batch", 6) is None


def test_per_device_gives_each_its_own_part():
  """Sums over a device's own rows and columns show what it was given."""
  x = np.arange(64.0, dtype=np.float32).reshape(8, 8)

  def own_sum(part):
    return jnp.full_like(part, part.sum())

  def run(x):
    return sharding.per_device(own_sum, [("batch", "heads")], ("batch", "heads"))(x)

  for mesh in (None, tiny.mesh_of()):
    if mesh is None:
      out = tiny.jit(run)(x)
    else:
      with jax.set_mesh(mesh):
        out = tiny.jit(run)(x)
    np.testing.assert_array_equal(out, np.full_like(x, x.sum()))
  with jax.set_mesh(tiny.mesh_of((2, 2, 2))):
    out = tiny.jit(run)(x)
  parts = x.reshape(4, 2, 2, 4).sum((1, 3), keepdims=True)
  np.testing.assert_array_equal(out, np.broadcast_to(parts, (4, 2, 2, 4)).reshape(8, 8))
