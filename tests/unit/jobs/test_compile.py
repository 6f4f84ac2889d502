"""Which path of the blocks job `compile` says that it forecast, without a TPU's compiler."""

import json
import types

import jax
import pytest

from igpt_jax.jobs import compile as compile_job
from igpt_jax.model import fused_stack
from igpt_jax.parallel import hardware
from igpt_jax.prediction import forecast
from igpt_jax.prediction.forecast import Forecast, Memory
from igpt_jax.training import compilation
from support import tiny

STACK, SCANNED = "hand-written stack", "scanned, differentiated by JAX"
SMALL = {
  "job": "compile", "compile.topology": "v5e:2x4", "data.resolution": 8, "model.n_layer": 2,
  "model.n_head": 2, "model.n_embd": 128, "model.remat": "names", "train.batch_size": 16,
  "train.accumulate": 2, "sample.samples": 0,
}  # fmt: skip
SIX_HEADS = {"model.n_head": 6, "model.n_embd": 576}  # of 96: the kernel takes 3 of them, not 6


@pytest.mark.parametrize(
  "platform, options, expected",
  [
    ("tpu", {}, STACK),
    ("tpu", {f"model.{name}": value for name, value in tiny.ALL_OPTIONS.items()}, STACK),
    ("tpu", SIX_HEADS, SCANNED),
    ("tpu", SIX_HEADS | {"mesh.tensor": 2}, STACK),
    ("tpu", {"model.remat": "full"}, SCANNED),
    ("tpu", {"model.remat": "none"}, SCANNED),
    ("tpu", {"model.attention": "xla"}, SCANNED),
    ("cpu", {}, SCANNED),
  ],
  ids=str,
)
def test_the_path_said_is_the_one_that_the_step_takes(
  platform, options, expected, tmp_path, monkeypatch, capsys
):
  """The training step is traced for devices that aren't here, not compiled."""
  monkeypatch.setattr(hardware, "target", lambda: tiny.Chip(0, platform=platform))
  devices = list(tiny.mesh_of((8, 1, 1)).devices.flat)
  topology = types.SimpleNamespace(
    name="v5e:2x4", title="v5e:2x4", slices=1, devices=devices, n_chips=len(devices)
  )
  monkeypatch.setattr(compile_job, "open_topology", lambda *args: topology)
  taken, run = [], fused_stack.run
  monkeypatch.setattr(fused_stack, "run", lambda *args: taken.append(STACK) or run(*args))

  def traced(train_step, abstract, shardings, batch):
    jax.eval_shape(train_step, abstract, batch)

  def forecast_of(trace, model, topology, mesh):
    with jax.set_mesh(mesh):
      trace()
    return Forecast(Memory(*[1] * 6, largest=[]), None, 0.0)

  monkeypatch.setattr(compilation, "compile_step", traced)
  monkeypatch.setattr(forecast, "_forecast", forecast_of)
  compile_job.run(tiny.settings_of(changes=SMALL | options), str(tmp_path))
  assert (taken or [SCANNED])[0] == expected
  assert json.loads((tmp_path / "compile.json").read_text())["blocks"] == expected
  assert f"blocks             {expected}\n" in capsys.readouterr().out
