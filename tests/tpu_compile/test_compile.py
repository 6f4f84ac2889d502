"""Job `compile`, and the training step through the TPU's own compiler, without a TPU."""

import dataclasses
import functools
import json
import math
import re

import jax
import pytest

from igpt_jax.model.decoding import autoregressive
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware, sharding
from igpt_jax.prediction import forecast, hlo
from igpt_jax.training import compilation
from support import collectives, tiny
from support.tpu_job import NEEDS_LIBTPU, SMALL, call
from support.tpu_programs import step_text

pytestmark = [pytest.mark.tpu_compile, NEEDS_LIBTPU]

SMALL_MODEL = ImageGPTConfig(
  n_layer=3, n_head=4, n_embd=256, n_positions=256, dtype="bfloat16", remat="names"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """compile.json of a small model on four chips, and what was said."""
  workdir = tmp_path_factory.mktemp("small")
  done = call(workdir, *SMALL, "--config.compile.topology=v5e:2x2", "--config.mesh.fsdp=4")
  assert done.returncode == 0, done.stdout + done.stderr
  return json.loads((workdir / "compile.json").read_text()), done.stdout


def test_the_figures_of_a_slice(small):
  values, said = small
  assert values["topology"] == "v5e:2x2" and values["chips"] == values["devices"] == 4
  assert values["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
  assert values["batch_size"] == 32 and values["remat"] == "names"
  assert values["fits"] is True
  held = values["bytes_per_device"]
  assert values["bytes_per_chip"] == sum(held.values()) < values["hbm_bytes"] == 15.75 * 2**30
  # Parameters and both moments in float32, a quarter of most on each chip; the compiler pads some.
  parameters = 3 * 12 * 256**2 + (2 * 512 + 256) * 256
  assert held["arguments"] == pytest.approx(12 * parameters / 4, rel=0.1)
  assert values["largest_buffers"][0]["bytes"] < values["bytes_per_chip"]
  assert values["blocks"] == "hand-written stack"
  for line in (
    "fits               yes",
    "blocks             hand-written stack",
    "MFU",
    "images/s",
    "images/s a host",
    "of 112 vCPUs",
    "chip-hours",
  ):
    assert line in said


def test_the_figures_agree_with_each_other(small):
  values, _ = small
  flops = compilation.flops_per_image(SMALL_MODEL) * 32
  assert values["model_flops_per_step"] == flops
  seconds = values["step_seconds"]
  peak = 4 * hardware.CHIPS["TPU v5 lite"].peak_flops
  assert values["mfu"] == pytest.approx(flops / seconds / peak) and 0 < values["mfu"] < 1
  assert values["images_per_second"] == pytest.approx(32 / seconds)
  assert values["schedule_images"] == 32_000
  assert values["days"] == pytest.approx(1000 * seconds / 86_400)
  assert values["chip_hours"] == pytest.approx(4 * 24 * values["days"])
  parts = values["step_parts"]
  assert parts["compute"] + parts["communication_not_hidden"] == pytest.approx(seconds)
  read = values["input"]
  assert (read["hosts"], read["vcpus_of_a_host"]) == (1, 112)
  assert (
    read["images_per_second_and_host"]
    == values["images_per_second"]
    == 500 * read["cores_of_a_host"]
  )
  assert 0 < parts["kernels"] < parts["compute"]
  named = values["compute_by_origin"]
  assert {"fused_attention_forward", "fused_attention_backward"} <= set(named)
  # Not one cycle of the kernels is free: the matrix units' peak bounds them from below.
  attention = 32 / 4 * 3 * 12 * 256**2 * 256 / 2
  assert parts["kernels"] > attention / hardware.CHIPS["TPU v5 lite"].peak_flops


def test_the_collectives_of_a_slice(small):
  found = small[0]["collectives"]
  assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
  # Each layer's four matrices in both directions, in bfloat16; tables beside them.
  assert found["all-gather"]["count"] == 3 * 8 + 3
  layers = 3 * 2 * 12 * 256**2 * 2
  tables = (2 * 512 + 256) * 256 * 2
  assert found["all-gather"]["bytes"] == layers + tables
  assert found["reduce-scatter"]["bytes"] + found["all-reduce"]["bytes"] >= layers / 2
  assert all(each["seconds"] > 0 for each in found.values())


def test_sampling_is_forecast_beside_training(small):
  drawn = small[0]["sampling"]
  assert drawn["fits"] and drawn["pictures"] == 8
  assert drawn["bytes_per_chip"] < small[0]["hbm_bytes"]
  assert drawn["pictures_per_second"] == pytest.approx(8 / drawn["seconds"])
  assert drawn["seconds"] > 256 * 1e-5  # 256 pixels, one after the other


@pytest.mark.parametrize(
  "overrides",
  [
    ("--config.train.batch_size=256", "--config.model.remat=none"),
    # So large that the compiler doesn't begin: its state alone, on every chip.
    ("--config.train.batch_size=4", "--config.model.n_embd=3072", "--config.model.remat=names"),
  ],
  ids=["activations", "state"],
)
def test_what_does_not_fit_is_said_with_what_would(overrides, tmp_path):
  done = call(tmp_path, "--config.compile.topology=v5e:2x2", *overrides, config="imagenet32_l")
  assert done.returncode == 2, done.stdout + done.stderr
  assert done.stderr.count("\n") == 1 and "doesn't fit v5e:2x2: it needs" in done.stderr
  assert "of a device's 15.75 GiB" in done.stderr
  for remedy in ("--config.model.remat=", "a larger slice", "--config.compile.plan=True"):
    assert remedy in done.stderr
  values = json.loads((tmp_path / "compile.json").read_text())
  assert values["fits"] is False and "step_seconds" not in values and "sampling" not in values
  assert values["bytes_per_chip"] > values["hbm_bytes"] == 15.75 * 2**30
  assert "NO:" in done.stdout


@pytest.mark.parametrize(
  "overrides, message",
  [
    (("--config.mesh.tensor=4", "--config.model.n_head=2"), "mesh.tensor: 4 doesn't divide"),
    (("--config.mesh.data=3",), "doesn't multiply to the 4 devices"),
    (("--config.train.accumulate=3",), "× train.accumulate 3; nearest: 24 or 36"),
  ],
)
def test_what_does_not_divide_is_said_before_compiling(overrides, message, tmp_path):
  done = call(tmp_path, *SMALL, "--config.compile.topology=v5e:2x2", *overrides)
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert message in done.stderr
  assert "compiling" not in done.stdout and not (tmp_path / "compile.json").exists()


# --- the training step itself ----------------------------------------------------------------------


@functools.cache
def compiled(topology, shape, **model):
  config = ImageGPTConfig(**{"n_layer": 3, "dtype": "bfloat16", "remat": "names", **model})
  return hlo.parse(step_text(config, topology, shape))


def count(program, what):
  return sum(what(o) for operations in program.computations.values() for o in operations)


def kernels(program):
  """Names of the kernels, each once, however often the compiler has copied it out of a loop."""
  names = {
    o.name.split(".")[0]
    for operations in program.computations.values()
    for o in operations
    if o.target == "tpu_custom_call"
  }
  return {re.sub(r"(_\d+){2,3}$", "", name) for name in names}


ATTENTION = {"fused_attention_forward", "fused_attention_backward"}
AROUND = {"block_qkv", "block_finish", "block_finish_backward_last", "block_qkv_backward"}


TOPOLOGIES = {"v5e:2x2": (1, 4, 1), "v5p:2x2x1": (2, 2, 1), "v6e:2x2": (1, 2, 2), "tpu7x:2x2x1": (2, 4, 1)}  # fmt: skip


@pytest.mark.parametrize("n_head, head_dim", [(4, 64), (8, 96), (2, 128)])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_step_compiles_with_kernels_that_work_in_place(topology, n_head, head_dim):
  """Activations are neither resharded nor, around the kernels, laid out anew or copied."""
  program = compiled(
    topology, TOPOLOGIES[topology], n_head=n_head, n_embd=n_head * head_dim, n_positions=256
  )
  whole_heads = topology == "tpu7x:2x2x1"  # v6e's mesh here splits them
  assert kernels(program) == (ATTENTION | AROUND if whole_heads else ATTENTION)
  run = collectives.count(program)
  assert set(run) <= {"all-gather", "all-reduce", "reduce-scatter"}
  assert run["all-gather"] == 3 * 8 + 3


def test_weights_that_vmem_has_no_room_for_at_once_are_worked_on_in_parts():
  """iGPT-L's, in the backward pass; how many positions doesn't matter, and few compile sooner."""
  program = compiled("v6e:2x4", (1, 8, 1), n_head=16, n_embd=1536, n_positions=256)
  assert kernels(program) == ATTENTION | AROUND | {"block_finish_backward_first"}


def in_loops(program):
  """The operations of loops' bodies, and of what these call."""

  def called(computation):
    for operation in program.computations[computation]:
      yield operation
      for names in operation.called.values():
        for name in names:
          yield from called(name)

  for body in loop_bodies(program):
    yield from called(body)


def loop_bodies(program):
  operations = [o for computation in program.computations.values() for o in computation]
  return [o.called["body"][0] for o in operations if o.opcode == "while"]


def test_wide_matrix_units_work_on_layers_in_kernels_alone():
  """XLA has no product of its own there, and no weight is gathered or gradient scattered while nothing else runs."""
  layer = {"n_head": 4, "n_embd": 512, "n_positions": 256}
  wide = compiled("v6e:2x4", (1, 8, 1), **layer)
  assert kernels(wide) == ATTENTION | AROUND
  assert not [o.name for o in in_loops(wide) if o.opcode in ("convolution", "dot")]
  # What SparseCores run is in computations that the loops call.
  own = [o for body in loop_bodies(wide) for o in wide.computations[body]]
  assert not [o.name for o in own if o.opcode in ("all-gather", "reduce-scatter")]
  assert collectives.count(wide)["all-gather"] == 3 * 8 + 3
  narrow = compiled("v5e:2x4", (1, 8, 1), **layer)
  assert kernels(narrow) == ATTENTION
  assert [o.name for o in in_loops(narrow) if o.opcode == "convolution"]


def test_xla_and_kernels_lay_stacks_out_alike():
  """Where XLA writes queries, keys and values, and in tiles of 16 rows, the whole stack was copied in every layer."""
  config = dataclasses.replace(SMALL_MODEL, n_embd=512)
  text = step_text(config, "tpu7x:2x2x1", (1, 4, 2))
  assert kernels(hlo.parse(text)) == ATTENTION  # the others aren't for a split model
  assert "T(8,128)(2,1)" in text and "T(16,128)(2,1)" not in text


@pytest.mark.parametrize("shape", [(1, 16, 1), (2, 8, 1)], ids=str)
def test_sixteen_chips_gather_weights_and_move_no_activations(shape):
  program = compiled("v5e:4x4", shape, n_head=8, n_embd=512, n_positions=64)
  run = collectives.count(program)
  assert set(run) <= {"all-gather", "all-reduce", "reduce-scatter"}
  assert run["all-gather"] == 3 * 8 + 3
  # Over both dimensions of a slice without rings, this compiler makes all-reduces of reduce-scatters.
  assert ("reduce-scatter" in run) == (shape == (2, 8, 1))


def test_depth_changes_how_often_the_program_turns_not_its_size():
  shallow, deep = (
    compiled("v5e:2x2", (1, 4, 1), n_layer=n_layer, n_head=4, n_embd=256, n_positions=256)
    for n_layer in (3, 6)
  )
  assert kernels(shallow) == kernels(deep) == ATTENTION
  loops = [count(program, lambda o: o.opcode == "while") for program in (shallow, deep)]
  assert loops[0] == loops[1] > 0
  sizes = [count(program, lambda o: True) for program in (shallow, deep)]
  assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
  gathers = [collectives.count(program)["all-gather"] for program in (shallow, deep)]
  assert gathers == [3 * 8 + 3, 6 * 8 + 3]


# --- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_sampling_reads_its_cache_as_it_is_kept(cache):
  """No part of it is laid out anew as float32, nor as the heads' own products would have it."""
  config = ImageGPTConfig(n_layer=2, n_head=4, n_embd=256, n_positions=512, dtype="bfloat16")
  mesh = sharding.make_mesh(4, devices=tiny.tpu_devices("v5e:2x2"))
  lower = forecast.sampling_program(config, autoregressive.SamplingConfig(), 64, mesh, cache)
  with jax.set_mesh(mesh):
    program = hlo.parse(lower().compile().as_text())
  block = 16 * 256 * 256  # of a chip's images, half of their positions, all channels

  def elements(shape):
    return max(
      (math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", shape)),
      default=0,
    )

  assert count(program, lambda o: elements(o.shape) >= block) == 0
