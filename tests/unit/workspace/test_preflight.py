"""What is known of a job before a slice is rented, and on its first host."""

import dataclasses
import io
import os
import sys

import numpy as np
import pytest

from igpt_jax import buckets as buckets_lib
from igpt_jax import files
from igpt_jax.config import fields, read
from igpt_jax.errors import UserError
from igpt_jax.parallel import tpu_types
from igpt_jax.workspace import places, preflight


def settings_of(**values):
  own = {"data.resolution": 32, "train.steps": 1_000_000, "train.batch_size": 128}
  return fields.with_values(fields.Settings(), own | values)


def said(settings, asked, workdir="gs://bucket/run", check=read.check):
  lines = list(preflight.here(settings, asked, workdir, check))
  return {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}


def test_hours_and_grace_are_those_of_the_forecast():
  lines = said(settings_of(), "v5litepod-16")
  assert lines["slice"] == "v5litepod-16 (v5e:4x4): 16 chips, 4 hosts"
  # 1,000,000 × 49.4 ms, and 12 bytes for each of 76.6 million parameters over 4 hosts.
  assert lines["time"].startswith(
    "13.7 hours, 219 chip-hours: 1,000,000 steps of 49 ms, iGPT-S 32²"
  )
  assert "made with" not in lines["time"]  # with the mesh that is chosen
  assert lines["grace"].startswith("3 s to save when told to stop: two steps and 919 MB by 4 hosts")
  assert "https://cloud.google.com/tpu/pricing" in lines["price"]
  # Another batch and mesh take their share of the forecast's, and say so.
  other = said(settings_of(**{"train.batch_size": 512, "mesh.fsdp": 2}), "v5litepod-16")
  assert "steps of 181 ms" in other["time"]
  assert "made with batch 256, mesh (2, 8, 1)" in other["time"]


@pytest.mark.parametrize("kind", tpu_types.KINDS)
def test_every_kind_of_slice_has_its_lines(kind):
  """Also those whose chips have no published figures here (v2, v3)."""
  shape = "2x2x2" if kind in ("v4", "v5p", "tpu7x") else "4x4"
  lines = said(settings_of(), f"{kind}:{shape}")
  assert lines["slice"].endswith("hosts") and {"time", "grace", "price"} <= lines.keys()


def test_where_there_is_no_forecast_it_says_how_to_get_one():
  lines = said(settings_of(**{"train.optimizer": "muon"}), "v6e:2x4")
  assert "no forecast of iGPT-S 32² (muon) on v6e:2x4; to get one" in lines["time"]
  assert "--config.job=compile --config.compile.topology=v6e:2x4" in lines["time"]
  assert "whose time isn't known" in lines["grace"]
  lines = said(settings_of(job="probe"), "v6e:2x4")
  assert lines["time"].startswith("no forecast") and "grace" not in lines
  assert said(settings_of(), "").keys() == {"config"}


@pytest.mark.parametrize(
  "values, asked, message",
  [
    ({}, "v5litepod-17", r"nearest: v5litepod-8, v5litepod-16"),
    ({"train.batch_size": 100}, "v5litepod-16", r"train\.batch_size: 100 .*nearest: 96 or 112"),
    ({"train.accumulate": 16}, "v5litepod-16", r"16 of the mesh × train\.accumulate 16"),
    ({"mesh.data": 3}, "v5litepod-16", r"doesn't multiply to the 16 devices"),
    ({"mesh.fsdp": 16, "model.n_embd": 24}, "v5litepod-16", r"mesh\.fsdp: 16"),
    ({"job": "finetune", "finetune.batch_size": 24}, "v6e-16", r"finetune\.batch_size: 24"),
    ({"job": "evaluate", "evaluate.batch_size": 24}, "v6e-16", r"evaluate\.batch_size: 24"),
    ({"job": "probe", "features.batch_size": 24}, "v6e-16", r"features\.batch_size: 24"),
    ({"train.batch_size": 32}, "tpu7x-64", r"multiple of data × fsdp = 64"),  # two devices a chip
    ({"train.warmup_steps": 2_000_000}, "v5litepod-16", r"warmup_steps"),
    ({}, "2xv5litepod-16", r"mesh\.slices: 1; 2 slices would be asked for"),
  ],
)
def test_settings_that_do_not_suit_the_slice(values, asked, message):
  with pytest.raises(UserError, match=message):
    said(settings_of(**values), asked)


