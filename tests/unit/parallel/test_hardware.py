"""FLOPs of a training step, counted by hand and in the program itself."""

import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.model.image_gpt import abstract_params, bind
from igpt_jax.model.model_config import PRESETS, ImageGPTConfig
from igpt_jax.parallel import hardware
from igpt_jax.parallel.hardware import CHIPS, chip_of, memory_bytes
from igpt_jax.training.compilation import flops_per_image
from igpt_jax.training.objectives import token_nll
from support import jaxprs, tiny


def dot_flops(jaxpr) -> int:
  """FLOPs of all matrix products of a program, those in its loops as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      lhs = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    total += times * sum(dot_flops(inner) for inner in jaxprs.within(equation))
  return total


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_are_those_of_the_program(batch):
  """Plain attention computes all of its scores, as BERT's must; causal ones are half of them."""
  config = tiny.make_config(n_layer=3, causal=False, attention="xla")
  tokens = jnp.asarray(tiny.random_tokens(config, batch))

  def loss(params):
    return jnp.mean(token_nll(bind(config, params)(tokens), tokens))

  program = jax.make_jaxpr(jax.value_and_grad(loss))(abstract_params(config))
  assert dot_flops(program.jaxpr) == batch * flops_per_image(config)
  attention = 3 * 12 * config.n_positions**2 * config.n_embd
  causal = tiny.make_config(n_layer=3)
  assert flops_per_image(config) - flops_per_image(causal) == attention / 2


def test_flops_of_the_published_small_model():
  """6 N D for 131 billion tokens, as published estimates have it, and attention's share."""
  preset = PRESETS["s"]
  flops = flops_per_image(
    ImageGPTConfig(preset.n_layer, preset.n_head, preset.n_embd, causal=False)
  )
  matmuls = 6 * (24 * 12 * 512**2 + 512 * 512) * 1024
  assert flops == matmuls + 24 * 12 * 1024**2 * 512
  images = 1_000_000 * 128
  assert matmuls * images == pytest.approx(5.9e19, rel=0.02)
  assert (flops - matmuls) * images == pytest.approx(2.0e19, rel=0.02)


def test_a_cpu_has_no_known_peak():
  assert chip_of(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize("kind", CHIPS)
def test_chips_are_found_by_what_jax_calls_them(kind):
  class Device:
    device_kind = kind

  chip = chip_of(Device())
  assert chip is CHIPS[kind]
  assert 1e14 < chip.peak_flops < 1e16
  assert 15 <= chip.hbm_bytes / 2**30 < 300
  assert 0.8e12 < chip.hbm_bandwidth < 10e12


class Tpu:
  """One of v5e's devices, which its own process alone may ask about its memory."""

  platform, device_kind = "tpu", "TPU v5 lite"

  def __init__(self, stats=None):
    self.stats = stats

  def memory_stats(self):
    if self.stats is None:
      raise jax.errors.JaxRuntimeError(
        "MemoryStats is only supported for addressable PjRt devices."
      )
    return self.stats


def test_memory_is_asked_of_a_device_of_this_process():
  """On the second of two hosts, a mesh's first device is another process'."""
  theirs, ours = Tpu(), Tpu({"bytes_limit": 2**33})
  devices = np.array([[theirs, ours]])
  mesh = types.SimpleNamespace(devices=devices, local_devices=[ours])
  assert memory_bytes(mesh) == 2**33
  # A device that isn't told its limit, and a slice that isn't here at all: the published figure.
  for devices, local in (([Tpu({})], [Tpu({})]), ([theirs], [])):
    mesh = types.SimpleNamespace(devices=np.array(devices), local_devices=local)
    assert memory_bytes(mesh) == CHIPS["TPU v5 lite"].hbm_bytes
  assert memory_bytes(tiny.mesh_of()) > 2**28


def tpus(kind, *sides, per_chip=1):
  """Devices of a box of chips, with the figures that JAX gives them."""
  return [
    types.SimpleNamespace(platform="tpu", device_kind=kind, coords=spot, core_on_chip=core)
    for spot in itertools.product(*map(range, sides))
    for core in range(per_chip)
  ]


@pytest.mark.parametrize(
  ("devices", "name"),
  [
    (tpus("TPU v5 lite", 1, 1, 1), "v5e:1x1"),
    (tpus("TPU v5 lite", 4, 2, 1), "v5e:2x4"),  # whichever way it lies
    (tpus("TPU v6 lite", 16, 16, 1), "v6e:16x16"),
    (tpus("TPU v4", 2, 2, 1), "v4:2x2x1"),
    (tpus("TPU v5", 4, 4, 8), "v5p:4x4x8"),
    (tpus("TPU7x", 2, 2, 1, per_chip=2), "tpu7x:2x2x1"),
    (tpus("TPU v5 lite", 3, 1, 1), None),  # no such slice
    (tpus("TPU v5 lite", 4, 2, 1)[:-1], None),  # a part of one
    (tpus("TPU v9", 2, 2, 1), None),
    ([types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")], None),
  ],
)
def test_a_slice_is_known_by_its_devices(devices, name):
  assert hardware.topology_of(devices) == name


def test_a_driver_is_named_by_versions_alone(monkeypatch, tmp_path):
  assert hardware.driver(jax.local_devices()[0]) == "cpu" or jax.default_backend() != "cpu"
  client = types.SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
  gpu = types.SimpleNamespace(platform="gpu", client=client)
  told = tmp_path / "version"
  told.write_text(
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build  (dvs@host-7)\n"
    "GCC version:  gcc version 12.2.0\n"
  )
  monkeypatch.setattr(hardware, "_NVIDIA_VERSION", str(told))
  assert hardware.driver(gpu) == "PJRT C API, cuda 12090, NVIDIA driver 560.35.03"
  monkeypatch.setattr(hardware, "_NVIDIA_VERSION", str(tmp_path / "absent"))
  assert hardware.driver(gpu) == "PJRT C API, cuda 12090"
