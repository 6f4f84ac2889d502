"""Slices: the mesh over them, how a batch is divided, and what may cross the network between them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from igpt_jax.errors import UserError
from igpt_jax.parallel import hardware, sharding
from igpt_jax.parallel.slices import sum_over_slices_once
from igpt_jax.parallel.whole_matrices import on_whole_matrices
from support import jaxprs, tiny


@pytest.fixture
def eight():
  tiny.mesh_of((8, 1, 1))
  return jax.devices()[:8]


@pytest.mark.parametrize("slices", [2, 4])
def test_a_slice_keeps_all_axes_but_its_own(eight, slices):
  """Devices of a slice stay together, in their order, even where all are listed in another."""
  spread = [device for at in range(8 // slices) for device in eight[at :: 8 // slices]]
  with tiny.in_slices(*eight, slices=slices):
    for asked in (slices, -1):
      mesh = sharding.make_mesh(-1, 2, slices=asked, devices=spread)
      assert dict(mesh.shape) == {"slice": slices, "data": 4 // slices, "fsdp": 2, "tensor": 1}
      for at, part in enumerate(mesh.devices):
        assert list(part.flat) == eight[at * 8 // slices : (at + 1) * 8 // slices]


def test_one_slice_is_the_mesh_that_it_was(eight):
  before = sharding.make_mesh(2, 2, 2, devices=eight)
  assert before.axis_names == ("data", "fsdp", "tensor")
  assert sharding.make_mesh(2, 2, 2, slices=-1, devices=eight) == before  # they don't say
  with tiny.in_slices(*eight, slices=1):
    assert sharding.make_mesh(2, 2, 2, slices=-1, devices=eight) == before
  with tiny.in_slices(*eight):  # GPUs say which of them are joined by fast links
    assert sharding.make_mesh(2, 2, 2, devices=eight) == before


@pytest.mark.parametrize(
  "slices, held, message",
  [
    (
      2,
      [None] * 8,
      r"mesh.slices: 2; the 8 cpu devices .* don't say .* \(slice_index\); expected 1",
    ),
    (0, [None] * 8, r"mesh.slices: 0; .* don't say .*expected 1, or"),
    (
      1,
      [0, 0, 1, 1],
      r"mesh.slices: 1; the 4 devices .* are in 2 slices; expected 2, or -1: as many",
    ),
    (3, [0, 0, 1, 1], r"mesh.slices: 3; the 4 devices .* in 2 slices; expected 2, or -1"),
    (2, [0, 0, 0, 0], r"mesh.slices: 2; the 4 devices .* in 1 slice; expected 1, or -1"),
    (-2, [0, 0, 1, 1], r"mesh.slices: -2; .* in 2 slices; expected 2, or -1"),
    (
      -1,
      [4, 4, 7],
      r"mesh.slices: -1; .* different .* \(slice 4: 2, slice 7: 1\); expected slices of one",
    ),
  ],
)
def test_slices_that_are_not_there_are_refused(slices, held, message):
  platform = "cpu" if None in held else "tpu"
  devices = [
    types.SimpleNamespace(platform=platform, device_kind=platform, slice_index=index)
    for index in held
  ]
  with pytest.raises(UserError, match=message) as refused:
    hardware.by_slice(devices, slices)
  assert "\n" not in str(refused.value)


def test_what_does_not_divide_over_slices_is_refused(eight):
  with tiny.in_slices(*eight):
    with pytest.raises(UserError, match=r"the 4 devices of each of the 2 slices; .*1, 2, 4\)"):
      sharding.make_mesh(8, slices=2, devices=eight)
  mesh = tiny.mesh_of((2, 2, 2, 1))
  assert sharding.batch_size_per_shard(mesh, 16) == 2
  with pytest.raises(
    UserError, match=r"batch_size: 12 .*slices × data × fsdp = 8 of the mesh; nearest: 8 or 16"
  ):
    sharding.batch_size_per_shard(mesh, 12)


def test_parameters_are_whole_in_every_slice_and_rows_are_not():
  mesh = tiny.mesh_of((2, 2, 2, 1))
  assert sharding.sharding(mesh, "embed", "mlp").spec == P("fsdp", "tensor")
  assert sharding.sharding(mesh, "batch", None).spec == P(("slice", "data", "fsdp"), None)
  assert sharding.weight_shards(mesh) == 2 and sharding.slice_size(mesh) == 4


def test_a_batchs_rows_go_to_slice_after_slice():
  """Row r of a batch is in the slice that the rows before and after it fill, whoever reads it."""
  mesh = tiny.mesh_of((2, 2, 2, 1))
  rows = np.arange(16, dtype=np.int32)
  held = sharding.put_batch({"index": rows}, mesh)["index"]
  np.testing.assert_array_equal(held, rows)
  by_device = {shard.device: np.asarray(shard.data).tolist() for shard in held.addressable_shards}
  in_order = np.concatenate([by_device[device] for device in mesh.devices.flat])
  np.testing.assert_array_equal(in_order, rows)
  assert sharding.input_share(mesh) == (0, 1)


def axes_of(jaxpr, names):
  """The mesh axes that collectives of these names go over, in a jaxpr and all within."""
  found = []
  for equation in jaxprs.equations(jaxpr):
    if any(equation.primitive.name.startswith(name) for name in names):
      over = equation.params.get("axes") or equation.params.get("axis_name")
      found.append((over,) if isinstance(over, str) else tuple(over))
  return found


@pytest.mark.parametrize("shape", tiny.SLICES, ids=str)
def test_whole_matrices_are_exchanged_within_a_slice(shape):
  x = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
  axes = ("layers", "embed", "mlp")
  mesh = tiny.mesh_of(shape)

  def run(x):
    return on_whole_matrices(lambda m: m @ m.mT, x, axes)

  placed = jax.device_put(x, sharding.sharding(mesh, *axes))
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(tiny.jit(run)(placed), x @ x.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    over = axes_of(jax.make_jaxpr(run)(placed).jaxpr, ("all_gather", "all_to_all", "psum"))
  assert over and not any("slice" in axes for axes in over)


@pytest.mark.parametrize("shape", tiny.SLICES, ids=str)
def test_sums_cross_the_network_once_however_many_parts(shape):
  """Each part is summed within its group of devices; what crosses is one sum over copies."""
  mesh = tiny.mesh_of(shape)
  rows = np.arange(64, dtype=np.float32).reshape(16, 4)

  def of_parts(scale, rows):
    parts = rows.reshape(2, -1, rows.shape[-1])
    total, _ = jax.lax.scan(
      lambda total, part: (total + scale * part.sum(0), None), jnp.zeros(4), parts
    )
    return {"sum": total, "rows": jnp.float32(len(rows)) / sharding.parts_around("batch")}

  def run(scale, rows):
    return sum_over_slices_once(of_parts)(scale, rows)

  placed = sharding.put_global(rows, mesh)
  with jax.set_mesh(mesh):
    found = tiny.jit(run)(2.0, placed)
    over = axes_of(jax.make_jaxpr(run)(2.0, placed).jaxpr, ("psum", "all_gather"))
  np.testing.assert_allclose(found["sum"], 2 * rows.sum(0))
  copies = mesh.shape["slice"] * mesh.shape["data"]
  assert float(found["rows"]) * mesh.shape["fsdp"] == 16 and copies > 1
  assert set(over) == {("slice", "data")}
  with jax.set_mesh(tiny.mesh_of((2, 2, 2))):
    assert sum_over_slices_once(of_parts) is of_parts  # one slice: as it is


@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (2, 1, 2, 2)], ids=str)
def test_a_tables_gradient_is_summed_over_all_rows_of_its_lookup(shape):
  """Within the groups of a sum made once, where each device has rows of its own, and without."""
  rng = np.random.default_rng(0)
  table = rng.standard_normal((5, 8)).astype(np.float32)
  rows = rng.integers(5, size=(16, 3)).astype(np.int32)
  weights = rng.standard_normal((16, 3, 8)).astype(np.float32)
  axes = ("batch", "length", "channels")

  def gradient(table, rows, weights):
    def loss(table):
      return jnp.sum(sharding.lookup(table, rows, axes) * weights)

    return jax.grad(loss)(table)

  expected = np.zeros_like(table)
  np.add.at(expected, rows, weights)
  np.testing.assert_allclose(gradient(table, rows, weights), expected, rtol=1e-5)
  mesh = tiny.mesh_of(shape)
  placed = [sharding.put_global(x, mesh) for x in (rows, weights)]
  with jax.set_mesh(mesh):
    for run in (gradient, lambda *all: sum_over_slices_once(gradient)(*all)):
      np.testing.assert_allclose(tiny.jit(run)(table, *placed), expected, rtol=1e-5, atol=1e-5)