@pytest.mark.parametrize(
  "workdir, message",
  [
    ("gs:///run", "gs:///run: there is no bucket in it"),
    ("gs:/bucket/run", "gs:/bucket/run; expected a local path or gs://BUCKET/PATH"),
    ("s3://bucket/run", "s3://bucket/run; expected a local path or gs://BUCKET/PATH"),
  ],
)
def test_a_workdir_that_the_start_would_refuse(workdir, message):
  with pytest.raises(UserError, match=f"^--workdir: {message}"):
    said(settings_of(), "v5litepod-16", workdir)
  assert said(settings_of(), "", "/mnt/not here/run")


def test_a_launchers_machine_needs_nothing_that_reads_buckets(monkeypatch):
  buckets_lib._prepare.cache_clear()
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  given = {
    "init_from": "gs://bucket/run",
    "palette.path": "gs://bucket/palette.npy",
    "compilation_cache": "gs://bucket/programs",
  }
  said(settings_of(**given), "v5litepod-16")
  with pytest.raises(UserError, match=r"config\.init_from: gs:///run: there is no bucket in it"):
    said(settings_of(init_from="gs:///run"), "v5litepod-16")
  # The machine that reads them says so before it does anything.
  with pytest.raises(UserError, match="buckets need gcsfs"):
    places.check(settings_of(**given), "/tmp")
  buckets_lib._prepare.cache_clear()


def test_without_jax_batch_and_slice_are_checked_all_the_same():
  lines = said(settings_of(), "v5litepod-16", check=None)
  assert "no jax here" in lines["config"] and "without jax" in lines["time"]
  with pytest.raises(UserError, match=r"train\.batch_size: 100"):
    said(settings_of(**{"train.batch_size": 100}), "v5litepod-16", check=None)


def test_the_machine_opens_what_the_job_will(tmp_path):
  tiny = fields.Settings(data=dataclasses.replace(fields.Settings().data, name="digits"))
  lines = list(preflight.machine(tiny, str(tmp_path / "run")))
  assert lines[0] == f"workdir: {tmp_path / 'run'}: can be written to"
  assert lines[1].startswith("data: digits/")
  assert os.listdir(tmp_path / "run") == []
  # Evaluation that starts beside the training has no checkpoint yet; other evaluation must.
  probe = dataclasses.replace(tiny, job="probe")
  assert len(list(preflight.machine(dataclasses.replace(probe, watch=True), str(tmp_path)))) == 2
  with pytest.raises(UserError, match="no checkpoint in"):
    list(preflight.machine(probe, str(tmp_path)))


@pytest.mark.parametrize(
  "values, message",
  [
    ({"data.name": "imagenet2012", "data.data_dir": "/nowhere"}, "not prepared in /nowhere"),
    ({"palette.path": "/nowhere.npy"}, "/nowhere.npy: No such file"),
    ({"init_from": "/nowhere"}, "/nowhere"),
  ],
)
def test_what_is_not_on_the_machine(tmp_path, values, message):
  with pytest.raises(UserError, match=message):
    list(preflight.machine(fields.with_values(fields.Settings(), values), str(tmp_path)))


def test_a_workdir_of_another_run_or_that_cannot_be_written_to(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="can't be written to"):
    list(preflight.machine(fields.Settings(), str(tmp_path / "file" / "run")))


@pytest.fixture
def scratch_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_scratch", str(tmp_path / "scratch"))
  return tmp_path / "scratch"


def test_data_in_a_bucket_is_looked_at_and_not_copied(buckets, scratch_folder, tmp_path):
  """Other hosts wait five minutes for the first: a copy of a data set may take longer."""
  for i in range(50):
    buckets.put("bucket", f"photos/train/a/{i}.png", b"\x89PNG")
  buckets.put("bucket", "photos/.DS_Store", b"?")
  tokens = io.BytesIO()
  np.save(tokens, np.zeros((4, 64), np.int32))
  buckets.put("bucket", "tokens/train.npy", tokens.getvalue())

  def told(name, path):
    settings = settings_of(**{"data.name": name, "data.path": path})
    return list(preflight.machine(settings, str(tmp_path / "run")))[1]

  assert told("folder", "gs://bucket/photos/") == (
    "data: gs://bucket/photos has images, of which train/a/0.png can be read"
  )
  assert buckets.count("read") == 1
  assert told("tokens", "gs://bucket/tokens") == "data: gs://bucket/tokens/train.npy can be read"
  assert told("tokens", "gs://bucket/tokens/train.npy").endswith("train.npy can be read")
  assert not scratch_folder.exists()
  for name, path, message in (
    ("folder", "gs://bucket/none", "data.path gs://bucket/none: no files there"),
    ("tokens", "gs://bucket/none", "data.path gs://bucket/none/train.npy: no such file"),
    ("tokens", "gs://bucket/photos/train/a/0.png", "not a .npy"),
  ):
    with pytest.raises(UserError, match=message):
      told(name, path)
