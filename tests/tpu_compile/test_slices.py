"""Two slices through the TPU's own compiler: what crosses the network between them, and how often."""

import functools
import json
import re

import numpy as np
import pytest

from igpt_jax.model.image_gpt import count_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import sharding
from igpt_jax.prediction import hlo, schedule
from igpt_jax.prediction.topology import open_topology
from support import collectives, tiny
from support.tpu_job import NEEDS_LIBTPU, SMALL, call
from support.tpu_programs import step_text

pytestmark = [pytest.mark.tpu_compile, NEEDS_LIBTPU]

MODEL = ImageGPTConfig(
  n_layer=3, n_head=8, n_embd=1024, n_positions=64, dtype="bfloat16", remat="names"
)
CHIPS = 16  # of each of two slices


def mesh_of(shape):
  return sharding.make_mesh(*shape, slices=2, devices=tiny.tpu_devices("v5e:4x4", 2))


@functools.cache
def compiled(shape, accumulate=1, optimizer="adam"):
  """The step on two slices."""
  options = {"accumulate": accumulate, "optimizer": optimizer}
  return hlo.parse(step_text(MODEL, "v5e:4x4", shape, slices=2, **options))


def crossing(program):
  return schedule.predict(
    program,
    clock=1.0,
    links=schedule.Links(1.0, ((0,),) * CHIPS, (False,)),
    kernel_cycles=lambda operation: 0.0,
    network=schedule.Network(2, 1.0),
  ).network


def operations(program):
  return [o for operations in program.computations.values() for o in operations]


CASES = [((4, 4, 1), 1, "adam"), ((1, 16, 1), 1, "adam"), ((4, 4, 1), 2, "muon")]


@pytest.mark.parametrize("shape, accumulate, optimizer", CASES)
def test_gradients_cross_once_and_nothing_else_does(shape, accumulate, optimizer):
  """Each chip sends its share of the gradients, summed within its slice already; in parts too."""
  program = compiled(shape, accumulate, optimizer)
  sent = crossing(program).bytes
  share = 4 * count_params(MODEL) / CHIPS  # float32
  assert share <= sent < 1.1 * share  # rows that don't fill a tile are padded
  kinds = [re.search(r'transfer_type="(\w+)"', o.attributes) for o in operations(program)]
  assert {kind[1] for kind in kinds if kind} == {"ALL_REDUCE"}
  assert all('target="{1,2}x{0:15}"' in o.attributes for o in operations(program) if o.opcode == "send")  # fmt: skip


@pytest.mark.parametrize("shape, accumulate, optimizer", CASES)
def test_all_other_exchanges_stay_within_a_slice(shape, accumulate, optimizer):
  program = compiled(shape, accumulate, optimizer)
  run = collectives.count(program)
  assert run["reduce-scatter"] > 0 and run["all-gather"] > 0
  assert ("all-to-all" in run) == (optimizer == "muon")
  groups = [
    schedule.replica_group(o.attributes, CHIPS)
    for o in operations(program)
    if o.opcode.removesuffix("-start") in schedule.COLLECTIVES
  ]
  assert groups and max(map(max, groups)) < CHIPS


def test_a_slices_rows_are_read_by_its_hosts():
  """Whatever the order of chips within a slice, its hosts' shares of a batch are one half."""
  for shape in ((-1, 1, 1), (1, -1, 1), (4, 4, 1)):
    mesh = mesh_of(shape)
    rows = sharding.sharding(mesh, "batch").devices_indices_map((32,))
    for device, (at,) in rows.items():
      assert at.start // 16 == device.slice_index
    held = [device.process_index for device in mesh.devices.flat]
    assert sorted(set(held[:16])) == [0, 1, 2, 3] and sorted(set(held[16:])) == [4, 5, 6, 7]
    assert sharding.input_share(mesh) == (0, 8)
    first = mesh_of(shape).devices[0]
    one = sharding.make_mesh(*shape, devices=[d for d in first.flat])
    assert np.array_equal(one.devices, first)


# --- job compile -----------------------------------------------------------------------------------


def test_a_forecast_of_slices_says_what_crosses_between_them(tmp_path):
  slices = ("--config.mesh.slices=2", "--config.mesh.fsdp=4", "--config.sample.samples=0")
  done = call(tmp_path, *SMALL, *slices, "--config.compile.topology=v5e:2x2")
  assert done.returncode == 0, done.stdout + done.stderr
  values = json.loads((tmp_path / "compile.json").read_text())
  assert values["topology"] == "v5e:2x2" and values["slices"] == 2 and values["chips"] == 8
  assert values["mesh"] == {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1}
  network = values["between_slices"]
  parameters = 3 * 12 * 256**2 + (2 * 512 + 256) * 256
  # Columns of tables are padded: 64 of them take as much as 128.
  assert parameters <= network["bytes_sent_per_chip"] < 1.3 * parameters
  assert network["bytes_sent"] == 8 * network["bytes_sent_per_chip"]
  assert network["gbit_per_second_and_chip"] == 25
  assert network["seconds"] == pytest.approx(network["bytes_sent_per_chip"] / (25e9 / 8))
  assert 0 <= network["seconds_not_hidden"] <= values["step_parts"]["communication_not_hidden"]
  assert "on 2×v5e:2x2: compiling" in done.stdout and "Gbit/s a chip" in done.stdout
  assert "| 2×v5e:2x2 | 8 | 1 × 4 × 1 |" in (tmp_path / "scale.md").read_text()


def test_the_networks_bandwidth_is_the_generations_or_the_users():
  """Per device, of which tpu7x has two on a chip."""
  assert open_topology("v5e:2x2", 2).between_slices == schedule.Network(2, 25e9 / 8)
  assert open_topology("v5e:2x2", 2, 100.0).between_slices == schedule.Network(2, 12.5e9)
  two_cores = open_topology("tpu7x:2x2x1", 2)
  assert len(two_cores.devices) == 2 * two_cores.n_chips == 16
  assert two_cores.between_slices == schedule.Network(2, 100e9 / 8 / 2)


@pytest.mark.parametrize(
  "overrides, message",
  [
    (("--config.mesh.slices=-1",), "config.mesh.slices: -1; .* expected 1 or more"),
    (("--config.mesh.slices=2", "--config.train.batch_size=12"), "slices × data × fsdp = 8"),
    (("--config.mesh.slices=2", "--config.mesh.fsdp=8"), "4 devices of each of the 2 slices"),
  ],
)  # fmt: skip
def test_slices_that_do_not_divide_are_said_before_compiling(overrides, message, tmp_path):
  done = call(tmp_path, *SMALL, "--config.compile.topology=v5e:2x2", *overrides)
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert re.search(message, done.stderr), done.stderr
  assert "compiling" not in done.stdout and not (tmp_path / "compile.json").exists()
