"""Job first_contact's forecasts: job compile, for the slice that the devices are, beside what was measured."""

import json
import time

import pytest

from igpt_jax.config import choices
from igpt_jax.jobs import first_contact
from igpt_jax.jobs.first_contact import Subject
from igpt_jax.parallel import sharding
from igpt_jax.prediction import topology
from igpt_jax.timing.contact_parts import MEASURED, Part, Record
from igpt_jax.workspace import forecast_apart
from igpt_jax.workspace.forecast_apart import OutOfTime
from support import tiny
from support.tpu_job import NEEDS_LIBTPU, SMALL, call

pytestmark = [pytest.mark.tpu_compile, NEEDS_LIBTPU]


def subject_on(name):
  changes = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 128, "model.dtype": "bfloat16",
    "data.resolution": 16, "train.batch_size": 32, "train.steps": 1000,
  }  # fmt: skip
  settings = choices.settle(tiny.settings_of(changes=changes))
  model = choices.model_config(settings, n_vocab=512)
  mesh = sharding.make_mesh(devices=tiny.tpu_devices(name))
  return Subject("small", settings, model, mesh)


def test_a_forecast_stands_beside_the_measurement(tmp_path):
  subject, part = subject_on("v5e:2x2"), Part("training", "small")
  record = Record(str(tmp_path), {}, {part: "key"})
  record.entries[part.name] = {
    "state": MEASURED, "values": {"accumulate": 2, "step": {"seconds": 0.5}},
  }  # fmt: skip
  values = first_contact._forecast(subject, record, until=time.monotonic() + 600)
  assert values["topology"] == "v5e:2x2" and 0 < values["mfu"] < 1
  assert values["accumulate"] == 2 and values["step_seconds"] > 0
  assert values["step_parts"]["compute"] <= values["step_seconds"]


def test_a_forecast_that_takes_too_long_is_ended():
  with pytest.raises(OutOfTime):
    forecast_apart.run_job(
      tiny.changed(subject_on("v5e:2x2").settings, {
        "job": "compile", "compile.topology": "v5e:2x2", "sample.samples": 0,
      }), until=0.0,
    )  # fmt: skip


def test_one_chip_is_compiled_for_alone(tmp_path):
  done = call(tmp_path, *SMALL, "--config.compile.topology=v5e:1x1", "--config.sample.samples=0")
  assert done.returncode == 0, done.stdout + done.stderr
  values = json.loads((tmp_path / "compile.json").read_text())
  assert (values["chips"], values["devices"]) == (1, 1)
  assert values["collectives"] == {} and values["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
  assert values["input"]["vcpus_of_a_host"] == topology.tpu_types.KINDS["v5e"].vcpus // 4
  assert "of v5e:1x1" in done.stdout or "on v5e:1x1" in done.stdout
  refused = call(tmp_path, *SMALL, "--config.compile.topology=v5e:1x1", "--config.mesh.slices=2")
  assert refused.returncode == 2 and "one chip, v5e:1x1, is compiled for alone" in refused.stderr
